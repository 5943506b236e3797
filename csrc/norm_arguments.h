// Checks of the arguments of norm_relu_pool and its derivatives, and the order in memory of its images, on every device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <utility>

#include "check.h"
#include "tensor.h"

namespace metafast {

// What all operators of normalisation and pooling are given.
inline void check_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& mean,
                       const std::optional<Tensor>& var, bool pool) {
  check_dim(x, "x", 5, "[T, n, C, H, W]");
  const bool half = x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half;
  const auto check = [&](const Tensor& tensor, const char* name) {
    if (tensor.device() != x.device()) fail(name, ": expected the device of x");
    check_dtype(tensor, name, half ? ScalarType::Float : x.scalar_type());
    check_shape(tensor, name, {x.size(0), x.size(2)});
  };
  check(weight, "weight");
  check(bias, "bias");
  if (mean.has_value() != var.has_value()) fail("mean: expected with var, and var with mean");
  if (mean) check(*mean, "mean"), check(*var, "var");
  if (pool && (x.size(3) < 2 || x.size(4) < 2)) fail("x: expected at least 2 x 2 pixels, got shape ", shape_text(x));
  if (!mean && x.size(1) * x.size(3) * x.size(4) == 0) fail("x: expected pixels, got shape ", shape_text(x));
}

// The gradients that its derivatives are given, and the choice of pixels saved for them.
inline void check_norm_upstream(const Tensor& grad, const std::optional<Tensor>& grad_mean,
                                const std::optional<Tensor>& grad_var, const Tensor& x, const Tensor& weight,
                                const Tensor& choice, bool pool) {
  const int64_t T = x.size(0), n = x.size(1), C = x.size(2), by = pool ? 2 : 1;
  check_like(grad, "grad", x, "x");
  check_shape(grad, "grad", {T, n, C, x.size(3) / by, x.size(4) / by});
  for (const auto& [value, name] : {std::pair{&grad_mean, "grad_mean"}, std::pair{&grad_var, "grad_var"}}) {
    if (!*value) continue;
    check_like(**value, name, weight, "weight");
    check_shape(**value, name, {T, C});
  }
  if (choice.device() != x.device()) fail("choice: expected the device of x");
  check_dtype(choice, "choice", ScalarType::Byte);
  if (pool) check_shape(choice, "choice", {T, n, C, x.size(3) / 2, x.size(4) / 2});
}

// The directions that the second derivative is given.
inline void check_norm_directions(const Tensor& u_x, const Tensor& u_weight, const Tensor& u_bias,
                                  const std::optional<Tensor>& u_mean, const std::optional<Tensor>& u_var,
                                  const Tensor& x, const Tensor& weight, bool given) {
  check_like(u_x, "u_x", x, "x");
  check_shape(u_x, "u_x", {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)});
  const auto check = [&](const Tensor& tensor, const char* name) {
    check_like(tensor, name, weight, "weight");
    check_shape(tensor, name, {x.size(0), x.size(2)});
  };
  check(u_weight, "u_weight");
  check(u_bias, "u_bias");
  if (u_mean.has_value() != given || u_var.has_value() != given)
    fail("u_mean, u_var: expected where statistics are given");
  if (given) check(*u_mean, "u_mean"), check(*u_var, "u_var");
}

// Images [T, n, C, H, W] with the channels last or in this order in memory, as x has them: so all others are read and
// written.
struct NormLayout {
  bool last, pool;
  int64_t tasks, images, channels, height, width;

  NormLayout(const Tensor& x, bool pool_)
      // Maps of one pixel lie in both orders: with the channels last the vectors are full.
      : last(x.size(2) > 1 && x.stride(2) == 1 && (!x.is_contiguous() || x.size(3) * x.size(4) == 1)),
        pool(pool_),
        tasks(x.size(0)),
        images(x.size(1)),
        channels(x.size(2)),
        height(x.size(3)),
        width(x.size(4)) {}

  int64_t pixels() const { return images * height * width; }
  int64_t pooled_height() const { return pool ? height / 2 : height; }
  int64_t pooled_width() const { return pool ? width / 2 : width; }

  Tensor arranged(const Tensor& tensor) const {
    return dense(last ? torch::stable::transpose(torch::stable::transpose(tensor, 2, 3), 3, 4) : tensor);
  }
  Tensor like_x(const Tensor& like) const { return allocate(like, height, width, std::nullopt); }
  Tensor like_y(const Tensor& like, std::optional<ScalarType> dtype = std::nullopt) const {
    return allocate(like, pooled_height(), pooled_width(), dtype);
  }
  // What was allocated, as [T, n, C, rows, columns].
  Tensor restored(const Tensor& tensor) const {
    return last ? torch::stable::transpose(torch::stable::transpose(tensor, 3, 4), 2, 3) : tensor;
  }

 private:
  Tensor allocate(const Tensor& like, int64_t rows, int64_t columns, std::optional<ScalarType> dtype) const {
    if (last) return torch::stable::new_empty(like, {tasks, images, rows, columns, channels}, dtype);
    return torch::stable::new_empty(like, {tasks, images, channels, rows, columns}, dtype);
  }
};

}  // namespace metafast
