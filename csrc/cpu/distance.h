// What the families built on distances share on the CPU.
#pragma once

#include <initializer_list>
#include <memory>
#include <optional>

#include "check.h"
#include "cpu/large_pages.h"
#include "cpu/parallel.h"
#include "dispatch.h"
#include "math/distance.h"
#include "tensor.h"

namespace metafast {

// A tensor of the dtype and device of `like`, not initialized. torch::stable::new_empty looks its operator up by name.
inline Tensor empty(const Tensor& like, const int64_t* sizes, int64_t dim) {
  AtenTensorHandle out;
  // The name of torch's macro for this check changed after 2.11.
  if (aoti_torch_aten_new_empty(like.get(), sizes, dim, nullptr, nullptr, nullptr, 0, nullptr, &out) !=
      AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("torch could not allocate a result; its message stands on stderr");
  }
  return on_large_pages(Tensor(out));
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty(like, sizes.begin(), static_cast<int64_t>(sizes.size()));
}

// Working memory from the start of a cache line on: a vector that crosses one costs twice.
template <class A>
class Scratch {
  static constexpr size_t kLine = 64;
  std::unique_ptr<A[]> memory_;

 public:
  explicit Scratch(int64_t size) : memory_(new A[size + kLine / sizeof(A)]) {}
  A* get() const {
    return reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(memory_.get()) + kLine - 1) / kLine * kLine);
  }
};

// Numbers for each row of each task.
template <class A>
struct PerRow {
  Scratch<A> values;
  int64_t rows;

  PerRow(int64_t tasks, int64_t rows_) : values(tasks * rows_), rows(rows_) {}
  A* of(int64_t t) const { return values.get() + t * rows; }
};

// A number for each task, or one for all.
template <class A>
struct PerTask {
  std::optional<Tensor> tensor;
  const A* values;
  A fixed;

  PerTask(const std::optional<Tensor>& any, double number)
      : tensor(any ? std::optional<Tensor>(dense(*any)) : std::nullopt),
        values(tensor ? tensor->template const_data_ptr<A>() : nullptr),
        fixed(static_cast<A>(number)) {}

  A operator[](int64_t t) const { return values ? values[t] : fixed; }
};

// The squared norm of every row, where a metric needs them: made by a stage of the tasks' work.
template <class M, class S>
struct Squares : PerRow<accumulate_t<S>> {
  using Kernel = void(Rows<const S>, int64_t, int64_t, int64_t, accumulate_t<S>*);

  Squares(int64_t tasks, int64_t n) : PerRow<accumulate_t<S>>(M::kRows ? tasks : 0, M::kRows ? n : 0) {}

  auto stage(Rows<const S> x, int64_t n, int64_t d, Kernel* row_squares) const {
    return Stage{M::kRows ? 1 : 0, n * d,
                 [=, this_ = this](int64_t t, int64_t) { row_squares(x, t, n, d, this_->of(t)); }};
  }
};

}  // namespace metafast
