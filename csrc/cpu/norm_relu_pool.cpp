// Batch normalisation, ReLU and max-pooling on the CPU: threads over tasks and channels, or over slices of the images of
// few tasks whose channels lie last. How images are sliced depends on their shape alone.
#include "cpu/norm_relu_pool.h"

#include "cpu/distance.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>
#include <tuple>

#include "math/norm.h"
#include "math/pooling.h"
#include "norm_arguments.h"

#define METAFAST_KERNELS "cpu/norm_relu_pool_kernels.h"
#include "cpu/for_each_isa.h"

namespace metafast {
namespace {

// The images of x as kernels see them, and how they are cut.
struct Layout : NormLayout {
  Maps maps;
  int64_t units, slices, bands_per_slice;

  Layout(const Tensor& x, bool pool_) : NormLayout(x, pool_) {
    // Of so many elements; and of so many pixels that few numbers enter one sum of a channel.
    constexpr int64_t kSlice = 65536, kPixels = 1024;
    maps.last = last;
    maps.images = images;
    maps.channels = last ? channels : 1;
    maps.height = height;
    maps.width = width;
    maps.image_stride = channels * height * width;
    maps.pooled_stride = channels * pooled_height() * pooled_width();
    units = last ? tasks : tasks * channels;
    const int64_t most = last ? std::min(kPixels, kSlice / std::max<int64_t>(1, channels)) : kSlice;
    bands_per_slice = std::max<int64_t>(1, most / std::max<int64_t>(1, 2 * width));
    slices = (maps.bands() + bands_per_slice - 1) / bands_per_slice;
  }

  // Multiply-adds of a slice, to tell threads whether it is worth one.
  int64_t work() const { return 4 * bands_per_slice * width * maps.channels; }
  int64_t begin(int64_t slice) const { return slice * bands_per_slice; }
  int64_t end(int64_t slice) const { return std::min(begin(slice) + bands_per_slice, maps.bands()); }
  int64_t stride() const { return last ? padded(channels) : 1; }

  // Where a unit's pixels begin in x, and its results in y.
  int64_t at(int64_t unit) const { return place(unit, maps.image_stride); }
  int64_t to(int64_t unit) const { return place(unit, maps.pooled_stride); }

 private:
  int64_t place(int64_t unit, int64_t image_stride) const {
    if (last) return unit * images * image_stride;
    return unit / channels * images * image_stride + unit % channels * (image_stride / channels);
  }
};

// Numbers for each channel of each unit, or of each of its slices.
template <class A>
struct Table {
  int64_t rows, stride;
  Scratch<A> values;

  Table(int64_t entries, int64_t rows_, int64_t stride_)
      : rows(rows_), stride(stride_), values(entries * rows_ * stride_) {}
  PerChannel<A> of(int64_t entry) const { return {values.get() + entry * rows * stride, stride}; }
};

template <class Body>
void dispatch_flags(const Body& body) {
  body();
}
template <class Body, class... Flags>
void dispatch_flags(const Body& body, bool flag, Flags... flags) {
  if (flag) {
    dispatch_flags([&](auto... rest) { body(std::true_type{}, rest...); }, flags...);
  } else {
    dispatch_flags([&](auto... rest) { body(std::false_type{}, rest...); }, flags...);
  }
}

// The sums of a unit's slices in their order.
template <class A>
void add_up(const Table<A>& partial, int64_t unit, int64_t slices, int64_t row, int64_t channels, double* total) {
  std::fill_n(total, channels, 0.0);
  for (int64_t slice = 0; slice < slices; ++slice) {
    const A* values = partial.of(unit * slices + slice).row(row);
    for (int64_t c = 0; c < channels; ++c) total[c] += static_cast<double>(values[c]);
  }
}

// What the kernels read of weight, bias and the statistics: [T, C], which is the order of the units' channels.
template <class A>
struct Parameters {
  Tensor weight_, bias_, mean_, var_;
  const A *weight, *bias, *mean, *var;
  double eps;

  Parameters(const Tensor& weight_any, const Tensor& bias_any, const Tensor& mean_any, const Tensor& var_any,
             double eps_)
      : weight_(dense(weight_any)), bias_(dense(bias_any)), mean_(dense(mean_any)), var_(dense(var_any)), eps(eps_) {
    weight = weight_.template const_data_ptr<A>(), bias = bias_.template const_data_ptr<A>();
    mean = mean_.template const_data_ptr<A>(), var = var_.template const_data_ptr<A>();
  }

  double rstd(int64_t k) const { return norm_rstd(static_cast<double>(var[k]), eps); }

  // The same numbers in every pass: without pooling a backward finds the forward's pattern anew.
  void normal(int64_t k, PerChannel<A> to, int64_t c) const {
    to.row(kMean)[c] = mean[k];
    to.row(kScale)[c] = static_cast<A>(static_cast<double>(weight[k]) * rstd(k));
    to.row(kShift)[c] = bias[k];
  }
};

// What values become by ReLU that are not above it; without ReLU this is true of none.
template <class A>
A floor_of(bool relu) {
  return relu ? A(0) : std::numeric_limits<A>::quiet_NaN();
}

template <class A>
const A* optional_data(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->template const_data_ptr<A>() : nullptr;
}

// The k-th of some numbers, zeros if there are none.
template <class A>
double number(const A* values, int64_t k) {
  return values != nullptr ? static_cast<double>(values[k]) : 0.0;
}

std::optional<Tensor> optional_dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_relu_pool(const Tensor& x_any, const Tensor& weight, const Tensor& bias,
                                                          const std::optional<Tensor>& given_mean,
                                                          const std::optional<Tensor>& given_var, double eps, bool relu,
                                                          bool pool) {
  check_cpu(x_any, "x");
  check_norm(x_any, weight, bias, given_mean, given_var, pool);
  const Layout layout(x_any, pool);
  const Tensor x = layout.arranged(x_any);
  const bool given = given_mean.has_value();
  const int64_t T = layout.tasks, C = layout.channels, channels = layout.maps.channels, slices = layout.slices;
  Tensor y = on_large_pages(layout.like_y(x));
  Tensor mean = empty(weight, {T, given ? 0 : C}), var = empty(weight, {T, given ? 0 : C});
  Tensor choice =
      pool ? on_large_pages(layout.like_y(x, ScalarType::Byte)) : torch::stable::new_empty(x, {T, 0}, ScalarType::Byte);
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    using A = accumulate_t<S>;
    const S *from = x.template const_data_ptr<S>(), *from_end = from + x.numel();
    S* to = y.template mutable_data_ptr<S>();
    uint8_t* chosen = pool ? choice.template mutable_data_ptr<uint8_t>() : nullptr;
    const Parameters<A> parameters(weight, bias, given ? *given_mean : mean, given ? *given_var : var, eps);
    A* means = given ? nullptr : mean.template mutable_data_ptr<A>();
    A* variances = given ? nullptr : var.template mutable_data_ptr<A>();
    const Table<A> partial(given ? 0 : layout.units * slices, 2, layout.stride());
    const Table<A> normals(layout.units, kNormals, layout.stride());
    dispatch_flags(
        [&](auto last, auto pools) {
          constexpr bool kLast = decltype(last)::value, kPool = decltype(pools)::value;
          auto* statistics = METAFAST_KERNEL(slice_statistics<kLast, S>);
          auto* normalise = METAFAST_KERNEL(normalise<kLast, kPool, S>);
          const auto sums = [&](int64_t unit, int64_t slice) {
            statistics(layout.maps, from + layout.at(unit), layout.begin(slice), layout.end(slice),
                       partial.of(unit * slices + slice));
          };
          const auto combine = [&](int64_t unit, int64_t) {
            const int64_t first = unit * channels;
            if (!given) {
              const Scratch<double> buffer(2 * channels);
              double *centre = buffer.get(), *square = centre + channels;
              std::fill_n(centre, 2 * channels, 0.0);
              const auto count = [&](int64_t slice) {
                return static_cast<double>(layout.maps.pixels(layout.end(slice)) -
                                           layout.maps.pixels(layout.begin(slice)));
              };
              const double share = 1 / static_cast<double>(layout.pixels());
              for (int64_t slice = 0; slice < slices; ++slice) {
                const A* own = partial.of(unit * slices + slice).row(0);
                for (int64_t c = 0; c < channels; ++c) centre[c] += count(slice) * share * static_cast<double>(own[c]);
              }
              for (int64_t slice = 0; slice < slices; ++slice) {
                const PerChannel<A> own = partial.of(unit * slices + slice);
                for (int64_t c = 0; c < channels; ++c) {
                  const double apart = static_cast<double>(own.row(0)[c]) - centre[c];
                  square[c] += static_cast<double>(own.row(1)[c]) + count(slice) * apart * apart;
                }
              }
              for (int64_t c = 0; c < channels; ++c) {
                means[first + c] = static_cast<A>(centre[c]);
                variances[first + c] = static_cast<A>(square[c] * share);
              }
            }
            for (int64_t c = 0; c < channels; ++c) parameters.normal(first + c, normals.of(unit), c);
          };
          const auto apply = [&](int64_t unit, int64_t slice) {
            normalise(layout.maps, from + layout.at(unit), from_end, normals.of(unit), floor_of<A>(relu),
                      to + layout.to(unit), chosen + layout.to(unit), layout.begin(slice), layout.end(slice));
          };
          parallel_stages(layout.units, Stage{given ? 0 : slices, layout.work(), sums},
                          Stage{1, 4 * slices * channels, combine}, Stage{slices, layout.work(), apply});
        },
        layout.last, pool);
  });
  return {layout.restored(y), mean, var, pool ? layout.restored(choice) : choice};
}

// The gradients for x, weight, bias, and given statistics.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_relu_pool_vjp(
    const Tensor& grad_any, const std::optional<Tensor>& grad_mean_any, const std::optional<Tensor>& grad_var_any,
    const Tensor& x_any, const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var,
    const Tensor& choice_any, bool given, double eps, bool relu, bool pool) {
  check_cpu(x_any, "x");
  check_norm(x_any, weight, bias, mean, var, pool);
  check_norm_upstream(grad_any, grad_mean_any, grad_var_any, x_any, weight, choice_any, pool);
  const Layout layout(x_any, pool);
  const Tensor x = layout.arranged(x_any), grad = layout.arranged(grad_any);
  const Tensor choice = pool ? layout.arranged(choice_any) : choice_any;
  const std::optional<Tensor> grad_mean = optional_dense(grad_mean_any), grad_var = optional_dense(grad_var_any);
  const int64_t T = layout.tasks, C = layout.channels, channels = layout.maps.channels, slices = layout.slices;
  Tensor to_x = on_large_pages(layout.like_x(x)), to_weight = empty(weight, {T, C}), to_bias = empty(weight, {T, C});
  Tensor to_mean = empty(weight, {T, given ? C : 0}), to_var = empty(weight, {T, given ? C : 0});
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    using A = accumulate_t<S>;
    const S *from = x.template const_data_ptr<S>(), *from_end = from + x.numel();
    const S* upstream = grad.template const_data_ptr<S>();
    const uint8_t* chosen = pool ? choice.template const_data_ptr<uint8_t>() : nullptr;
    const Parameters<A> parameters(weight, bias, mean, var, eps);
    const A *of_mean = optional_data<A>(grad_mean), *of_var = optional_data<A>(grad_var);
    S* dx = to_x.template mutable_data_ptr<S>();
    A *dw = to_weight.template mutable_data_ptr<A>(), *db = to_bias.template mutable_data_ptr<A>();
    A* dm = given ? to_mean.template mutable_data_ptr<A>() : nullptr;
    A* dv = given ? to_var.template mutable_data_ptr<A>() : nullptr;
    const Table<A> partial(layout.units * slices, kGradSums, layout.stride());
    const Table<A> coefficients(layout.units, kGradients, layout.stride());
    const double share = 1 / static_cast<double>(layout.pixels());
    dispatch_flags(
        [&](auto last, auto pools, auto givens) {
          constexpr bool kLast = decltype(last)::value, kPool = decltype(pools)::value;
          constexpr bool kGiven = decltype(givens)::value;
          auto* gradient_sums = METAFAST_KERNEL(gradient_sums<kLast, kPool, S>);
          auto* gradient = METAFAST_KERNEL(gradient<kLast, kPool, kGiven, S>);
          const auto prepare = [&](int64_t unit, int64_t) {
            for (int64_t c = 0; c < channels; ++c) parameters.normal(unit * channels + c, coefficients.of(unit), c);
          };
          const auto sums = [&](int64_t unit, int64_t slice) {
            gradient_sums(layout.maps, from + layout.at(unit), from_end, coefficients.of(unit), floor_of<A>(relu),
                          upstream + layout.to(unit), chosen + layout.to(unit), layout.begin(slice), layout.end(slice),
                          partial.of(unit * slices + slice));
          };
          const auto combine = [&](int64_t unit, int64_t) {
            const Scratch<double> buffer(2 * channels);
            double *g = buffer.get(), *centred = g + channels;
            add_up(partial, unit, slices, kGrad, channels, g);
            add_up(partial, unit, slices, kGradCentred, channels, centred);
            const PerChannel<A> own = coefficients.of(unit);
            for (int64_t c = 0; c < channels; ++c) {
              const int64_t k = unit * channels + c;
              const NormGradients to = norm_gradients(static_cast<double>(parameters.weight[k]), parameters.rstd(k),
                                                      g[c], centred[c], number(of_mean, k), number(of_var, k), share);
              dw[k] = static_cast<A>(to.weight);
              db[k] = static_cast<A>(to.bias);
              if (kGiven) {
                dm[k] = static_cast<A>(to.mean);
                dv[k] = static_cast<A>(to.var);
              } else {
                own.row(kConstant)[c] = static_cast<A>(to.constant);
                own.row(kSlope)[c] = static_cast<A>(to.slope);
              }
            }
          };
          const auto apply = [&](int64_t unit, int64_t slice) {
            gradient(layout.maps, from + layout.at(unit), from_end, coefficients.of(unit), floor_of<A>(relu),
                     upstream + layout.to(unit), chosen + layout.to(unit), dx + layout.at(unit), layout.begin(slice),
                     layout.end(slice));
          };
          parallel_stages(layout.units, Stage{1, channels, prepare}, Stage{slices, layout.work(), sums},
                          Stage{1, 4 * slices * channels, combine}, Stage{slices, layout.work(), apply});
        },
        layout.last, pool, given);
  });
  return {layout.restored(to_x), to_weight, to_bias, to_mean, to_var};
}

// The gradients of <u, norm_relu_pool_vjp> for grad, grad_mean, grad_var, x, weight, and given statistics.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_relu_pool_vjp_vjp(
    const Tensor& u_x_any, const Tensor& u_weight_any, const Tensor& u_bias_any,
    const std::optional<Tensor>& u_mean_any, const std::optional<Tensor>& u_var_any, const Tensor& grad_any,
    const std::optional<Tensor>& grad_mean, const std::optional<Tensor>& grad_var_any, const Tensor& x_any,
    const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var, const Tensor& choice_any,
    bool given, double eps, bool relu, bool pool) {
  check_cpu(x_any, "x");
  check_norm(x_any, weight, bias, mean, var, pool);
  check_norm_upstream(grad_any, grad_mean, grad_var_any, x_any, weight, choice_any, pool);
  check_norm_directions(u_x_any, u_weight_any, u_bias_any, u_mean_any, u_var_any, x_any, weight, given);
  const Layout layout(x_any, pool);
  const Tensor x = layout.arranged(x_any), grad = layout.arranged(grad_any), u_x = layout.arranged(u_x_any);
  const Tensor choice = pool ? layout.arranged(choice_any) : choice_any;
  const Tensor u_weight = dense(u_weight_any), u_bias = dense(u_bias_any);
  const std::optional<Tensor> u_mean = optional_dense(u_mean_any), u_var = optional_dense(u_var_any);
  const std::optional<Tensor> grad_var = optional_dense(grad_var_any);
  const int64_t T = layout.tasks, C = layout.channels, channels = layout.maps.channels, slices = layout.slices;
  const int64_t own = given ? 0 : C, of_given = given ? C : 0;
  Tensor to_grad = on_large_pages(layout.like_y(x)), to_x = on_large_pages(layout.like_x(x)),
         to_weight = empty(weight, {T, C});
  Tensor to_grad_mean = empty(weight, {T, own}), to_grad_var = empty(weight, {T, own});
  Tensor to_mean = empty(weight, {T, of_given}), to_var = empty(weight, {T, of_given});
  dispatch_full(x.scalar_type(), "x", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    using S = A;
    const S *from = x.template const_data_ptr<S>(), *from_end = from + x.numel();
    const S *u = u_x.template const_data_ptr<S>(), *u_end = u + u_x.numel();
    const S* upstream = grad.template const_data_ptr<S>();
    const uint8_t* chosen = pool ? choice.template const_data_ptr<uint8_t>() : nullptr;
    const Parameters<A> parameters(weight, bias, mean, var, eps);
    const A *along_weight = u_weight.template const_data_ptr<A>(), *along_bias = u_bias.template const_data_ptr<A>();
    const A *along_mean = optional_data<A>(u_mean), *along_var = optional_data<A>(u_var);
    const A* of_var = optional_data<A>(grad_var);
    S *dy = to_grad.template mutable_data_ptr<S>(), *dx = to_x.template mutable_data_ptr<S>();
    A* dw = to_weight.template mutable_data_ptr<A>();
    // Of the statistics where these are given, and else of the gradients for them.
    A* dm = (given ? to_mean : to_grad_mean).template mutable_data_ptr<A>();
    A* dv = (given ? to_var : to_grad_var).template mutable_data_ptr<A>();
    const Table<A> partial(layout.units * slices, kSecondSums, layout.stride());
    const Table<A> coefficients(layout.units, kSeconds, layout.stride());
    const double share = 1 / static_cast<double>(layout.pixels());
    dispatch_flags(
        [&](auto last, auto pools, auto givens) {
          constexpr bool kLast = decltype(last)::value, kPool = decltype(pools)::value;
          constexpr bool kGiven = decltype(givens)::value;
          auto* second_sums = METAFAST_KERNEL(second_sums<kLast, kPool, S>);
          auto* second = METAFAST_KERNEL(second<kLast, kPool, kGiven, S>);
          const auto prepare = [&](int64_t unit, int64_t) {
            for (int64_t c = 0; c < channels; ++c) parameters.normal(unit * channels + c, coefficients.of(unit), c);
          };
          const auto sums = [&](int64_t unit, int64_t slice) {
            second_sums(layout.maps, from + layout.at(unit), from_end, coefficients.of(unit), floor_of<A>(relu),
                        upstream + layout.to(unit), chosen + layout.to(unit), u + layout.at(unit), u_end,
                        layout.begin(slice), layout.end(slice), partial.of(unit * slices + slice));
          };
          const auto combine = [&](int64_t unit, int64_t) {
            const Scratch<double> buffer(kSecondSums * channels);
            double* totals[kSecondSums];
            for (int64_t n = 0; n < kSecondSums; ++n) {
              totals[n] = buffer.get() + n * channels;
              add_up(partial, unit, slices, n, channels, totals[n]);
            }
            const PerChannel<A> to = coefficients.of(unit);
            for (int64_t c = 0; c < channels; ++c) {
              const int64_t k = unit * channels + c;
              const NormDirections along{number(along_weight, k), number(along_bias, k),
                                         kGiven ? number(along_mean, k) : totals[kDirection][c] * share,
                                         kGiven ? number(along_var, k) : 2 * totals[kDirectionCentred][c] * share};
              const NormSecond second =
                  norm_second(static_cast<double>(parameters.weight[k]), parameters.rstd(k), totals[kGrad][c],
                              totals[kGradCentred][c], totals[kGradDirection][c], along, number(of_var, k), share);
              dw[k] = static_cast<A>(second.weight);
              dm[k] = static_cast<A>(kGiven ? second.mean : along.mean);
              dv[k] = static_cast<A>(kGiven ? second.var : along.var);
              to.row(kTurn)[c] = static_cast<A>(second.turn);
              to.row(kOffset)[c] = static_cast<A>(second.offset);
              to.row(kConstant)[c] = static_cast<A>(second.constant);
              to.row(kBend)[c] = static_cast<A>(second.bend);
              to.row(kSlope)[c] = static_cast<A>(second.slope);
            }
          };
          const auto apply = [&](int64_t unit, int64_t slice) {
            second(layout.maps, from + layout.at(unit), from_end, coefficients.of(unit), floor_of<A>(relu),
                   upstream + layout.to(unit), chosen + layout.to(unit), u + layout.at(unit), u_end,
                   dy + layout.to(unit), dx + layout.at(unit), layout.begin(slice), layout.end(slice));
          };
          parallel_stages(layout.units, Stage{1, channels, prepare}, Stage{slices, layout.work(), sums},
                          Stage{1, 8 * slices * channels, combine}, Stage{slices, 2 * layout.work(), apply});
        },
        layout.last, pool, given);
  });
  return {layout.restored(to_grad), to_grad_mean, to_grad_var, layout.restored(to_x), to_weight, to_mean, to_var};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, m) {
  m.impl("norm_relu_pool", TORCH_BOX(&norm_relu_pool));
  m.impl("norm_relu_pool_vjp", TORCH_BOX(&norm_relu_pool_vjp));
  m.impl("norm_relu_pool_vjp_vjp", TORCH_BOX(&norm_relu_pool_vjp_vjp));
}

}  // namespace metafast
