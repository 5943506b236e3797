// Inner products and combinations of rows on a GPU: matrix products one side of which has few rows.
#pragma once

#include "cuda/distance.cuh"
#include "math/matrix.h"

namespace metafast::cuda {

// What distance_sums_kernel adds up for inner products.
struct InnerProduct : Dot {
  static constexpr bool kRows = false;
  static constexpr bool kSlopeOfSum = false;
  template <class A>
  static METAFAST_HOST_DEVICE A value(Pair<A> pair) {
    return pair.sum;
  }
};

// A number for each row of each task; strides of 0 share it.
template <class A>
struct Scale {
  const A* data;  // null: the constant
  int64_t task_stride;
  int64_t row_stride;
  A constant;

  __device__ __forceinline__ A at(int64_t t, int64_t row = 0) const {
    return data == nullptr ? constant : data[t * task_stride + row * row_stride];
  }
};

template <class A>
constexpr Scale<A> fixed_scale(A constant) {
  return {nullptr, 0, 0, constant};
}

// Inner products [T, n, m], each in parts of some features.
template <class A>
struct Products {
  const A* parts;  // [chunks, T, n, m]
  int64_t chunks;
  int64_t tasks;
  int64_t n;
  int64_t m;

  __device__ __forceinline__ A at(int64_t t, int64_t i, int64_t j) const {
    A sum = A(0);
    const A* part = parts + (t * n + i) * m + j;
    for (int64_t chunk = 0; chunk < chunks; ++chunk, part += tasks * n * m) sum += *part;
    return sum;
  }
};

// out [T, n, m] = scale_t products + offset_t + bias_tj; bias may be null. A thread an element.
template <class A>
__global__ void __launch_bounds__(kThreads)
    finish_products_kernel(Products<A> products, Scale<A> scale, Scale<A> offset, const A* __restrict__ bias,
                           int64_t bias_stride, A* __restrict__ out) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t n = products.n, m = products.m;
  if (element >= products.tasks * n * m) return;
  const int64_t t = element / m / n, j = element % m;
  A value = scale.at(t) * products.at(t, element / m % n, j) + offset.at(t);
  if (bias != nullptr) value += bias[t * bias_stride + j];
  out[element] = value;
}

// The terms sum_j c(t, i, j) rows_tj, j < count, of row i.
template <class A>
struct Combined {
  const A* coefficients;
  int64_t task_stride;
  int64_t row_stride;
  int64_t stride;
  WideRows<const A> rows;
  int64_t count;
};

template <class A, int N>
struct Combination {
  Combined<A> terms[N];
  Scale<A> gain;
  WideRows<const A> base;  // null: none
  Scale<A> scale;
};

constexpr int kCombinedRows = 2;    // of a warp
constexpr int kCombinedTerms = 16;  // in shared memory at a time

// out_i = scale_ti base_i + gain_ti times the terms; out may be base. A block: kWarps kCombinedRows rows, one slab.
template <class A, int N>
__global__ void __launch_bounds__(kThreads, 2)
    combine_rows_kernel(Combination<A, N> combination, WideRows<A> out, int64_t rows, int64_t d, int64_t row_blocks,
                        int64_t slabs) {
  constexpr int kRows = kWarps * kCombinedRows;
  METAFAST_SHARED(Features<A>, tile, [kCombinedTerms][kWarp]);
  METAFAST_SHARED(A, coefficients, [kRows][kCombinedTerms]);
  BlockNumber block;
  const int64_t k = block.part(slabs) * kSlab<A> + lane_index() * kVector<A>;
  const int64_t block_row = block.part(row_blocks) * kRows;
  const int64_t t = block.rest();
  Features<A> result[kCombinedRows] = {};
#pragma unroll
  for (int s = 0; s < N; ++s) {
    const Combined<A>& term = combination.terms[s];
    for (int64_t first = 0; first < term.count; first += kCombinedTerms) {
      __syncthreads();
      for (int c = warp_index(); c < kCombinedTerms && first + c < term.count; c += kWarps) {
        tile[c][lane_index()] = load_features(term.rows.row(t, first + c), term.rows.wide, k, d);
      }
      for (int p = static_cast<int>(threadIdx.x); p < kRows * kCombinedTerms; p += kThreads) {
        const int64_t i = block_row + p / kCombinedTerms, j = first + p % kCombinedTerms;
        if (i >= rows || j >= term.count) continue;
        coefficients[p / kCombinedTerms][p % kCombinedTerms] =
            term.coefficients[t * term.task_stride + i * term.row_stride + j * term.stride];
      }
      __syncthreads();
      // Summed by tiles, which bounds the rounding error of long sums.
      Features<A> part[kCombinedRows] = {};
      for (int c = 0; c < kCombinedTerms && first + c < term.count; ++c) {
        const Features<A> row = tile[c][lane_index()];
#pragma unroll
        for (int r = 0; r < kCombinedRows; ++r) {
          const int own = warp_index() * kCombinedRows + r;
          if (block_row + own >= rows) continue;
          const A coefficient = coefficients[own][c];
#pragma unroll
          for (int v = 0; v < kVector<A>; ++v) part[r].values[v] += coefficient * row.values[v];
        }
      }
#pragma unroll
      for (int r = 0; r < kCombinedRows; ++r) {
#pragma unroll
        for (int v = 0; v < kVector<A>; ++v) result[r].values[v] += part[r].values[v];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kCombinedRows; ++r) {
    const int64_t i = block_row + warp_index() * kCombinedRows + r;
    if (i >= rows) continue;
    const A gain = combination.gain.at(t, i);
#pragma unroll
    for (int v = 0; v < kVector<A>; ++v) result[r].values[v] *= gain;
    if (combination.base.data != nullptr) {
      const Features<A> from = load_features(combination.base.row(t, i), combination.base.wide, k, d);
      const A scale = combination.scale.at(t, i);
#pragma unroll
      for (int v = 0; v < kVector<A>; ++v) result[r].values[v] += scale * from.values[v];
    }
    store_features(out.row(t, i), out.wide, k, d, result[r]);
  }
}

template <class A>
void launch_finish_products(const Products<A>& products, Scale<A> scale, Scale<A> offset, const A* bias,
                            int64_t bias_stride, A* out, Stream stream) {
  const unsigned grid = grid_size(ceil_div(products.tasks * products.n * products.m, kThreads));
  if (grid == 0) return;
  METAFAST_LAUNCH((finish_products_kernel<A>), grid, kThreads, 0, stream, products, scale, offset, bias, bias_stride,
                  out);
}

template <class A, int N>
void launch_combine_rows(const Combination<A, N>& combination, WideRows<A> out, int64_t tasks, int64_t rows, int64_t d,
                         Stream stream) {
  const int64_t row_blocks = ceil_div(rows, kWarps * kCombinedRows), slabs = slabs_of<A>(d);
  const unsigned grid = grid_size(tasks * row_blocks * slabs);
  if (grid == 0) return;
  METAFAST_LAUNCH((combine_rows_kernel<A, N>), grid, kThreads, 0, stream, combination, out, rows, d, row_blocks, slabs);
}

// Several families launch these; the kernels are compiled once, with rows.cu.
#define METAFAST_ROW_LAUNCHERS(prefix, A)                                                                             \
  prefix template void launch_distance_sums<A, InnerProduct>(WideRows<const A>, WideRows<const A>, A*, A*, int64_t,   \
                                                             int64_t, int64_t, int64_t, const DistancePlan&, Stream); \
  prefix template void launch_finish_products<A>(const Products<A>&, Scale<A>, Scale<A>, const A*, int64_t, A*,       \
                                                 Stream);                                                             \
  prefix template void launch_combine_rows<A, 1>(const Combination<A, 1>&, WideRows<A>, int64_t, int64_t, int64_t,    \
                                                 Stream);                                                             \
  prefix template void launch_combine_rows<A, 2>(const Combination<A, 2>&, WideRows<A>, int64_t, int64_t, int64_t,    \
                                                 Stream);                                                             \
  prefix template void launch_combine_rows<A, 3>(const Combination<A, 3>&, WideRows<A>, int64_t, int64_t, int64_t,    \
                                                 Stream);

METAFAST_ROW_LAUNCHERS(extern, float)
METAFAST_ROW_LAUNCHERS(extern, double)

}  // namespace metafast::cuda
