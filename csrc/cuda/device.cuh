// The one header that kernels include: plain CUDA under nvcc, the emulator of tests/simt under a C++ compiler.
// The names that hide a difference between the two begin with METAFAST_ or live in metafast::cuda.
#pragma once

#include <cstdint>

#include "math/host_device.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// A static shared array: METAFAST_SHARED(float, tile, [16][17]);
#define METAFAST_SHARED(T, name, dims) __shared__ T name dims

// The block's dynamic shared memory as an array of T; one symbol for all types, since templates share it.
#define METAFAST_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char metafast_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(metafast_dynamic_shared)

// METAFAST_LAUNCH((kernel<T, 256>), grid, block, shared_bytes, stream, arguments...);
#define METAFAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)   \
  do {                                                                    \
    (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__); \
    ::metafast::cuda::check_launch(cudaGetLastError(), #kernel);          \
  } while (false)

namespace metafast::cuda {

using Stream = cudaStream_t;

inline void check_launch(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

// Bytes from global to shared memory that arrive at the wait for their group; both addresses multiples of kBytes.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async can move");
#if __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes) : "memory");
#else
  for (int k = 0; k < kBytes / 4; ++k) static_cast<int*>(shared)[k] = static_cast<const int*>(global)[k];
#endif
}

__device__ __forceinline__ void commit_async() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kGroups of this thread's groups are under way.
template <int kGroups>
__device__ __forceinline__ void wait_async() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

}  // namespace metafast::cuda

#else

#include "simt.h"

#define METAFAST_SHARED(T, name, dims) \
  using name##_array = T dims;         \
  static const char name##_key = 0;    \
  name##_array& name = *static_cast<name##_array*>(::simt::shared_array(&name##_key, sizeof(name##_array)))

#define METAFAST_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::simt::dynamic_shared())

#define METAFAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::simt::launch(#kernel, (kernel), (grid), (block), (shared_bytes), (stream), __VA_ARGS__)

namespace metafast::cuda {

using Stream = ::simt::Stream;

template <int kBytes>
METAFAST_HOST_DEVICE void copy_async(void* shared, const void* global, ::simt::Location at = ::simt::Location::here()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async can move");
  ::simt::copy_async(shared, global, kBytes, at);
}
inline void commit_async() { ::simt::commit_async(); }
template <int kGroups>
void wait_async() {
  ::simt::wait_async(kGroups);
}

}  // namespace metafast::cuda

#endif
