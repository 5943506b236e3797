// Rows of features as kernels read and write them: a lane moves 16 bytes, and a warp one slab of a row.
#pragma once

#include <stdexcept>

#include "cuda/reduce.cuh"
#include "math/accumulate.h"
#include "math/rows.h"

namespace metafast::cuda {

template <class S>
constexpr int kVector = 16 / static_cast<int>(sizeof(S));
template <class S>
constexpr int kSlab = kWarp * kVector<S>;  // features that a warp holds at once

// Rows that can be read 16 bytes at a time, if `wide`.
template <class S>
struct WideRows : Rows<S> {
  bool wide;
};

template <class S>
WideRows<S> wide_rows(Rows<S> rows) {
  const auto aligned = [](int64_t bytes) { return bytes % 16 == 0; };
  const int64_t size = sizeof(S);
  return {rows, aligned(static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows.data))) &&
                    aligned(rows.batch_stride * size) && aligned(rows.row_stride * size)};
}

template <class S>
struct alignas(16) Packed {
  S values[kVector<S>];
};

// A lane's part of a slab, as it is computed with.
template <class S>
struct alignas(16) Features {
  accumulate_t<S> values[kVector<S>];
};

// The features k, k + 1, ... of a row of d; zeros behind its end.
template <class S>
__device__ __forceinline__ Features<S> load_features(const S* row, bool wide, int64_t k, int64_t d) {
  Features<S> features;
  if (wide && k + kVector<S> <= d) {
    const Packed<S> packed = *reinterpret_cast<const Packed<S>*>(row + k);
#pragma unroll
    for (int v = 0; v < kVector<S>; ++v) features.values[v] = static_cast<accumulate_t<S>>(packed.values[v]);
  } else {
#pragma unroll
    for (int v = 0; v < kVector<S>; ++v) {
      features.values[v] = k + v < d ? static_cast<accumulate_t<S>>(row[k + v]) : accumulate_t<S>(0);
    }
  }
  return features;
}

template <class S>
__device__ __forceinline__ void store_features(S* row, bool wide, int64_t k, int64_t d, const Features<S>& features) {
  if (wide && k + kVector<S> <= d) {
    Packed<S> packed;
#pragma unroll
    for (int v = 0; v < kVector<S>; ++v) packed.values[v] = static_cast<S>(features.values[v]);
    *reinterpret_cast<Packed<S>*>(row + k) = packed;
  } else {
#pragma unroll
    for (int v = 0; v < kVector<S>; ++v) {
      if (k + v < d) row[k + v] = static_cast<S>(features.values[v]);
    }
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// At least one, so that rows without features have their blocks too.
template <class S>
int64_t slabs_of(int64_t d) {
  return d > 0 ? ceil_div(d, kSlab<S>) : 1;
}

// Blocks are numbered in one dimension, the only one with room for many tasks.
inline unsigned grid_size(int64_t blocks) {
  if (blocks > INT32_MAX) throw std::runtime_error("metafast: too many tasks and rows for one call");
  return static_cast<unsigned>(blocks);
}

// The block's number, taken apart from its fastest part on; 32 bits suffice and divide fast.
class BlockNumber {
 public:
  __device__ __forceinline__ int64_t part(int64_t count) {
    const unsigned number = rest_ % static_cast<unsigned>(count);
    rest_ /= static_cast<unsigned>(count);
    return number;
  }
  __device__ __forceinline__ int64_t rest() const { return rest_; }

 private:
  unsigned rest_ = blockIdx.x;
};

}  // namespace metafast::cuda
