// Matching networks on a GPU. A thread is one query row; cosines [T, n, m] lie side by side for those of a block.
#pragma once

#include "cuda/labels.cuh"
#include "cuda/rows.cuh"

namespace metafast::cuda {

// What every kernel reads.
template <class A>
struct Matching {
  const A* squares;        // [T, n], of the support rows
  const A* query_squares;  // [T, m]
  Labels labels;           // [T, n]
  Scale<A> scale;
  A eps;
  int64_t m;
  int64_t num_classes;

  __device__ __forceinline__ A lengths(int64_t t, int64_t i, int64_t j) const {
    return std::sqrt(squares[t * labels.rows + i]) * std::sqrt(query_squares[t * m + j]);
  }
  // What stands under the inner product.
  __device__ __forceinline__ A bounded(A product) const { return product < eps ? eps : product; }
};

// log_probs [T, m, C], totals [T, m] and cosines [T, n, m], of inner products [T, n, m].
template <class A>
__global__ void __launch_bounds__(kThreads)
    matching_kernel(Products<A> products, Matching<A> of, A* __restrict__ log_probs, A* __restrict__ totals,
                    A* __restrict__ cosines, int64_t blocks) {
  BlockNumber block;
  const int64_t j = block.part(blocks) * kThreads + threadIdx.x, t = block.rest();
  const int64_t n = products.n, m = products.m, C = of.num_classes;
  if (j >= m) return;
  const int64_t* labels = of.labels.of(t);
  A *own = cosines + t * n * m + j, *out = log_probs + (t * m + j) * C;
  const A scale = of.scale.at(t);
  bool bad = false;
  for (int64_t i = 0; i < n; ++i) {
    bad |= labels[i] < 0 || labels[i] >= C;
    own[i * m] = products.at(t, i, j) / of.bounded(of.lengths(t, i, j));
  }
  A most = A(-INFINITY);
  for (int64_t c = 0; c < C; ++c) {
    A largest = A(-INFINITY), sum = A(0);
    bool present = false;
    for (int64_t i = 0; i < n; ++i) {
      if (labels[i] != c) continue;
      const A value = own[i * m] * scale;
      largest = largest >= value ? largest : value;
      present = true;
    }
    for (int64_t i = 0; present && i < n; ++i) {
      if (labels[i] == c) sum += std::exp(own[i * m] * scale - largest);
    }
    out[c] = present ? largest + std::log(sum) : largest;
    most = most >= out[c] ? most : out[c];
  }
  A sum = A(0);
  for (int64_t c = 0; c < C; ++c) sum += std::exp(out[c] - most);
  const A total = bad ? not_a_number<A>() : most + std::log(sum);
  totals[t * m + j] = total;
  for (int64_t c = 0; c < C; ++c) out[c] -= total;
}

// Slopes [T, n, m] for the inner products, the coefficients of the query rows themselves in their own gradients, and what
// each contributes to the gradient of the scale, both [T, m].
template <class A>
__global__ void __launch_bounds__(kThreads)
    matching_slopes_kernel(const A* __restrict__ grad, const A* __restrict__ log_probs, const A* __restrict__ totals,
                           const A* __restrict__ cosines, Matching<A> of, A* __restrict__ slopes,
                           A* __restrict__ query_parts, A* __restrict__ scale_parts, int64_t blocks) {
  BlockNumber block;
  const int64_t j = block.part(blocks) * kThreads + threadIdx.x, t = block.rest();
  const int64_t n = of.labels.rows, m = of.m, C = of.num_classes, row = t * m + j;
  if (j >= m) return;
  const A *upstream = grad + row * C, *logs = log_probs + row * C;
  const A scale = of.scale.at(t), total = totals[row];
  A all = A(0), along = A(0), of_scale = A(0);
  for (int64_t c = 0; c < C; ++c) all += upstream[c];
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = (t * n + i) * m + j, label = of.labels.of(t)[i];
    const bool bad = label < 0 || label >= C;
    const A weight = bad ? not_a_number<A>() : upstream[label] - all * std::exp(logs[label]);
    const A of_rows = bad ? total : total + logs[label];
    const A slope = std::exp(cosines[at] * scale - of_rows) * weight, product = of.lengths(t, i, j);
    of_scale += slope * cosines[at];
    slopes[at] = slope * scale / of.bounded(product);
    if (product > of.eps) along += slope * scale * cosines[at];
  }
  // A row of zeros has no part of its own.
  query_parts[row] = along == A(0) ? A(0) : -along / of.query_squares[row];
  scale_parts[row] = of_scale;
}

// The coefficients [T, n] of the support rows themselves in their gradients. A warp is one of them.
template <class A>
__global__ void __launch_bounds__(kThreads)
    matching_parts_kernel(const A* __restrict__ slopes, const A* __restrict__ cosines, Matching<A> of,
                          A* __restrict__ parts, int64_t tasks) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp_index(), n = of.labels.rows, m = of.m;
  if (row >= tasks * n) return;
  A along = A(0);
  for (int64_t j = lane_index(); j < m; j += kWarp) {
    const A product = of.lengths(row / n, row % n, j);
    if (product > of.eps) along += slopes[row * m + j] * cosines[row * m + j] * product;
  }
  along = warp_sum(along);
  if (lane_index() == 0) parts[row] = along == A(0) ? A(0) : -along / of.squares[row];
}

template <class A>
void launch_matching(const Products<A>& products, const Matching<A>& of, A* log_probs, A* totals, A* cosines,
                     Stream stream) {
  const int64_t blocks = ceil_div(products.m, kThreads);
  const unsigned grid = grid_size(products.tasks * blocks);
  if (grid == 0) return;
  METAFAST_LAUNCH((matching_kernel<A>), grid, kThreads, 0, stream, products, of, log_probs, totals, cosines, blocks);
}

template <class A>
void launch_matching_slopes(const A* grad, const A* log_probs, const A* totals, const A* cosines, const Matching<A>& of,
                            A* slopes, A* query_parts, A* scale_parts, int64_t tasks, Stream stream) {
  const int64_t blocks = ceil_div(of.m, kThreads);
  const unsigned grid = grid_size(tasks * blocks);
  if (grid == 0) return;
  METAFAST_LAUNCH((matching_slopes_kernel<A>), grid, kThreads, 0, stream, grad, log_probs, totals, cosines, of, slopes,
                  query_parts, scale_parts, blocks);
}

template <class A>
void launch_matching_parts(const A* slopes, const A* cosines, const Matching<A>& of, A* parts, int64_t tasks,
                           Stream stream) {
  const unsigned grid = grid_size(ceil_div(tasks * of.labels.rows, kWarps));
  if (grid == 0) return;
  METAFAST_LAUNCH((matching_parts_kernel<A>), grid, kThreads, 0, stream, slopes, cosines, of, parts, tasks);
}

}  // namespace metafast::cuda
