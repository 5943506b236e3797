// Products of rows and numbers of groups of tasks, in torch's memory.
#pragma once

#include "cuda/groups.cuh"
#include "cuda/rows.cuh"
#include "cuda/tensors.cuh"

namespace metafast::cuda {

// The inner products [T, n, m] of the rows of x [T, n, d] and of y.
template <class A>
class RowProducts {
 public:
  RowProducts(const Tensor& x, WideRows<const A> y, int64_t tasks, int64_t n, int64_t m, int64_t d, Stream stream)
      : plan_(distance_plan<A>(tasks, n, m, d)),
        parts_(x, plan_.chunks * tasks * n * m),
        products_{parts_.data(), plan_.chunks, tasks, n, m} {
    launch_distance_sums<A, InnerProduct>(input_wide<A>(x), y, parts_.data(), nullptr, tasks, n, m, d, plan_, stream);
  }

  const Products<A>& products() const { return products_; }

 private:
  DistancePlan plan_;
  Scratch<A> parts_;
  Products<A> products_;
};

// An argument [G, ...] with numbers for each group of tasks, as kernels read it task by task.
template <class A>
class Groups {
 public:
  Groups(const std::optional<Tensor>& any, int64_t tasks, Stream stream) {
    if (!any) return;
    tensor_ = dense(*any);
    const int64_t groups = tensor_->size(0), size = groups > 0 ? tensor_->numel() / groups : 0;
    data_ = tensor_->template const_data_ptr<A>();
    task_stride_ = groups == 1 ? 0 : size;
    if (groups <= 1 || groups == tasks) return;
    spread_.emplace(*tensor_, tasks * size);
    launch_spread_groups<A>(data_, spread_->data(), groups, tasks / groups, size, stream);
    data_ = spread_->data();
  }

  const A* data() const { return data_; }  // null: no such argument
  int64_t task_stride() const { return task_stride_; }

 private:
  std::optional<Tensor> tensor_;
  std::optional<Scratch<A>> spread_;
  const A* data_ = nullptr;
  int64_t task_stride_ = 0;
};

// The gradient of such an argument: a part of each task, added up by groups in `out`.
template <class A>
class GroupSums {
 public:
  GroupSums(const Tensor& out, int64_t tasks)
      : out_(out),
        tasks_(tasks),
        groups_(out.size(0)),
        size_(groups_ > 0 ? out.numel() / groups_ : 0),
        own_(out, groups_ == tasks ? 0 : tasks * size_) {}

  // Null where there is no such argument.
  A* parts() const { return groups_ == tasks_ ? out_.template mutable_data_ptr<A>() : own_.data(); }

  void finish(Stream stream) const {
    if (groups_ == tasks_ || groups_ == 0) return;
    launch_sum_parts<A>(own_.data(), {{out_.template mutable_data_ptr<A>()}, {size_}}, tasks_, groups_, size_, stream);
  }

 private:
  Tensor out_;
  int64_t tasks_, groups_, size_;
  Scratch<A> own_;
};

// A number for each task, or one for all.
template <class A>
Scale<A> per_task(const std::optional<Tensor>& any, double number) {
  if (!any) return fixed_scale(static_cast<A>(number));
  return {any->const_data_ptr<A>(), any->stride(0), 0, A(0)};
}

}  // namespace metafast::cuda
