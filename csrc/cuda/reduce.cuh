// Reductions of a warp and of a block, always in the same order.
#pragma once

#include "cuda/device.cuh"

namespace metafast::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;  // of every block

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

// The sum over the warp, in every lane.
template <class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// The largest of the warp, in every lane; a NaN may be passed over.
template <class A>
__device__ __forceinline__ A warp_max(A value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

constexpr METAFAST_HOST_DEVICE int next_power_of_two(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Swaps half of what a lane holds for its partner's other half, `kOffset` lanes away, until one value is left.
template <int kHalf, int kOffset, class A>
__device__ __forceinline__ void fold(A* held) {
  if constexpr (kHalf > 0) {
    const bool upper = lane_index() & kOffset;
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      const A give = upper ? held[k] : held[k + kHalf];
      const A keep = upper ? held[k + kHalf] : held[k];
      held[k] = keep + __shfl_xor_sync(kAllLanes, give, kOffset);
    }
    fold<kHalf / 2, kOffset / 2>(held);
  } else if constexpr (kOffset > 0) {
    held[0] += __shfl_xor_sync(kAllLanes, held[0], kOffset);
    fold<0, kOffset / 2>(held);
  }
}

// Sums N values over the warp at once, with about N shuffles and the rounding of warp_sum, and returns the one that
// warp_sums_index<N>() names.
template <int N, class A>
__device__ __forceinline__ A warp_sums(const A (&values)[N]) {
  static_assert(N <= kWarp, "one value a lane");
  constexpr int kHeld = next_power_of_two(N);
  A held[kHeld];
#pragma unroll
  for (int k = 0; k < kHeld; ++k) held[k] = k < N ? values[k] : A(0);
  fold<kHeld / 2, kWarp / 2>(held);
  return held[0];
}

template <int N>
__device__ __forceinline__ int warp_sums_index() {
  return lane_index() / (kWarp / next_power_of_two(N));
}

// The sum over the block, valid in thread 0; shared memory may be used again after the next barrier.
template <class A>
__device__ __forceinline__ A block_sum(A value) {
  METAFAST_SHARED(A, sums, [kWarps]);
  value = warp_sum(value);
  if (lane_index() == 0) sums[warp_index()] = value;
  __syncthreads();
  A total = A(0);
  if (threadIdx.x == 0) {
    for (int w = 0; w < kWarps; ++w) total += sums[w];
  }
  return total;
}

}  // namespace metafast::cuda
