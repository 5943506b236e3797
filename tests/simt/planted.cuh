// Kernels that guard the emulator: those of namespace correct must pass, those of namespace planted hold one bug each.
#pragma once

#include "cuda/device.cuh"

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int thread_in_grid() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

namespace correct {

__global__ void vector_add(const float* x, const float* y, float* out, int n) {
  const int i = thread_in_grid();
  if (i < n) out[i] = x[i] + y[i];
}

// The sum over blocks of full warps, in thread 0.
template <class T>
__device__ T block_sum(T value) {
  METAFAST_SHARED(T, sums, [32]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  if (lane == 0) sums[warp] = value;
  __syncthreads();
  T total = lane < static_cast<int>(blockDim.x) / 32 ? sums[lane] : T(0);
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_down_sync(kAllLanes, total, offset);
  return total;
}

// Two sums with one static array, and an atomic over the blocks.
__global__ void block_sums(const float* x, float* sums, int* positive, int n) {
  const int i = thread_in_grid();
  const float sum = block_sum(i < n ? x[i] : 0.0f);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
  __syncthreads();
  const int count = block_sum(i < n && x[i] > 0 ? 1 : 0);
  if (threadIdx.x == 0) atomicAdd(positive, count);
}

// out[i, j] = |x_i - y_j|^2 by tiles in shared memory.
template <int kTile>
__global__ void __launch_bounds__(kTile* kTile)
    tiled_distance(const float* x, const float* y, float* out, int n, int m, int d) {
  METAFAST_SHARED(float, x_tile, [kTile][kTile + 1]);
  METAFAST_SHARED(float, y_tile, [kTile][kTile + 1]);
  const int column = static_cast<int>(threadIdx.x), row = static_cast<int>(threadIdx.y);
  const int i = static_cast<int>(blockIdx.y) * kTile + row, first_j = static_cast<int>(blockIdx.x) * kTile;
  float sum = 0;
  for (int first = 0; first < d; first += kTile) {
    const int k = first + column;
    x_tile[row][column] = i < n && k < d ? x[i * d + k] : 0;
    y_tile[row][column] = first_j + row < m && k < d ? y[(first_j + row) * d + k] : 0;
    __syncthreads();
    for (int t = 0; t < kTile; ++t) {
      const float difference = x_tile[row][t] - y_tile[column][t];
      sum += difference * difference;
    }
    __syncthreads();
  }
  if (i < n && first_j + column < m) out[i * m + first_j + column] = sum;
}

// Sums of rows of 4 * 64 * steps floats, the next step being copied while this one is added up; 64 threads.
__global__ void copied_row_sums(const float* x, float* out, int steps) {
  METAFAST_DYNAMIC_SHARED(float4, stages);
  const float4* row = reinterpret_cast<const float4*>(x) + static_cast<int>(blockIdx.x) * steps * 64;
  const int thread = static_cast<int>(threadIdx.x);
  metafast::cuda::copy_async<16>(&stages[thread], &row[thread]);
  metafast::cuda::commit_async();
  float sum = 0;
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps)
      metafast::cuda::copy_async<16>(&stages[(step + 1) % 2 * 64 + thread], &row[(step + 1) * 64 + thread]);
    metafast::cuda::commit_async();
    metafast::cuda::wait_async<1>();
    __syncthreads();
    const float4 other = stages[step % 2 * 64 + 63 - thread];
    sum += other.x + other.y + other.z + other.w;
    __syncthreads();
  }
  metafast::cuda::wait_async<0>();
  sum = block_sum(sum);
  if (thread == 0) out[blockIdx.x] = sum;
}

// One warp adds up 32 numbers in shared memory.
__global__ void warp_sum_in_shared(const float* x, float* out) {
  METAFAST_SHARED(float, sums, [32]);
  const int lane = static_cast<int>(threadIdx.x);
  sums[lane] = x[lane];
  __syncwarp();
  for (int offset = 16; offset > 0; offset /= 2) {
    if (lane < offset) sums[lane] += sums[lane + offset];
    __syncwarp();
  }
  if (lane == 0) *out = sums[0];
}

// Each half of a warp reverses its numbers, twice as often in the upper half.
__global__ void half_warps(const float* x, float* out) {
  METAFAST_SHARED(float, numbers, [32]);
  const int lane = static_cast<int>(threadIdx.x), first = lane & 16;
  const unsigned half = first ? 0xffff0000u : 0x0000ffffu;
  float number = x[lane];
  for (int turn = 0; turn < (first ? 2 : 1); ++turn) {
    numbers[lane] = number;
    __syncwarp(half);
    number = numbers[first + 15 - (lane - first)];
    __syncwarp(half);
  }
  out[lane] = number + __shfl_xor_sync(half, 0.0f, 8);
}

// The lanes leave one after the other; each counts those that were left with it.
__global__ void leaving_lanes(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  unsigned left = kAllLanes;
  for (int turn = 0; turn < lane; ++turn) left = __ballot_sync(left, true);
  out[lane] = __popc(left);
}

// Threads beyond n return at once, and the collectives of the others go on without them.
__global__ void early_return(const float* x, float* out, int n) {
  const int i = thread_in_grid();
  if (i >= n) return;
  out[i] = x[i] + static_cast<float>(__any_sync(kAllLanes, x[i] < 0));
}

// float4 at a time through shared memory, each thread reading what four others wrote; 64 threads.
__global__ void vector_transpose(const float* x, float* out) {
  METAFAST_SHARED(float4, tile, [64]);
  const int thread = static_cast<int>(threadIdx.x);
  tile[thread] = reinterpret_cast<const float4*>(x)[thread];
  __syncthreads();
  const float* numbers = reinterpret_cast<const float*>(tile);
  float4 column;
  column.x = numbers[thread];
  column.y = numbers[thread + 64];
  column.z = numbers[thread + 128];
  column.w = numbers[thread + 192];
  reinterpret_cast<float4*>(out)[thread] = column;
}

// How often each number occurs, first in the block, then in the grid.
__global__ void histogram(const int* numbers, int* counts, int n) {
  METAFAST_SHARED(int, block_counts, [8]);
  if (threadIdx.x < 8) block_counts[threadIdx.x] = 0;
  __syncthreads();
  const int i = thread_in_grid();
  if (i < n) atomicAdd(&block_counts[numbers[i]], 1);
  __syncthreads();
  if (threadIdx.x < 8) atomicAdd(&counts[threadIdx.x], block_counts[threadIdx.x]);
}

// Every collective against its definition, in blocks of 64 threads: mistakes[k] counts those of number k.
__global__ void collectives(int* mistakes) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  int number = 0;
  const auto expect = [&](bool right) {
    if (!right) atomicAdd(&mistakes[number], 1);
    ++number;
  };
  expect(__shfl_sync(kAllLanes, lane, 5) == 5);
  expect(__shfl_sync(kAllLanes, lane, 37) == 5);
  expect(__shfl_sync(kAllLanes, lane, 3, 8) == lane / 8 * 8 + 3);
  expect(__shfl_sync(kAllLanes, lane, lane + 1) == (lane + 1) % 32);
  expect(__shfl_up_sync(kAllLanes, lane, 2) == (lane < 2 ? lane : lane - 2));
  expect(__shfl_up_sync(kAllLanes, lane, 2, 8) == (lane % 8 < 2 ? lane : lane - 2));
  expect(__shfl_down_sync(kAllLanes, lane, 2) == (lane > 29 ? lane : lane + 2));
  expect(__shfl_down_sync(kAllLanes, lane, 3, 16) == (lane % 16 > 12 ? lane : lane + 3));
  expect(__shfl_xor_sync(kAllLanes, lane, 9) == (lane ^ 9));
  expect(__shfl_xor_sync(kAllLanes, lane, 12, 8) == (lane & 8 ? lane ^ 12 : lane));
  expect(__shfl_xor_sync(kAllLanes, lane + 0.5, 1) == (lane ^ 1) + 0.5);
  expect(__shfl_xor_sync(kAllLanes, lane + 0.5f, 1) == (lane ^ 1) + 0.5f);
  expect(__shfl_sync(lane % 2 ? 0xaaaaaaaau : 0x55555555u, lane, 6 + lane % 2) == 6 + lane % 2);
  expect(__ballot_sync(kAllLanes, lane % 3 == 0) == 0x49249249u);
  expect(__ballot_sync(lane < 8 ? 0x000000ffu : 0xffffff00u, true) == (lane < 8 ? 0x000000ffu : 0xffffff00u));
  expect(__any_sync(kAllLanes, lane == 31) != 0);
  expect(__any_sync(kAllLanes, lane == 32) == 0);
  expect(__all_sync(kAllLanes, lane < 32) != 0);
  expect(__all_sync(kAllLanes, lane > 0) == 0);
  expect(__syncthreads_count(thread < 7) == 7);
  expect(__syncthreads_or(thread == 40) != 0);
  expect(__syncthreads_or(thread == 64) == 0);
  expect(__syncthreads_and(thread < 64) != 0);
  expect(__syncthreads_and(thread < 40) == 0);
  expect(__popc(0xf0f0u) == 8 && __clz(1) == 31 && __clz(0) == 32 && __ffs(8) == 4 && __ffs(0) == 0);
}
constexpr int kCollectives = 25;

}  // namespace correct

namespace planted {

// ---- out of bounds

__global__ void shared_write_past_end(float* out) {
  METAFAST_SHARED(float, numbers, [64]);
  if (threadIdx.x == 0) numbers[0] = 1;
  __syncthreads();
  numbers[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = numbers[threadIdx.x];
}

__device__ __forceinline__ float next_to(const float* numbers) { return numbers[threadIdx.x + 1]; }

__global__ void shared_read_past_end(float* out) {
  METAFAST_SHARED(float, numbers, [64]);
  numbers[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = next_to(numbers);
}

// Launched with one number too little.
__global__ void dynamic_shared_too_small(float* out) {
  METAFAST_DYNAMIC_SHARED(float, numbers);
  numbers[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = numbers[threadIdx.x];
}

__global__ void global_write_past_end(float* out) { out[thread_in_grid()] = 1; }

__global__ void global_read_past_end(const float* x, float* out, int n) {
  const float number = x[thread_in_grid()];
  if (thread_in_grid() < n) out[thread_in_grid()] = number;
}

__global__ void misaligned_vector(const float* x, float* out) {
  out[threadIdx.x] = reinterpret_cast<const float4*>(x + 1)[threadIdx.x].x;
}

// ---- not ordered

__global__ void no_barrier(const float* x, float* out) {
  METAFAST_SHARED(float, numbers, [64]);
  numbers[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = numbers[63 - threadIdx.x];
}

// Right when the threads run in order.
__global__ void no_barrier_lower_neighbour(const float* x, float* out) {
  METAFAST_SHARED(float, numbers, [64]);
  numbers[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = threadIdx.x > 0 ? numbers[threadIdx.x - 1] : 0;
}

// The next tile overwrites what other threads still add up.
__global__ void no_second_barrier(const float* x, float* out, int tiles) {
  METAFAST_SHARED(float, tile, [64]);
  float sum = 0;
  for (int k = 0; k < tiles; ++k) {
    tile[threadIdx.x] = x[k * 64 + static_cast<int>(threadIdx.x)];
    __syncthreads();
    for (int t = 0; t < 64; ++t) sum += tile[t];
  }
  out[threadIdx.x] = sum;
}

__global__ void no_syncwarp(const float* x, float* out) {
  METAFAST_SHARED(float, sums, [32]);
  const int lane = static_cast<int>(threadIdx.x);
  sums[lane] = x[lane];
  for (int offset = 16; offset > 0; offset /= 2) {
    if (lane < offset) sums[lane] += sums[lane + offset];
  }
  if (lane == 0) *out = sums[0];
}

// __syncwarp orders the write after the reads of its own warp only; 64 threads.
__global__ void read_by_other_warp(const float* x, float* out) {
  METAFAST_SHARED(float, numbers, [1]);
  if (threadIdx.x == 0) numbers[0] = x[0];
  __syncthreads();
  out[threadIdx.x] = numbers[0];
  __syncwarp();
  if (threadIdx.x == 0) numbers[0] = 2;
}

// Shuffles do not order memory.
__global__ void shuffle_for_syncwarp(const float* x, float* out) {
  METAFAST_SHARED(float, numbers, [32]);
  const int lane = static_cast<int>(threadIdx.x);
  numbers[lane] = x[lane];
  const int other = __shfl_xor_sync(kAllLanes, lane, 1);
  out[lane] = numbers[other];
}

// Both halves synchronise, but not with each other; the ballot only makes every order give the right result.
__global__ void half_syncwarp(const float* x, float* out) {
  METAFAST_SHARED(float, numbers, [32]);
  const int lane = static_cast<int>(threadIdx.x);
  numbers[lane] = x[lane];
  __syncwarp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
  __ballot_sync(kAllLanes, true);
  out[lane] = numbers[lane ^ 16];
}

__global__ void no_atomic(const float* x, float* out) { *out += x[thread_in_grid()]; }

// All write the same: still undefined.
__global__ void all_write(const float* x, float* out) {
  if (x[threadIdx.x] > 0) *out = 1;
}

__global__ void atomic_and_plain(float* count, float* out) {
  atomicAdd(count, 1);
  out[threadIdx.x] = *count > 0;
}

// The last of four numbers in one 16-byte store belongs to the next thread.
__global__ void vector_overlap(float* out) {
  METAFAST_SHARED(float4, vectors, [64]);
  float* numbers = reinterpret_cast<float*>(vectors);
  vectors[threadIdx.x] = {1, 1, 1, 1};
  numbers[(threadIdx.x * 4 + 7) % 256] = 1;
  __syncthreads();
  out[threadIdx.x] = vectors[threadIdx.x].w;
}

__global__ void blocks_not_ordered(float* partial, float* out) {
  partial[blockIdx.x] = 1;
  if (blockIdx.x == gridDim.x - 1) {
    float sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += partial[block];
    *out = sum;
  }
}

__global__ void uninitialised_shared(float* out) {
  METAFAST_SHARED(float, count, [1]);
  atomicAdd(&count[0], 1);
  __syncthreads();
  if (threadIdx.x == 0) *out = count[0];
}

// ---- asynchronous copies

__global__ void copy_not_awaited(const float* x, float* out) {
  METAFAST_DYNAMIC_SHARED(float, numbers);
  metafast::cuda::copy_async<4>(&numbers[threadIdx.x], &x[threadIdx.x]);
  metafast::cuda::commit_async();
  __syncthreads();
  const float number = numbers[threadIdx.x];
  metafast::cuda::wait_async<0>();
  out[threadIdx.x] = number;
}

// One group too few is waited for.
__global__ void copy_awaited_too_late(const float* x, float* out) {
  METAFAST_DYNAMIC_SHARED(float, numbers);
  metafast::cuda::copy_async<4>(&numbers[threadIdx.x], &x[threadIdx.x]);
  metafast::cuda::commit_async();
  metafast::cuda::wait_async<1>();
  __syncthreads();
  out[threadIdx.x] = numbers[63 - threadIdx.x];
  metafast::cuda::wait_async<0>();
}

__global__ void copy_without_barrier(const float* x, float* out) {
  METAFAST_DYNAMIC_SHARED(float, numbers);
  metafast::cuda::copy_async<4>(&numbers[threadIdx.x], &x[threadIdx.x]);
  metafast::cuda::commit_async();
  metafast::cuda::wait_async<0>();
  out[threadIdx.x] = numbers[63 - threadIdx.x];
}

// The second copy may arrive while others still read the first; here it arrives after the next barrier.
__global__ void copy_refills_too_early(const float* x, float* out) {
  METAFAST_DYNAMIC_SHARED(float, numbers);
  metafast::cuda::copy_async<4>(&numbers[threadIdx.x], &x[threadIdx.x]);
  metafast::cuda::commit_async();
  metafast::cuda::wait_async<0>();
  __syncthreads();
  float sum = numbers[63 - threadIdx.x];
  metafast::cuda::copy_async<4>(&numbers[threadIdx.x], &x[64 + threadIdx.x]);
  metafast::cuda::commit_async();
  __syncthreads();
  metafast::cuda::wait_async<0>();
  __syncthreads();
  sum += numbers[63 - threadIdx.x];
  out[threadIdx.x] = sum;
}

__global__ void copy_misaligned(const float* x, float* out) {
  METAFAST_DYNAMIC_SHARED(float, numbers);
  metafast::cuda::copy_async<16>(numbers, x + 1);
  metafast::cuda::commit_async();
  metafast::cuda::wait_async<0>();
  *out = numbers[0];
}

__global__ void copy_abandoned(const float* x) {
  METAFAST_DYNAMIC_SHARED(float, numbers);
  metafast::cuda::copy_async<4>(&numbers[threadIdx.x], &x[threadIdx.x]);
  metafast::cuda::commit_async();
}

// ---- barriers and collectives that not all reach

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    out[threadIdx.x] = 1;
    __syncthreads();
  }
}

__global__ void return_before_barrier(float* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void half_of_shuffle(float* out) {
  float number = 1;
  if (threadIdx.x % 32 < 16) {
    number += __shfl_xor_sync(kAllLanes, number, 1);
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = number;
}

// Launched with 48 threads: half of the second warp does not exist.
__global__ void shuffle_from_missing_lane(float* out) {
  float number = 1;
  for (int offset = 16; offset > 0; offset /= 2) number += __shfl_down_sync(kAllLanes, number, offset);
  out[threadIdx.x] = number;
}

__global__ void shuffle_outside_mask(float* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, out[threadIdx.x], 0); }

__global__ void shuffle_width(float* out) { out[threadIdx.x] = __shfl_sync(kAllLanes, out[threadIdx.x], 0, 12); }

__global__ void different_collectives(float* out) {
  float number = 1;
  if (threadIdx.x % 2) {
    number += __shfl_xor_sync(kAllLanes, number, 2);
  } else {
    number += __shfl_xor_sync(kAllLanes, number, 4);
  }
  out[threadIdx.x] = number;
}

// ---- launches

// 32 KiB here, 32 KiB dynamic.
__global__ void too_much_shared(float* out) {
  METAFAST_SHARED(float, numbers, [8192]);
  METAFAST_DYNAMIC_SHARED(float, more);
  numbers[threadIdx.x] = more[threadIdx.x] = 1;
  out[threadIdx.x] = numbers[threadIdx.x];
}

__global__ void too_much_dynamic_shared(float*) {}

__global__ void empty_grid(float*) {}

__global__ void too_many_threads(float*) {}

}  // namespace planted
