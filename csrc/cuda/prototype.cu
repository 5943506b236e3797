// Class means and the prototypical loss on a GPU: checks, memory and the order of the launches.
#include "cuda/prototype.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "arguments.h"
#include "cuda/pair_sums.cuh"

namespace metafast {
namespace {

using cuda::Scratch;
using cuda::TaskLabels;
using torch::stable::new_empty;

constexpr cuda::Labels kNoLabels{nullptr, 0};

Tensor prototypes(const Tensor& features_any, const Tensor& labels_any, int64_t num_classes) {
  cuda::check_device(features_any, "features");
  check_features(features_any, "features", labels_any, "labels");
  check_classes(num_classes);
  const auto guard = cuda::device_guard(features_any);
  const Tensor features = contiguous_rows(features_any);
  const TaskLabels labels(labels_any);
  const int64_t T = features.size(0), d = features.size(2);
  Tensor out = new_empty(features, {T, num_classes, d});
  const auto stream = cuda::current_stream(features);
  dispatch_floating(features.scalar_type(), "features", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    cuda::launch_class_means<S>(cuda::input_wide<S>(features), labels.view(), kNoLabels, cuda::output_wide<S>(out), T,
                                num_classes, d, stream);
  });
  return out;
}

Tensor prototypes_vjp(const Tensor& grad_any, const Tensor& labels_any) {
  cuda::check_device(grad_any, "grad");
  check_means_grad(grad_any, labels_any);
  const auto guard = cuda::device_guard(grad_any);
  const Tensor grad = contiguous_rows(grad_any);
  const TaskLabels labels(labels_any);
  const int64_t T = grad.size(0), C = grad.size(1), d = grad.size(2);
  Tensor out = new_empty(grad, {T, labels_any.size(1), d});
  const auto stream = cuda::current_stream(grad);
  dispatch_floating(grad.scalar_type(), "grad", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    cuda::launch_spread_means<S>(cuda::input_wide<S>(grad), {}, labels.view(), kNoLabels, cuda::output_wide<S>(out), T,
                                 C, d, stream);
  });
  return out;
}

template <class A>
cuda::Temperature<A> task_temperature(const std::optional<Tensor>& temperature, double scale) {
  if (!temperature) return {nullptr, 0, static_cast<A>(scale)};
  return {temperature->const_data_ptr<A>(), temperature->stride(0), static_cast<A>(scale)};
}

std::tuple<Tensor, Tensor, Tensor> prototypical_loss(const Tensor& support_any, const Tensor& support_labels_any,
                                                     const Tensor& query_any, const Tensor& query_labels_any,
                                                     const std::optional<Tensor>& temperature, double scale,
                                                     int64_t num_classes, int64_t metric) {
  cuda::check_device(support_any, "support");
  check_episodes(support_any, support_labels_any, query_any, query_labels_any, temperature);
  check_classes(num_classes);
  const auto guard = cuda::device_guard(query_any);
  const Tensor support = contiguous_rows(support_any), query = contiguous_rows(query_any);
  const TaskLabels support_labels(support_labels_any), query_labels(query_labels_any);
  const int64_t T = query.size(0), m = query.size(1), d = query.size(2), C = num_classes;
  Tensor loss = new_empty(query, {T}), logits = new_empty(query, {T, m, C}), means = new_empty(query, {T, C, d});
  if (T == 0) return {loss, logits, means};
  const auto stream = cuda::current_stream(query);
  dispatch_full(query.scalar_type(), "query", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    dispatch_metric(metric, [&](auto functor) {
      using M = typename decltype(functor)::type;
      const Scratch<A> inverse(query, T * C), distances(query, M::kRows ? T * m * C : 0);
      A *to_logits = logits.template mutable_data_ptr<A>(), *to_loss = loss.template mutable_data_ptr<A>();
      cuda::LossInputs<A> inputs{
          nullptr, 0, distances.data(), inverse.data(), query_labels.view(), task_temperature<A>(temperature, scale),
          T,       C};
      const auto finish = [&](cuda::PairSums<A, M> sums, bool loss_is_made) {
        if (loss_is_made) return;
        if constexpr (M::kRows) sums.template finish<A>(nullptr, distances.data());
        cuda::launch_prototypical_loss<A, M>(inputs, to_logits, to_loss, stream);
      };
      const auto use = [&](const cuda::PairSums<A, M>& sums) {
        if constexpr (!M::kRows) inputs.sums = sums.data(), inputs.chunks = sums.chunks();
      };
      if (C <= cuda::kFusedClasses) {
        auto sums = cuda::PairSums<A, M>::by_slabs(query, means, stream);
        use(sums);
        const bool at_once = sums.chunks() == 1 && !M::kRows;
        cuda::launch_prototypical_sums<A, M>(cuda::input_wide<A>(support), support_labels.view(),
                                             cuda::input_wide<A>(query), cuda::output_wide<A>(means), sums.data(),
                                             inverse.data(), inputs, to_logits, at_once ? to_loss : nullptr, d, stream);
        finish(std::move(sums), at_once);
      } else {
        cuda::launch_inverse_counts(support_labels.view(), query_labels.view(), inverse.data(), T, C, stream);
        cuda::launch_class_means<A>(cuda::input_wide<A>(support), support_labels.view(), query_labels.view(),
                                    cuda::output_wide<A>(means), T, C, d, stream);
        cuda::PairSums<A, M> sums(query, means, stream);
        use(sums);
        finish(std::move(sums), false);
      }
    });
  });
  return {loss, logits, means};
}

std::tuple<Tensor, Tensor, Tensor> prototypical_loss_vjp(
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_logits,
    const std::optional<Tensor>& grad_prototypes, const Tensor& support, const Tensor& support_labels_any,
    const Tensor& query_any, const Tensor& query_labels_any, const std::optional<Tensor>& temperature, double scale,
    const Tensor& logits_any, const Tensor& prototypes_any, int64_t metric) {
  cuda::check_device(support, "support");
  check_episodes(support, support_labels_any, query_any, query_labels_any, temperature);
  check_upstream(grad_loss, grad_logits, grad_prototypes, query_any, logits_any, prototypes_any);
  const auto guard = cuda::device_guard(query_any);
  const TaskLabels support_labels(support_labels_any), query_labels(query_labels_any);
  const Tensor query = contiguous_rows(query_any), means = contiguous_rows(prototypes_any);
  const Tensor logits = dense(logits_any);
  const int64_t T = query.size(0), n = support.size(1), m = query.size(1), d = query.size(2), C = logits.size(2);
  Tensor grad_support = new_empty(query, {T, n, d}), grad_query = new_empty(query, {T, m, d});
  Tensor grad_temperature = new_empty(query, {temperature ? T : 0});
  if (T == 0) return {grad_support, grad_query, grad_temperature};
  const auto stream = cuda::current_stream(query);
  dispatch_full(query.scalar_type(), "query", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    const auto rows_query = cuda::input_wide<A>(query), rows_means = cuda::input_wide<A>(means);
    const auto to_support = cuda::output_wide<A>(grad_support), to_query = cuda::output_wide<A>(grad_query);
    A* to_temperature = temperature ? grad_temperature.template mutable_data_ptr<A>() : nullptr;
    cuda::LossGradients<A> upstream{};
    if (grad_loss) upstream.loss = grad_loss->template const_data_ptr<A>(), upstream.loss_stride = grad_loss->stride(0);
    if (grad_logits) {
      upstream.logits = grad_logits->template const_data_ptr<A>();
      for (int k = 0; k < 3; ++k) upstream.logits_strides[k] = grad_logits->stride(k);
    }
    std::optional<Tensor> extra;
    cuda::WideRows<const A> rows_extra{};
    if (grad_prototypes) {
      extra = contiguous_rows(*grad_prototypes);
      rows_extra = cuda::input_wide<A>(*extra);
    }
    dispatch_metric(metric, [&](auto functor) {
      using M = typename decltype(functor)::type;
      const cuda::PairTotals<A, M> pairs(query, means, temperature.has_value(), stream);
      const cuda::RowInputs<A> inputs{upstream,
                                      logits.template const_data_ptr<A>(),
                                      pairs.distances(),
                                      query_labels.view(),
                                      task_temperature<A>(temperature, scale),
                                      C};
      if (C <= cuda::kFusedClasses) {
        cuda::launch_prototypical_gradients<A, M>(inputs, pairs.totals(), pairs.x_squares(), pairs.y_squares(),
                                                  rows_extra, support_labels.view(), rows_query, rows_means, to_support,
                                                  to_query, to_temperature, T, d, stream);
        return;
      }
      const Scratch<A> inverse(query, T * C), weights(query, T * m * C);
      Tensor grad_means = new_empty(query, {T, C, d});
      cuda::launch_inverse_counts(support_labels.view(), query_labels.view(), inverse.data(), T, C, stream);
      cuda::launch_prototypical_weights<A>(inputs, inverse.data(), weights.data(), to_temperature, T, stream);
      cuda::launch_distance_vjp<A, M, cuda::Side::x, A>(weights.data(), m * C, C, 1, pairs.totals(), pairs.x_squares(),
                                                        pairs.y_squares(), rows_query, rows_means, to_query, T, m, C, d,
                                                        stream);
      cuda::launch_distance_vjp<A, M, cuda::Side::y, A>(weights.data(), m * C, 1, C, pairs.totals(), pairs.y_squares(),
                                                        pairs.x_squares(), rows_means, rows_query,
                                                        cuda::output_wide<A>(grad_means), T, C, m, d, stream);
      cuda::launch_spread_means<A>(cuda::input_wide<A>(grad_means), rows_extra, support_labels.view(),
                                   query_labels.view(), to_support, T, C, d, stream);
    });
  });
  return {grad_support, grad_query, grad_temperature};
}

}  // namespace

METAFAST_CUDA_LIBRARY(m) {
  m.impl("prototypes", TORCH_BOX(&prototypes));
  m.impl("prototypes_vjp", TORCH_BOX(&prototypes_vjp));
  m.impl("prototypical_loss", TORCH_BOX(&prototypical_loss));
  m.impl("prototypical_loss_vjp", TORCH_BOX(&prototypical_loss_vjp));
}

}  // namespace metafast
