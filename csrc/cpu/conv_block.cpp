// The first convolutional block on the CPU: threads over images. Its convolution is cheaper to compute again than to store.
#include "math/conv_block.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "conv_block_arguments.h"
#include "cpu/distance.h"

#define METAFAST_KERNELS "cpu/conv_block_kernels.h"
#include "cpu/for_each_isa.h"

namespace metafast {
namespace {

// Images whose sums are one part: the parts are added in their order, whoever made them.
constexpr int64_t kTogether = 8;

BlockShape shape_of(const Tensor& x, int64_t channels) { return {x.size(2), x.size(3), x.size(4), channels}; }

// An image with a border of zeros.
template <class S, class A>
void with_border(const S* image, const BlockShape& shape, A* to) {
  const int64_t stride = shape.stride();
  for (int64_t plane = 0; plane < shape.planes; ++plane, to += shape.plane()) {
    std::fill_n(to, stride, A(0));
    for (int64_t i = 0; i < shape.height; ++i, image += shape.width) {
      A* row = to + (i + 1) * stride;
      row[0] = row[stride - 1] = A(0);
      for (int64_t j = 0; j < shape.width; ++j) row[1 + j] = static_cast<A>(image[j]);
    }
    std::fill_n(to + (shape.height + 1) * stride, stride, A(0));
  }
}

// Room for one, and for a vector that is read behind it.
template <class A>
Scratch<A> image_room(const BlockShape& shape) {
  constexpr int64_t kRoom = 16;
  Scratch<A> room(shape.planes * shape.plane() + kRoom);
  std::fill_n(room.get() + shape.planes * shape.plane(), kRoom, A(0));
  return room;
}

// Weights [G, C, patch] and biases [G, C] as [G, patch + 1, lanes], the last row the bias.
template <class A>
Scratch<A> by_lanes(const Tensor& weight_any, const Tensor& bias_any, const BlockShape& shape) {
  const Tensor weight = dense(weight_any), bias = dense(bias_any);
  const int64_t groups = weight.size(0), C = shape.channels, K = shape.patch(), lanes = shape.lanes();
  Scratch<A> packed(groups * (K + 1) * lanes);
  std::fill_n(packed.get(), groups * (K + 1) * lanes, A(0));
  const A *from = weight.template const_data_ptr<A>(), *biases = bias.template const_data_ptr<A>();
  for (int64_t g = 0; g < groups; ++g) {
    A* to = packed.get() + g * (K + 1) * lanes;
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t k = 0; k < K; ++k) to[k * lanes + c] = from[(g * C + c) * K + k];
      to[K * lanes + c] = biases[g * C + c];
    }
  }
  return packed;
}

// body(task, image of all, image with its border) for each image, shared by the threads.
template <class S, class Body>
void for_each_image(const Tensor& x, const BlockShape& shape, const Body& body) {
  using A = accumulate_t<S>;
  const int64_t n = x.size(1), pixels = shape.pixels();
  const S* from = x.template const_data_ptr<S>();
  parallel(x.size(0) * n, shape.rows() * shape.columns() * 4 * shape.patch() * shape.channels,
           [&](int64_t begin, int64_t end) {
             const Scratch<A> image = image_room<A>(shape);
             for (int64_t k = begin; k < end; ++k) {
               with_border(from + k * pixels, shape, image.get());
               body(k / n, k, image.get());
             }
           });
}

std::tuple<Tensor, Tensor> conv_pool(const Tensor& x_any, const Tensor& weight, const Tensor& bias) {
  check_cpu(x_any, "x");
  check_conv_pool(x_any, weight, bias);
  const Tensor x = dense(x_any);
  const BlockShape shape = shape_of(x, weight.size(1));
  const int64_t T = x.size(0), n = x.size(1), C = shape.channels, K = shape.patch(), lanes = shape.lanes();
  Tensor out = empty(x, {T, n, shape.rows(), shape.columns(), C});
  Tensor choice = torch::stable::new_empty(x, {T, n, shape.rows(), shape.columns(), C}, ScalarType::Byte);
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    using A = accumulate_t<S>;
    const Scratch<A> packed = by_lanes<A>(weight, bias, shape);
    auto* kernel = METAFAST_KERNEL(conv_pool_image<S>);
    S* to = out.template mutable_data_ptr<S>();
    uint8_t* kept = choice.template mutable_data_ptr<uint8_t>();
    const int64_t each = T / std::max<int64_t>(1, weight.size(0)), size = shape.results();
    for_each_image<S>(x, shape, [&](int64_t t, int64_t k, const A* image) {
      const A* own = packed.get() + t / each * (K + 1) * lanes;
      kernel(image, shape, own, own + K * lanes, to + k * size, kept + k * size);
    });
  });
  return {out, choice};
}

Tensor conv_pool_jvp(const Tensor& choice_any, const Tensor& x_any, const Tensor& weight, const Tensor& bias) {
  check_cpu(x_any, "x");
  check_conv_pool(x_any, weight, bias);
  check_conv_choice(choice_any, x_any, weight.size(1));
  const Tensor x = dense(x_any), choice = dense(choice_any);
  const BlockShape shape = shape_of(x, weight.size(1));
  const int64_t T = x.size(0), n = x.size(1), C = shape.channels, K = shape.patch(), lanes = shape.lanes();
  Tensor out = empty(x, {T, n, shape.rows(), shape.columns(), C});
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    using A = accumulate_t<S>;
    const Scratch<A> packed = by_lanes<A>(weight, bias, shape);
    auto* kernel = METAFAST_KERNEL(conv_chosen_image<S>);
    S* to = out.template mutable_data_ptr<S>();
    const uint8_t* kept = choice.template const_data_ptr<uint8_t>();
    const int64_t each = T / std::max<int64_t>(1, weight.size(0)), size = shape.results();
    for_each_image<S>(x, shape, [&](int64_t t, int64_t k, const A* image) {
      const A* own = packed.get() + t / each * (K + 1) * lanes;
      kernel(image, shape, own, own + K * lanes, kept + k * size, to + k * size);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> conv_pool_vjp(const Tensor& grad_any, const Tensor& choice_any, const Tensor& x_any) {
  check_cpu(x_any, "x");
  check_conv_grad(grad_any, choice_any, x_any);
  const int64_t C = grad_any.size(4);
  const Tensor x = dense(x_any), grad = dense(grad_any), choice = dense(choice_any);
  const BlockShape shape = shape_of(x, C);
  const int64_t T = x.size(0), n = x.size(1), K = shape.patch(), lanes = shape.lanes();
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor to_weight = torch::stable::new_empty(x, {T, C, K}, wide), to_bias = torch::stable::new_empty(x, {T, C}, wide);
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    using A = accumulate_t<S>;
    auto* kernel = METAFAST_KERNEL(conv_sums_image<S>);
    const S *images = x.template const_data_ptr<S>(), *grads = grad.template const_data_ptr<S>();
    const uint8_t* kept = choice.template const_data_ptr<uint8_t>();
    const int64_t pixels = shape.pixels(), size = shape.results();
    const int64_t parts = (n + kTogether - 1) / kTogether, sums = (K + 1) * lanes;
    const Scratch<A> of_parts(T * parts * sums);
    parallel(T * parts, kTogether * size * 4 * K, [&](int64_t begin, int64_t end) {
      const Scratch<A> image = image_room<A>(shape);
      for (int64_t part = begin; part < end; ++part) {
        A* own = of_parts.get() + part * sums;
        std::fill_n(own, sums, A(0));
        const int64_t first = part % parts * kTogether, last = std::min(first + kTogether, n);
        for (int64_t k = part / parts * n + first; k < part / parts * n + last; ++k) {
          with_border(images + k * pixels, shape, image.get());
          kernel(image.get(), shape, grads + k * size, kept + k * size, own);
        }
      }
    });
    A *weights = to_weight.template mutable_data_ptr<A>(), *biases = to_bias.template mutable_data_ptr<A>();
    parallel(T, parts * sums, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t k = 0; k <= K; ++k) {
          for (int64_t c = 0; c < C; ++c) {
            double total = 0;
            for (int64_t p = 0; p < parts; ++p) total += of_parts.get()[(t * parts + p) * sums + k * lanes + c];
            (k < K ? weights[(t * C + c) * K + k] : biases[t * C + c]) = static_cast<A>(total);
          }
        }
      }
    });
  });
  return {to_weight, to_bias};
}

std::tuple<Tensor, Tensor> patch_moments(const Tensor& x_any) {
  check_cpu(x_any, "x");
  check_conv_images(x_any);
  const Tensor x = dense(x_any);
  const BlockShape shape = shape_of(x, 0);
  const int64_t T = x.size(0), n = x.size(1), K = shape.patch(), sums = (K + 1) * K;
  Tensor mean = torch::stable::new_empty(x, {T, K}, ScalarType::Double);
  Tensor covariance = torch::stable::new_empty(x, {T, K, K}, ScalarType::Double);
  double *to_mean = mean.mutable_data_ptr<double>(), *to_covariance = covariance.mutable_data_ptr<double>();
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    auto* kernel = METAFAST_KERNEL(patch_moments_image<S>);
    const S* images = x.template const_data_ptr<S>();
    const int64_t pixels = shape.pixels(), parts = (n + kTogether - 1) / kTogether;
    const Scratch<double> of_parts(T * parts * sums);
    parallel(T * parts, kTogether * pixels * sums, [&](int64_t begin, int64_t end) {
      const Scratch<double> image = image_room<double>(shape);
      for (int64_t part = begin; part < end; ++part) {
        double* own = of_parts.get() + part * sums;
        std::fill_n(own, sums, 0.0);
        const int64_t first = part % parts * kTogether, last = std::min(first + kTogether, n);
        for (int64_t k = part / parts * n + first; k < part / parts * n + last; ++k) {
          with_border(images + k * pixels, shape, image.get());
          kernel(image.get(), shape, own);
        }
      }
    });
    const double count = static_cast<double>(n * shape.height * shape.width);
    for (int64_t t = 0; t < T; ++t) {
      double* total = of_parts.get() + t * parts * sums;
      for (int64_t p = 1; p < parts; ++p) {
        for (int64_t k = 0; k < sums; ++k) total[k] += total[p * sums + k];
      }
      double *own_mean = to_mean + t * K, *own = to_covariance + t * K * K;
      for (int64_t k = 0; k < K; ++k) own_mean[k] = parts > 0 ? total[k] / count : NAN;
      for (int64_t k = 0; k < K; ++k) {
        for (int64_t l = k; l < K; ++l) {
          const double value = parts > 0 ? total[(1 + k) * K + l] / count - own_mean[k] * own_mean[l] : NAN;
          own[k * K + l] = own[l * K + k] = value;
        }
      }
    }
  });
  return {mean, covariance};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, m) {
  m.impl("conv_pool", TORCH_BOX(&conv_pool));
  m.impl("conv_pool_vjp", TORCH_BOX(&conv_pool_vjp));
  m.impl("conv_pool_jvp", TORCH_BOX(&conv_pool_jvp));
  m.impl("patch_moments", TORCH_BOX(&patch_moments));
}

}  // namespace metafast
