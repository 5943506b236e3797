// Functions that a CPU kernel and a CUDA kernel share.
#pragma once

#if defined(__CUDACC__)
#define METAFAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define METAFAST_HOST_DEVICE inline __attribute__((always_inline))
#endif
