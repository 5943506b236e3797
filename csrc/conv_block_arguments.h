// Checks of the first convolutional block's arguments that hold on every device.
#pragma once

#include "arguments.h"

namespace metafast {

// Images of the first convolutional block.
inline void check_conv_images(const Tensor& x) { check_dim(x, "x", 5, "[T, n, planes, H, W]"); }

inline void check_conv_pool(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_conv_images(x);
  check_dim(weight, "weight", 3, "[G, C, 9 planes]");
  check_groups(weight, "weight", x.size(0));
  check_shape(weight, "weight", {weight.size(0), weight.size(1), 9 * x.size(2)});
  check_shape(bias, "bias", {weight.size(0), weight.size(1)});
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  for (const Tensor* tensor : {&weight, &bias}) {
    if (tensor->device() != x.device()) fail("weight: expected the device of x");
    check_dtype(*tensor, "weight", wide);
  }
}

inline void check_conv_choice(const Tensor& choice, const Tensor& x, int64_t channels) {
  if (choice.device() != x.device()) fail("choice: expected the device of x");
  check_dtype(choice, "choice", ScalarType::Byte);
  check_shape(choice, "choice", {x.size(0), x.size(1), x.size(3) / 2, x.size(4) / 2, channels});
}

inline void check_conv_grad(const Tensor& grad, const Tensor& choice, const Tensor& x) {
  check_conv_images(x);
  check_dim(grad, "grad", 5, "[T, n, H / 2, W / 2, C]");
  check_like(grad, "grad", x, "x");
  check_shape(grad, "grad", {x.size(0), x.size(1), x.size(3) / 2, x.size(4) / 2, grad.size(4)});
  check_conv_choice(choice, x, grad.size(4));
}

}  // namespace metafast
