// What the registration of a family needs beside its kernels: torch's current stream, a device guard, the key.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/device.cuh"

#if defined(__CUDACC__)

// Lives in libtorch_cuda only: weak, so that the same library also loads in a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

#define METAFAST_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(metafast, CUDA, m)

namespace metafast::cuda {

inline Stream current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}

inline torch::stable::accelerator::DeviceGuard device_guard(const torch::stable::Tensor& tensor) {
  return torch::stable::accelerator::DeviceGuard(tensor.get_device_index());
}

inline bool on_device(const torch::stable::Tensor& tensor) { return tensor.is_cuda(); }

}  // namespace metafast::cuda

#else

// Emulated: a namespace of its own, whose operators take CPU tensors.
#define METAFAST_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(metafast_simt, CPU, m)

namespace metafast::cuda {

struct NoGuard {
  ~NoGuard() {}
};

inline Stream current_stream(const torch::stable::Tensor&) { return {}; }
inline NoGuard device_guard(const torch::stable::Tensor&) { return {}; }
inline bool on_device(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }

}  // namespace metafast::cuda

#endif
