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

// visit(i, j) for the elements of a matrix, those of a row side by side in the block's threads.
template <class Visit>
__device__ __forceinline__ void for_each_element(int64_t rows, int64_t columns, const Visit& visit) {
  if (columns == 0) return;
  const int64_t row_step = kThreads / columns, column_step = kThreads % columns;
  int64_t i = threadIdx.x / columns, j = threadIdx.x % columns;
  while (i < rows) {
    visit(i, j);
    i += row_step;
    j += column_step;
    if (j >= columns) j -= columns, ++i;
  }
}

// Where a block keeps what it works on: in dynamic shared memory, or at its part of `global` if that is given.
template <class A>
__device__ __forceinline__ A* working_memory(A* global, int64_t size) {
  METAFAST_DYNAMIC_SHARED(A, shared);
  return global == nullptr ? shared : global + blockIdx.x * size;
}

// finish(i, j, sum of the terms), a thread an element: reads of b are side by side where its column stride is 1. Long
// sums are made in parts, which keeps their rounding small.
template <int N, class A, class Finish>
__device__ __forceinline__ void block_product(const Factors<A> (&terms)[N], int64_t rows, int64_t columns,
                                              const Finish& finish) {
  constexpr int64_t kPart = 256;
  for_each_element(rows, columns, [&](int64_t i, int64_t j) {
    A total = A(0);
#pragma unroll
    for (int s = 0; s < N; ++s) {
      const A *a = terms[s].a.data + i * terms[s].a.row, *b = terms[s].b.data + j * terms[s].b.column;
      for (int64_t first = 0; first < terms[s].count; first += kPart) {
        const int64_t end = first + kPart < terms[s].count ? first + kPart : terms[s].count;
        A sum = A(0);
        for (int64_t k = first; k < end; ++k) {
          sum = std::fma(*a, *b, sum);
          a += terms[s].a.column;
          b += terms[s].b.row;
        }
        total += sum;
      }
    }
    finish(i, j, total);
  });
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
