// Matrix products of one block, of which the inner loop of a task is made. Operands may lie in shared or global memory;
// every element is summed in the same order whatever the block.
#pragma once

#include "cuda/reduce.cuh"
#include "math/matrix.h"

namespace metafast::cuda {

// The terms sum_k a(i, k) b(k, j), k < count, of element (i, j).
template <class A>
struct Factors {
  Matrix<A> a;
  Matrix<A> b;
  int64_t count;
};

// The elements of a matrix, row after row, that one of `workers` workers visits.
struct Walk {
  int64_t i, j;

  // 32 bits divide fast, and suffice: a row that all workers do not fill is as good as any longer one.
  __device__ __forceinline__ Walk(unsigned worker, unsigned workers, int64_t columns) : columns_(columns) {
    const unsigned divisor = columns <= workers ? static_cast<unsigned>(columns) : workers + 1;
    i = worker / divisor, j = worker % divisor;
    row_step_ = workers / divisor, column_step_ = workers % divisor;
  }
  __device__ __forceinline__ void next() {
    i += row_step_;
    j += column_step_;
    if (j >= columns_) j -= columns_, ++i;
  }

 private:
  int64_t columns_;
  unsigned row_step_, column_step_;
};

// visit(i, j) for the elements of a matrix, those of a row side by side in the block's threads.
template <class Visit>
__device__ __forceinline__ void for_each_element(int64_t rows, int64_t columns, const Visit& visit) {
  if (columns == 0) return;
  for (Walk at(threadIdx.x, kThreads, columns); at.i < rows; at.next()) visit(at.i, at.j);
}

// Where a block keeps what it works on: in dynamic shared memory, or at its part of `global` if that is given.
template <class A>
__device__ __forceinline__ A* working_memory(A* global, int64_t size) {
  METAFAST_DYNAMIC_SHARED(A, shared);
  return global == nullptr ? shared : global + blockIdx.x * size;
}

// How many neighbouring lanes share a sum of `count` terms, where there are more threads than tiles; its logarithm.
__device__ __forceinline__ int lanes_of_sum(int64_t tiles, int64_t count) {
  int shift = 0;
  while ((1 << shift) < kWarp && tiles << (shift + 1) <= kThreads && count >> (shift + 3) > 0) ++shift;
  return shift;
}

// finish(i, j, sum of the terms) for a matrix, in tiles of 2 x 2 elements that lie half a matrix apart, so that lanes read
// side by side. Long sums are made in parts, which keeps their rounding small.
template <int N, class A, class Finish>
__device__ __forceinline__ void block_product(const Factors<A> (&terms)[N], int64_t rows, int64_t columns,
                                              const Finish& finish) {
  constexpr int64_t kPart = 256;
  const int64_t half_rows = (rows + 1) / 2, half_columns = (columns + 1) / 2, tiles = half_rows * half_columns;
  if (tiles == 0) return;
  int64_t longest = 0;
#pragma unroll
  for (int s = 0; s < N; ++s) longest = terms[s].count > longest ? terms[s].count : longest;
  const int shift = lanes_of_sum(tiles, longest);
  const unsigned lanes = 1u << shift, workers = kThreads >> shift, lane = threadIdx.x & (lanes - 1);
  Walk at(threadIdx.x >> shift, workers, half_columns);
  // All lanes stay for the sums over lanes.
  for (int64_t first = 0; first < tiles; first += workers, at.next()) {
    A totals[2][2] = {};
    const bool second_row = at.i + half_rows < rows, second_column = at.j + half_columns < columns;
    if (at.i < half_rows) {
#pragma unroll
      for (int s = 0; s < N; ++s) {
        const Matrix<A>&a = terms[s].a, &b = terms[s].b;
        const A* const a0 = a.data + at.i * a.row;
        const A* const a1 = second_row ? a0 + half_rows * a.row : a0;
        const A* const b0 = b.data + at.j * b.column;
        const A* const b1 = second_column ? b0 + half_columns * b.column : b0;
        const int64_t share = (terms[s].count + lanes - 1) >> shift;
        const int64_t all = (lane + 1) * share < terms[s].count ? (lane + 1) * share : terms[s].count;
        for (int64_t begin = lane * share; begin < all; begin += kPart) {
          const int64_t end = begin + kPart < all ? begin + kPart : all;
          A sums[2][2] = {};
#pragma unroll 4
          for (int64_t k = begin; k < end; ++k) {
            const A upper = a0[k * a.column], lower = a1[k * a.column];
            const A left = b0[k * b.row], right = b1[k * b.row];
            sums[0][0] = std::fma(upper, left, sums[0][0]);
            sums[0][1] = std::fma(upper, right, sums[0][1]);
            sums[1][0] = std::fma(lower, left, sums[1][0]);
            sums[1][1] = std::fma(lower, right, sums[1][1]);
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) totals[e / 2][e % 2] += sums[e / 2][e % 2];
        }
      }
    }
    for (unsigned offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int e = 0; e < 4; ++e) totals[e / 2][e % 2] += __shfl_xor_sync(kAllLanes, totals[e / 2][e % 2], offset);
    }
    if (at.i >= half_rows) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t i = at.i + e / 2 * half_rows, j = at.j + e % 2 * half_columns;
      if (i < rows && j < columns && lane == (e & (lanes - 1))) finish(i, j, totals[e / 2][e % 2]);
    }
  }
}

// The same by a warp an element, for long sums over k that lies side by side in a and b. One lane calls finish.
template <class A, class Finish>
__device__ __forceinline__ void warp_products(const Factors<A>& term, int64_t rows, int64_t columns,
                                              const Finish& finish) {
  for (int64_t element = warp_index(); element < rows * columns; element += kWarps) {
    const int64_t i = element / columns, j = element % columns;
    A sum = A(0);
    for (int64_t k = lane_index(); k < term.count; k += kWarp) sum = std::fma(term.a.at(i, k), term.b.at(k, j), sum);
    sum = warp_sum(sum);
    if (lane_index() == 0) finish(i, j, sum);
  }
}

}  // namespace metafast::cuda
