// What the registrations of all families do with their tensors.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "check.h"
#include "cuda/features.cuh"
#include "cuda/labels.cuh"
#include "cuda/runtime.cuh"
#include "dispatch.h"
#include "tensor.h"

namespace metafast::cuda {

inline void check_device(const Tensor& tensor, const char* name) {
  if (!on_device(tensor)) fail(name, ": expected a tensor on a CUDA device");
}

template <class S>
WideRows<const S> input_wide(const Tensor& tensor) {
  return wide_rows(input_rows<S>(tensor));
}
template <class S>
WideRows<S> output_wide(const Tensor& tensor) {
  return wide_rows(output_rows<S>(tensor));
}

// Contiguous labels, and how kernels see them.
struct TaskLabels {
  Tensor tensor;

  explicit TaskLabels(const Tensor& any) : tensor(dense(any)) {}
  Labels view() const { return {tensor.const_data_ptr<int64_t>(), tensor.size(1)}; }
};

template <class A>
constexpr ScalarType scalar_type = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;

// Memory of torch's allocator for `count` numbers of type A, freed in the order of the stream; null for none.
template <class A>
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t count) {
    if (count == 0) return;
    tensor_ = torch::stable::new_empty(like, {count}, scalar_type<A>);
    data_ = tensor_->template mutable_data_ptr<A>();
  }
  A* data() const { return data_; }

 private:
  std::optional<Tensor> tensor_;
  A* data_ = nullptr;
};

// Working memory of `size` numbers for each block: shared where it fits what every GPU has, else of torch's allocator.
template <class A>
class WorkingMemory {
 public:
  WorkingMemory(const Tensor& like, int64_t blocks, int64_t size)
      : fits_(size * static_cast<int64_t>(sizeof(A)) <= kSharedBytes),
        shared_bytes_(fits_ ? static_cast<unsigned>(size * sizeof(A)) : 0),
        global_(like, fits_ ? 0 : blocks * size) {}

  unsigned shared_bytes() const { return shared_bytes_; }
  A* global() const { return global_.data(); }  // null where it is shared

 private:
  static constexpr int64_t kSharedBytes = 46 * 1024;  // 48 KiB without those of static arrays

  bool fits_;
  unsigned shared_bytes_;
  Scratch<A> global_;
};

}  // namespace metafast::cuda
