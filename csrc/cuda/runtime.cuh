// What every launch needs: torch's current stream, a device guard and a check of the launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

// These live in libtorch_cuda only: weak, so that the same library also loads in a CPU-only torch.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
__attribute__((weak)) AOTITorchError torch_c10_cuda_check_msg(int32_t err, const char* filename,
                                                              const char* function_name, uint32_t line_number,
                                                              bool include_device_assertions, char** error_msg);
__attribute__((weak)) void torch_c10_cuda_free_error_msg(char* error_msg);
}

namespace metafast::cuda {

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline torch::stable::accelerator::DeviceGuard device_guard(const torch::stable::Tensor& tensor) {
  return torch::stable::accelerator::DeviceGuard(tensor.get_device_index());
}

// Right after every launch.
inline void check_launch() { STD_CUDA_KERNEL_LAUNCH_CHECK(); }

}  // namespace metafast::cuda
