// Class numbers as kernels see them. They are read by the kernels alone: a bad one is no error, it makes results NaN.
#pragma once

#include <cmath>

#include "cuda/reduce.cuh"

namespace metafast::cuda {

template <class A>
__device__ __forceinline__ A not_a_number() {
  return A(NAN);
}

// Labels [T, rows] and how many rows there are.
struct Labels {
  const int64_t* data;
  int64_t rows;

  __device__ __forceinline__ const int64_t* of(int64_t t) const { return data + t * rows; }
};

// Whether a thread of the block sees a label outside 0..C-1.
__device__ __forceinline__ bool sees_bad_label(const Labels& labels, int64_t t, int64_t num_classes) {
  bool bad = false;
  for (int64_t i = threadIdx.x; i < labels.rows; i += kThreads) {
    const int64_t label = labels.of(t)[i];
    bad |= label < 0 || label >= num_classes;
  }
  return bad;
}

}  // namespace metafast::cuda
