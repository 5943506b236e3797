// Batch normalisation, ReLU and max-pooling on a GPU: checks, memory and the order of the launches.
#include "cuda/norm_relu_pool.cuh"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "cuda/tensors.cuh"
#include "norm_arguments.h"

namespace metafast {
namespace {

using cuda::kThreads;
using cuda::NormMaps;
using cuda::NormParameters;
using cuda::NormUpstream;
using cuda::Scratch;
using torch::stable::new_empty;

// How the images are cut, which depends on their shape alone.
struct Cut : NormLayout {
  NormMaps maps;

  Cut(const Tensor& x, bool pool_) : NormLayout(x, pool_) {
    // Few slices, for one warp adds up those of a channel; but enough to fill a GPU.
    constexpr int64_t kCells = 2048, kWindows = 256;
    maps.last = last;
    maps.tasks = tasks, maps.images = images, maps.channels = channels, maps.height = height, maps.width = width;
    maps.rows = pool ? (height + 1) / 2 : height;
    maps.columns = pool ? (width + 1) / 2 : width;
    maps.cells_per_slice = last ? kWindows : kCells;
    if (maps.cells() > INT32_MAX) fail("x: too many pixels of a channel for one call");
    maps.slices = std::max<int64_t>(1, cuda::ceil_div(maps.cells(), maps.cells_per_slice));
    maps.share = 1 / static_cast<double>(pixels());
    maps.x = strides(height, width);
    maps.y = strides(pooled_height(), pooled_width());
  }

  bool empty() const { return tasks * channels == 0; }
  unsigned blocks() const { return cuda::grid_size(maps.slices * maps.channel_blocks() * tasks); }
  unsigned warps() const { return cuda::grid_size(cuda::ceil_div(tasks * channels, cuda::kWarps)); }

 private:
  cuda::MapStrides strides(int64_t rows, int64_t columns) const {
    const int64_t image = channels * rows * columns;
    if (last) return {images * image, image, 1, columns * channels, channels};
    return {images * image, image, rows * columns, columns, 1};
  }
};

// Numbers of channels [T, C], and what kernels make of them.
template <class A>
class Parameters {
 public:
  Parameters(const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var, double eps,
             cuda::Stream stream)
      : weight_(dense(weight)),
        bias_(dense(bias)),
        mean_(dense(mean)),
        var_(dense(var)),
        scale_(weight, weight.numel()),
        rstd_(weight, weight.numel()) {
    const int64_t channels = weight.numel();
    METAFAST_LAUNCH(cuda::norm_scale_kernel<A>, cuda::grid_size(cuda::ceil_div(channels, kThreads)), kThreads, 0,
                    stream, weight_.template const_data_ptr<A>(), var_.template const_data_ptr<A>(), eps, scale_.data(),
                    rstd_.data(), channels);
  }

  NormParameters<A> view() const {
    return {weight_.template const_data_ptr<A>(), bias_.template const_data_ptr<A>(),
            mean_.template const_data_ptr<A>(), scale_.data(), rstd_.data()};
  }

 private:
  Tensor weight_, bias_, mean_, var_;
  Scratch<A> scale_;
  Scratch<double> rstd_;
};

template <class A>
const A* optional_data(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->template const_data_ptr<A>() : nullptr;
}

std::optional<Tensor> optional_dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

// What values become by ReLU that are not above it; without ReLU this is true of none.
template <class A>
A floor_of(bool relu) {
  return relu ? A(0) : std::numeric_limits<A>::quiet_NaN();
}

template <class S>
NormUpstream<S> upstream_of(const Tensor& grad, const Tensor& choice, bool relu) {
  return {grad.const_data_ptr<S>(), choice.const_data_ptr<uint8_t>(), floor_of<accumulate_t<S>>(relu)};
}

template <class Body>
void with_pool(bool pool, const Body& body) {
  if (pool) return body(std::true_type{});
  body(std::false_type{});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_relu_pool(const Tensor& x_any, const Tensor& weight, const Tensor& bias,
                                                          const std::optional<Tensor>& given_mean,
                                                          const std::optional<Tensor>& given_var, double eps, bool relu,
                                                          bool pool) {
  cuda::check_device(x_any, "x");
  check_norm(x_any, weight, bias, given_mean, given_var, pool);
  const auto guard = cuda::device_guard(x_any);
  const Cut cut(x_any, pool);
  const Tensor x = cut.arranged(x_any);
  const bool given = given_mean.has_value();
  const int64_t T = cut.tasks, C = given ? 0 : cut.channels;
  Tensor y = cut.like_y(x), mean = new_empty(weight, {T, C}), var = new_empty(weight, {T, C});
  Tensor choice = pool ? cut.like_y(x, ScalarType::Byte) : new_empty(x, {T, 0}, ScalarType::Byte);
  const auto results = std::make_tuple(cut.restored(y), mean, var, pool ? cut.restored(choice) : choice);
  if (cut.empty()) return results;
  const auto stream = cuda::current_stream(x);
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    using A = accumulate_t<S>;
    with_pool(pool, [&](auto pools) {
      constexpr bool kPool = decltype(pools)::value;
      const S* from = x.template const_data_ptr<S>();
      if (!given) {
        const Scratch<A> partial(x, 2 * cut.maps.all_slices());
        METAFAST_LAUNCH((cuda::norm_statistics_kernel<S, kPool>), cut.blocks(), kThreads, 0, stream, cut.maps, from,
                        partial.data());
        METAFAST_LAUNCH(cuda::norm_combine_kernel<A>, cut.warps(), kThreads, 0, stream, cut.maps, partial.data(),
                        mean.template mutable_data_ptr<A>(), var.template mutable_data_ptr<A>());
      }
      const Parameters<A> parameters(weight, bias, given ? *given_mean : mean, given ? *given_var : var, eps, stream);
      METAFAST_LAUNCH((cuda::norm_value_kernel<S, kPool>), cut.blocks(), kThreads, 0, stream, cut.maps, from,
                      parameters.view(), floor_of<A>(relu), y.template mutable_data_ptr<S>(),
                      choice.template mutable_data_ptr<uint8_t>());
    });
  });
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_relu_pool_vjp(
    const Tensor& grad_any, const std::optional<Tensor>& grad_mean_any, const std::optional<Tensor>& grad_var_any,
    const Tensor& x_any, const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var,
    const Tensor& choice_any, bool given, double eps, bool relu, bool pool) {
  cuda::check_device(x_any, "x");
  check_norm(x_any, weight, bias, mean, var, pool);
  check_norm_upstream(grad_any, grad_mean_any, grad_var_any, x_any, weight, choice_any, pool);
  const auto guard = cuda::device_guard(x_any);
  const Cut cut(x_any, pool);
  const Tensor x = cut.arranged(x_any), grad = cut.arranged(grad_any);
  const Tensor choice = pool ? cut.arranged(choice_any) : choice_any;
  const std::optional<Tensor> grad_mean = optional_dense(grad_mean_any), grad_var = optional_dense(grad_var_any);
  const int64_t T = cut.tasks, C = cut.channels, of_given = given ? C : 0;
  Tensor to_x = cut.like_x(x), to_weight = new_empty(weight, {T, C}), to_bias = new_empty(weight, {T, C});
  Tensor to_mean = new_empty(weight, {T, of_given}), to_var = new_empty(weight, {T, of_given});
  const auto results = std::make_tuple(cut.restored(to_x), to_weight, to_bias, to_mean, to_var);
  if (cut.empty()) return results;
  const auto stream = cuda::current_stream(x);
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    using A = accumulate_t<S>;
    with_pool(pool, [&](auto pools) {
      constexpr bool kPool = decltype(pools)::value;
      const S* from = x.template const_data_ptr<S>();
      const Parameters<A> parameters(weight, bias, mean, var, eps, stream);
      const auto upstream = upstream_of<S>(grad, choice, relu);
      const Scratch<A> partial(x, 2 * cut.maps.all_slices()), coefficients(x, given ? 0 : 2 * T * C);
      METAFAST_LAUNCH((cuda::norm_vjp_sums_kernel<S, kPool>), cut.blocks(), kThreads, 0, stream, cut.maps, from,
                      parameters.view(), upstream, partial.data());
      const cuda::NormVjpResults<A> to{to_weight.template mutable_data_ptr<A>(), to_bias.template mutable_data_ptr<A>(),
                                       given ? to_mean.template mutable_data_ptr<A>() : nullptr,
                                       given ? to_var.template mutable_data_ptr<A>() : nullptr, coefficients.data()};
      METAFAST_LAUNCH(cuda::norm_vjp_combine_kernel<A>, cut.warps(), kThreads, 0, stream, cut.maps, partial.data(),
                      parameters.view(),
                      (cuda::NormStatisticsGradients<A>{optional_data<A>(grad_mean), optional_data<A>(grad_var)}), to);
      METAFAST_LAUNCH((cuda::norm_vjp_kernel<S, kPool>), cut.blocks(), kThreads, 0, stream, cut.maps, from,
                      parameters.view(), upstream, coefficients.data(), to_x.template mutable_data_ptr<S>());
    });
  });
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_relu_pool_vjp_vjp(
    const Tensor& u_x_any, const Tensor& u_weight_any, const Tensor& u_bias_any,
    const std::optional<Tensor>& u_mean_any, const std::optional<Tensor>& u_var_any, const Tensor& grad_any,
    const std::optional<Tensor>& grad_mean, const std::optional<Tensor>& grad_var_any, const Tensor& x_any,
    const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var, const Tensor& choice_any,
    bool given, double eps, bool relu, bool pool) {
  cuda::check_device(x_any, "x");
  check_norm(x_any, weight, bias, mean, var, pool);
  check_norm_upstream(grad_any, grad_mean, grad_var_any, x_any, weight, choice_any, pool);
  check_norm_directions(u_x_any, u_weight_any, u_bias_any, u_mean_any, u_var_any, x_any, weight, given);
  const auto guard = cuda::device_guard(x_any);
  const Cut cut(x_any, pool);
  const Tensor x = cut.arranged(x_any), grad = cut.arranged(grad_any), u_x = cut.arranged(u_x_any);
  const Tensor choice = pool ? cut.arranged(choice_any) : choice_any;
  const Tensor u_weight = dense(u_weight_any), u_bias = dense(u_bias_any);
  const std::optional<Tensor> u_mean = optional_dense(u_mean_any), u_var = optional_dense(u_var_any);
  const std::optional<Tensor> grad_var = optional_dense(grad_var_any);
  const int64_t T = cut.tasks, C = cut.channels, own = given ? 0 : C, of_given = given ? C : 0;
  Tensor to_grad = cut.like_y(x), to_x = cut.like_x(x), to_weight = new_empty(weight, {T, C});
  Tensor to_grad_mean = new_empty(weight, {T, own}), to_grad_var = new_empty(weight, {T, own});
  Tensor to_mean = new_empty(weight, {T, of_given}), to_var = new_empty(weight, {T, of_given});
  const auto results =
      std::make_tuple(cut.restored(to_grad), to_grad_mean, to_grad_var, cut.restored(to_x), to_weight, to_mean, to_var);
  if (cut.empty()) return results;
  const auto stream = cuda::current_stream(x);
  dispatch_full(x.scalar_type(), "x", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    with_pool(pool, [&](auto pools) {
      constexpr bool kPool = decltype(pools)::value;
      const A *from = x.template const_data_ptr<A>(), *along = u_x.template const_data_ptr<A>();
      const Parameters<A> parameters(weight, bias, mean, var, eps, stream);
      const auto upstream = upstream_of<A>(grad, choice, relu);
      const Scratch<A> partial(x, 5 * cut.maps.all_slices()), coefficients(x, 5 * T * C);
      METAFAST_LAUNCH((cuda::norm_vjp_vjp_sums_kernel<A, kPool>), cut.blocks(), kThreads, 0, stream, cut.maps, from,
                      along, parameters.view(), upstream, partial.data());
      const cuda::NormVjpVjpArguments<A> numbers{u_weight.template const_data_ptr<A>(),
                                                 u_bias.template const_data_ptr<A>(), optional_data<A>(u_mean),
                                                 optional_data<A>(u_var), optional_data<A>(grad_var)};
      const cuda::NormVjpVjpResults<A> to{
          to_weight.template mutable_data_ptr<A>(), (given ? to_mean : to_grad_mean).template mutable_data_ptr<A>(),
          (given ? to_var : to_grad_var).template mutable_data_ptr<A>(), coefficients.data()};
      METAFAST_LAUNCH(cuda::norm_vjp_vjp_combine_kernel<A>, cut.warps(), kThreads, 0, stream, cut.maps, partial.data(),
                      parameters.view(), numbers, to);
      METAFAST_LAUNCH((cuda::norm_vjp_vjp_kernel<A, kPool>), cut.blocks(), kThreads, 0, stream, cut.maps, from, along,
                      parameters.view(), upstream, coefficients.data(), given, to_grad.template mutable_data_ptr<A>(),
                      to_x.template mutable_data_ptr<A>());
    });
  });
  return results;
}

}  // namespace

METAFAST_CUDA_LIBRARY(m) {
  m.impl("norm_relu_pool", TORCH_BOX(&norm_relu_pool));
  m.impl("norm_relu_pool_vjp", TORCH_BOX(&norm_relu_pool_vjp));
  m.impl("norm_relu_pool_vjp_vjp", TORCH_BOX(&norm_relu_pool_vjp_vjp));
}

}  // namespace metafast
