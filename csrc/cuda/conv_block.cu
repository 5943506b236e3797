// The first convolutional block on a GPU: checks, memory and the order of the launches.
#include "cuda/conv_block.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "conv_block_arguments.h"
#include "cuda/groups.cuh"
#include "cuda/tensors.cuh"

namespace metafast {
namespace {

using cuda::Bands;
using cuda::Scratch;
using torch::stable::new_empty;

BlockShape shape_of(const Tensor& x, int64_t channels) { return {x.size(2), x.size(3), x.size(4), channels}; }

template <class A>
cuda::ConvParameters<A> kernel_of(const Tensor& weight, const Tensor& bias, const Tensor& x) {
  return {weight.const_data_ptr<A>(), bias.const_data_ptr<A>(), x.size(0) / weight.size(0) * x.size(1)};
}

std::tuple<Tensor, Tensor> conv_pool(const Tensor& x_any, const Tensor& weight_any, const Tensor& bias_any) {
  cuda::check_device(x_any, "x");
  check_conv_pool(x_any, weight_any, bias_any);
  const auto guard = cuda::device_guard(x_any);
  const Tensor x = dense(x_any), weight = dense(weight_any), bias = dense(bias_any);
  const BlockShape shape = shape_of(x, weight.size(1));
  const int64_t T = x.size(0), n = x.size(1), C = shape.channels;
  Tensor out = new_empty(x, {T, n, shape.rows(), shape.columns(), C});
  Tensor choice = new_empty(x, {T, n, shape.rows(), shape.columns(), C}, ScalarType::Byte);
  if (out.numel() == 0) return {out, choice};
  const auto stream = cuda::current_stream(x);
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    using A = accumulate_t<S>;
    cuda::launch_conv_pool<S>(x.template const_data_ptr<S>(), kernel_of<A>(weight, bias, x),
                              out.template mutable_data_ptr<S>(), choice.template mutable_data_ptr<uint8_t>(),
                              cuda::bands_of<A>(shape), T * n, stream);
  });
  return {out, choice};
}

Tensor conv_pool_jvp(const Tensor& choice_any, const Tensor& x_any, const Tensor& weight_any, const Tensor& bias_any) {
  cuda::check_device(x_any, "x");
  check_conv_pool(x_any, weight_any, bias_any);
  check_conv_choice(choice_any, x_any, weight_any.size(1));
  const auto guard = cuda::device_guard(x_any);
  const Tensor x = dense(x_any), weight = dense(weight_any), bias = dense(bias_any), choice = dense(choice_any);
  const BlockShape shape = shape_of(x, weight.size(1));
  const int64_t T = x.size(0), n = x.size(1);
  Tensor out = new_empty(x, {T, n, shape.rows(), shape.columns(), shape.channels});
  if (out.numel() == 0) return out;
  const auto stream = cuda::current_stream(x);
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    using A = accumulate_t<S>;
    cuda::launch_conv_chosen<S>(x.template const_data_ptr<S>(), kernel_of<A>(weight, bias, x),
                                choice.template const_data_ptr<uint8_t>(), out.template mutable_data_ptr<S>(),
                                cuda::bands_of<A>(shape), T * n, stream);
  });
  return out;
}

std::tuple<Tensor, Tensor> conv_pool_vjp(const Tensor& grad_any, const Tensor& choice_any, const Tensor& x_any) {
  cuda::check_device(x_any, "x");
  check_conv_grad(grad_any, choice_any, x_any);
  const auto guard = cuda::device_guard(x_any);
  const Tensor x = dense(x_any), grad = dense(grad_any), choice = dense(choice_any);
  const int64_t C = grad.size(4), T = x.size(0), n = x.size(1);
  const BlockShape shape = shape_of(x, C);
  const int64_t K = shape.patch(), size = C * (K + 1);
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor to_weight = new_empty(x, {T, C, K}, wide), to_bias = new_empty(x, {T, C}, wide);
  if (T == 0) return {to_weight, to_bias};
  const auto stream = cuda::current_stream(x);
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    using A = accumulate_t<S>;
    const Bands bands = cuda::bands_of<A>(shape);
    const Scratch<A> parts(x, T * n * bands.count * size);
    cuda::launch_conv_sums<S>(x.template const_data_ptr<S>(), grad.template const_data_ptr<S>(),
                              choice.template const_data_ptr<uint8_t>(), parts.data(), bands, T * n, stream);
    const cuda::RowParts<A> to{{to_weight.template mutable_data_ptr<A>(), to_bias.template mutable_data_ptr<A>()},
                               {C * K, size}};
    cuda::launch_sum_parts<A>(parts.data(), to, T * n * bands.count, T, size, stream);
  });
  return {to_weight, to_bias};
}

std::tuple<Tensor, Tensor> patch_moments(const Tensor& x_any) {
  cuda::check_device(x_any, "x");
  check_conv_images(x_any);
  const auto guard = cuda::device_guard(x_any);
  const Tensor x = dense(x_any);
  const BlockShape shape = shape_of(x, 0);
  const int64_t T = x.size(0), n = x.size(1), K = shape.patch(), size = K + K * K;
  Tensor mean = new_empty(x, {T, K}, ScalarType::Double), covariance = new_empty(x, {T, K, K}, ScalarType::Double);
  if (T == 0) return {mean, covariance};
  const auto stream = cuda::current_stream(x);
  const Scratch<double> sums(x, T * K), products(x, T * K * K);
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    const Bands bands = cuda::bands_of<accumulate_t<S>>(shape);
    const Scratch<double> parts(x, T * n * bands.count * size);
    cuda::launch_patch_moments<S>(x.template const_data_ptr<S>(), parts.data(), bands, T * n, stream);
    const cuda::RowParts<double> to{{sums.data(), products.data()}, {K, size}};
    cuda::launch_sum_parts<double>(parts.data(), to, T * n * bands.count, T, size, stream);
    cuda::launch_finish_moments(sums.data(), products.data(), mean.mutable_data_ptr<double>(),
                                covariance.mutable_data_ptr<double>(), T, K,
                                static_cast<double>(n * shape.height * shape.width), stream);
  });
  return {mean, covariance};
}

}  // namespace

METAFAST_CUDA_LIBRARY(m) {
  m.impl("conv_pool", TORCH_BOX(&conv_pool));
  m.impl("conv_pool_vjp", TORCH_BOX(&conv_pool_vjp));
  m.impl("conv_pool_jvp", TORCH_BOX(&conv_pool_jvp));
  m.impl("patch_moments", TORCH_BOX(&patch_moments));
}

}  // namespace metafast
