// Arguments and gradients of groups of tasks on a GPU.
#pragma once

#include "cuda/features.cuh"

namespace metafast::cuda {

constexpr int kMostParts = 40;

// Parts of a task's row of numbers, side by side, and the tensor [groups, end - the end before] that each goes to.
template <class A>
struct RowParts {
  A* to[kMostParts];
  int64_t end[kMostParts];
};

// Sums over the tasks of each group, always in the same order. A block: kWarp numbers of one group; a warp adds every
// kWarps-th task.
template <class A>
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const A* __restrict__ rows, const __grid_constant__ RowParts<A> parts, int64_t group_tasks,
                     int64_t size, int64_t chunks) {
  METAFAST_SHARED(A, sums, [kWarps][kWarp]);
  BlockNumber block;
  const int64_t k = block.part(chunks) * kWarp + lane_index(), g = block.rest();
  A sum = A(0);
  for (int64_t t = warp_index(); k < size && t < group_tasks; t += kWarps)
    sum += rows[(g * group_tasks + t) * size + k];
  sums[warp_index()][lane_index()] = sum;
  __syncthreads();
  if (warp_index() > 0 || k >= size) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane_index()];
  int part = 0;
  while (parts.end[part] <= k) ++part;
  const int64_t begin = part == 0 ? 0 : parts.end[part - 1];
  parts.to[part][g * (parts.end[part] - begin) + k - begin] = sum;
}

// out [groups tasks_each, size] = the numbers of each task's group. A thread an element.
template <class A>
__global__ void __launch_bounds__(kThreads) spread_groups_kernel(const A* __restrict__ of_groups, A* __restrict__ out,
                                                                 int64_t groups, int64_t tasks_each, int64_t size) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= groups * tasks_each * size) return;
  out[element] = of_groups[element / size / tasks_each * size + element % size];
}

template <class A>
void launch_sum_parts(const A* rows, const RowParts<A>& parts, int64_t tasks, int64_t groups, int64_t size,
                      Stream stream) {
  const int64_t chunks = ceil_div(size, kWarp);
  const unsigned grid = grid_size(groups * chunks);
  if (grid == 0) return;
  METAFAST_LAUNCH((sum_parts_kernel<A>), grid, kThreads, 0, stream, rows, parts, tasks / groups, size, chunks);
}

template <class A>
void launch_spread_groups(const A* of_groups, A* out, int64_t groups, int64_t tasks_each, int64_t size, Stream stream) {
  const unsigned grid = grid_size(ceil_div(groups * tasks_each * size, kThreads));
  if (grid == 0) return;
  METAFAST_LAUNCH((spread_groups_kernel<A>), grid, kThreads, 0, stream, of_groups, out, groups, tasks_each, size);
}

// Several families launch these; the kernels are compiled once, with groups.cu.
#define METAFAST_GROUP_LAUNCHERS(prefix, A)                                                                  \
  prefix template void launch_sum_parts<A>(const A*, const RowParts<A>&, int64_t, int64_t, int64_t, Stream); \
  prefix template void launch_spread_groups<A>(const A*, A*, int64_t, int64_t, int64_t, Stream);

METAFAST_GROUP_LAUNCHERS(extern, float)
METAFAST_GROUP_LAUNCHERS(extern, double)

}  // namespace metafast::cuda
