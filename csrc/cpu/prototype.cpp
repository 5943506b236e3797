// Class means and the prototypical loss on the CPU: threads over tasks and features (means, gradients) or query rows (loss).
#include "cpu/distance.h"
#include "cpu/labels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"

#define METAFAST_KERNELS "cpu/prototype_kernels.h"
#include "cpu/for_each_isa.h"

namespace metafast {
namespace {

// The stage that makes the class means.
template <class S>
auto means_stage(Rows<const S> features, const Classes<accumulate_t<S>>& classes, Rows<S> out, int64_t d,
                 const Chunks& chunks) {
  auto* kernel = METAFAST_KERNEL(class_means<S>);
  const int64_t n = classes.n, C = classes.num_classes;
  return Stage{chunks.count, (n + C) * chunks.size, [=, &classes, &chunks](int64_t t, int64_t chunk) {
                 const int64_t first = chunk * chunks.size, last = std::min(first + chunks.size, d);
                 kernel(features, classes.order_of(t), classes.offsets_of(t), classes.inverse(t), out, t, C, first,
                        last);
               }};
}

// The stage that hands the gradient of the class means to their rows.
template <class S>
auto spread_stage(Rows<const S> grad, const Counts<accumulate_t<S>>& counts, Rows<S> out, int64_t d,
                  const Chunks& chunks) {
  auto* kernel = METAFAST_KERNEL(spread_means<S>);
  const int64_t n = counts.n;
  return Stage{chunks.count, n * chunks.size, [=, &counts, &chunks](int64_t t, int64_t chunk) {
                 const int64_t first = chunk * chunks.size, last = std::min(first + chunks.size, d);
                 kernel(grad, counts.of(t), counts.inverse(t), out, t, n, first, last);
               }};
}

Tensor prototypes(const Tensor& features_any, const Tensor& labels, int64_t num_classes) {
  check_cpu(features_any, "features");
  check_features(features_any, "features", labels, "labels");
  check_classes(num_classes);
  const Tensor features = contiguous_rows(features_any);
  Tensor out = empty(features, {features.size(0), num_classes, features.size(2)});
  dispatch_floating(features.scalar_type(), "features", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    const int64_t T = features.size(0), d = features.size(2);
    const Classes<accumulate_t<S>> classes(labels, "labels", num_classes);
    const Chunks chunks(T, d, 1);
    parallel_stages(T, means_stage<S>(input_rows<S>(features), classes, output_rows<S>(out), d, chunks));
  });
  return out;
}

Tensor prototypes_vjp(const Tensor& grad_any, const Tensor& labels) {
  check_cpu(grad_any, "grad");
  check_means_grad(grad_any, labels);
  const Tensor grad = contiguous_rows(grad_any);
  Tensor out = empty(grad, {grad.size(0), labels.size(1), grad.size(2)});
  dispatch_floating(grad.scalar_type(), "grad", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    const int64_t T = grad.size(0), d = grad.size(2);
    const Counts<accumulate_t<S>> counts(labels, "labels", grad.size(1));
    const Chunks chunks(T, d, 1);
    parallel_stages(T, spread_stage<S>(input_rows<S>(grad), counts, output_rows<S>(out), d, chunks));
  });
  return out;
}

template <class A>
std::vector<A> temperatures(const std::optional<Tensor>& temperature, double scale, int64_t T) {
  std::vector<A> values(T, static_cast<A>(scale));
  if (temperature.has_value()) {
    const A* from = temperature->const_data_ptr<A>();
    for (int64_t t = 0; t < T; ++t) values[t] *= from[t * temperature->stride(0)];
  }
  return values;
}

// Query rows of one item of work: they bound the scratch memory and give the threads something to share in one task.
constexpr int64_t kRowBlock = 128;

std::tuple<Tensor, Tensor, Tensor> prototypical_loss(const Tensor& support_any, const Tensor& support_labels,
                                                     const Tensor& query_any, const Tensor& query_labels,
                                                     const std::optional<Tensor>& temperature, double scale,
                                                     int64_t num_classes, int64_t metric) {
  check_cpu(support_any, "support");
  check_episodes(support_any, support_labels, query_any, query_labels, temperature);
  check_classes(num_classes);
  const Tensor support = contiguous_rows(support_any), query = contiguous_rows(query_any);
  const int64_t T = query.size(0), m = query.size(1), d = query.size(2), C = num_classes;
  Tensor loss = empty(query, {T}), logits = empty(query, {T, m, C}), means = empty(query, {T, C, d});
  dispatch_full(query.scalar_type(), "query", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    const Classes<A> classes(support_labels, "support_labels", C);
    const Labels targets(query_labels, "query_labels", C);
    const std::vector<A> tau = temperatures<A>(temperature, scale, T);
    const std::unique_ptr<A[]> losses(new A[T * m]);
    A* loss_values = loss.template mutable_data_ptr<A>();
    dispatch_metric(metric, [&](auto functor) {
      using M = typename decltype(functor)::type;
      auto* kernel = METAFAST_KERNEL(prototypical_rows<A, M>);
      auto* row_squares = METAFAST_KERNEL(row_squares<A>);
      const auto rows_query = input_rows<A>(query), rows_means = input_rows<A>(means);
      const auto rows_logits = output_rows<A>(logits);
      const Squares<M, A> query_squares(T, m), mean_squares(T, C);
      const Chunks chunks(T, d, 1);
      const auto rows = [&](int64_t t, int64_t block) {
        const Scratch<A> scratch(padded(std::min(m, kRowBlock)) * (C + 2));
        const int64_t first = block * kRowBlock, last = std::min(first + kRowBlock, m);
        kernel(rows_query, rows_means, query_squares.of(t), mean_squares.of(t), classes.inverse(t),
               targets.of(t) + first, tau[t], rows_logits, losses.get() + t * m + first, t, first, last, C, d,
               scratch.get());
      };
      const auto mean = [&](int64_t t, int64_t) {
        double total = 0;
        for (int64_t i = 0; i < m; ++i) total += losses[t * m + i];
        loss_values[t] = static_cast<A>(total / static_cast<double>(m));
      };
      parallel_stages(
          T, means_stage<A>(input_rows<A>(support), classes, output_rows<A>(means), d, chunks),
          query_squares.stage(rows_query, m, d, row_squares), mean_squares.stage(rows_means, C, d, row_squares),
          Stage{(m + kRowBlock - 1) / kRowBlock, std::min(m, kRowBlock) * C * (d + 16), rows}, Stage{1, m, mean});
    });
  });
  return {loss, logits, means};
}

std::tuple<Tensor, Tensor, Tensor> prototypical_loss_vjp(
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_logits,
    const std::optional<Tensor>& grad_prototypes, const Tensor& support, const Tensor& support_labels,
    const Tensor& query_any, const Tensor& query_labels, const std::optional<Tensor>& temperature, double scale,
    const Tensor& logits_any, const Tensor& prototypes_any, int64_t metric) {
  check_cpu(support, "support");
  check_episodes(support, support_labels, query_any, query_labels, temperature);
  check_upstream(grad_loss, grad_logits, grad_prototypes, query_any, logits_any, prototypes_any);
  const int64_t T = query_any.size(0), n = support.size(1), m = query_any.size(1), d = query_any.size(2);
  const int64_t C = logits_any.size(2);
  const Tensor query = contiguous_rows(query_any), prototypes = contiguous_rows(prototypes_any);
  const Tensor logits = dense(logits_any);
  Tensor grad_support = empty(query, {T, n, d}), grad_query = empty(query, {T, m, d});
  Tensor grad_temperature = empty(query, {temperature ? T : 0});
  dispatch_full(query.scalar_type(), "query", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    const Counts<A> counts(support_labels, "support_labels", C);
    const Labels targets(query_labels, "query_labels", C);
    const std::vector<A> tau = temperatures<A>(temperature, scale, T);
    const auto rows_query = input_rows<A>(query), rows_means = input_rows<A>(prototypes);
    const auto rows_logits = input_rows<A>(logits);
    const auto rows_grad_query = output_rows<A>(grad_query);
    const std::unique_ptr<A[]> grad_means(new A[T * C * d]);
    const Rows<A> rows_grad_means{grad_means.get(), C * d, d};
    const Tensor upstream = grad_logits ? contiguous_rows(*grad_logits) : logits;
    const Rows<const A> rows_upstream = input_rows<A>(upstream);
    std::optional<Tensor> extra;
    std::optional<Rows<const A>> rows_extra;
    if (grad_prototypes) {
      extra = contiguous_rows(*grad_prototypes);
      rows_extra = input_rows<A>(*extra);
    }
    const A* loss_values = grad_loss ? grad_loss->template const_data_ptr<A>() : nullptr;
    const int64_t loss_stride = grad_loss ? grad_loss->stride(0) : 0;
    A* temperature_values = temperature ? grad_temperature.template mutable_data_ptr<A>() : nullptr;
    dispatch_metric(metric, [&](auto functor) {
      using M = typename decltype(functor)::type;
      auto* row_squares = METAFAST_KERNEL(row_squares<A>);
      auto* weigh = METAFAST_KERNEL(prototypical_weights<A, M>);
      auto* slopes = METAFAST_KERNEL(distance_slopes<A, M>);
      auto* spread = METAFAST_KERNEL(distance_spread<A, M>);
      const Squares<M, A> query_squares(T, m), mean_squares(T, C);
      const int64_t stride = padded(m);
      const PerRow<A> weight(T, stride * C), query_part(T, m), mean_part(T, C);
      const Chunks chunks(T, d, 3 * C);
      const auto weights = [&](int64_t t, int64_t) {
        const Scratch<A> scratch(2 * stride);
        weigh(rows_query, rows_means, query_squares.of(t), mean_squares.of(t), counts.inverse(t), targets.of(t), tau[t],
              rows_logits, loss_values ? loss_values[t * loss_stride] : A(0), grad_logits ? &rows_upstream : nullptr, t,
              m, C, d, weight.of(t), scratch.get(), temperature_values ? temperature_values + t : nullptr);
        if (temperature_values) temperature_values[t] *= static_cast<A>(scale);
        const Rows<const A> rows_weight{weight.values.get(), stride * C, 1};
        slopes(rows_weight, stride, rows_query, rows_means, query_squares.of(t), mean_squares.of(t), t, m, C, d,
               weight.of(t), stride, query_part.of(t), mean_part.of(t));
      };
      const auto gradients = [&](int64_t t, int64_t chunk) {
        const Scratch<A> scratch(3 * C * chunks.size);
        const int64_t first = chunk * chunks.size, last = std::min(first + chunks.size, d);
        spread(weight.of(t), stride, query_part.of(t), mean_part.of(t), rows_query, rows_means, rows_grad_query,
               rows_grad_means, t, m, C, first, last, chunks.size, scratch.get());
        if (rows_extra) {
          for (int64_t c = 0; c < C; ++c) {
            for (int64_t k = first; k < last; ++k) rows_grad_means.row(t, c)[k] += rows_extra->row(t, c)[k];
          }
        }
      };
      parallel_stages(T, query_squares.stage(rows_query, m, d, row_squares),
                      mean_squares.stage(rows_means, C, d, row_squares),
                      Stage{1, m * C * (temperature || M::kSlopeOfSum ? d + 16 : 16), weights},
                      Stage{chunks.count, 3 * m * C * chunks.size, gradients},
                      spread_stage<A>({grad_means.get(), C * d, d}, counts, output_rows<A>(grad_support), d, chunks));
    });
  });
  return {grad_support, grad_query, grad_temperature};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, m) {
  m.impl("prototypes", TORCH_BOX(&prototypes));
  m.impl("prototypes_vjp", TORCH_BOX(&prototypes_vjp));
  m.impl("prototypical_loss", TORCH_BOX(&prototypical_loss));
  m.impl("prototypical_loss_vjp", TORCH_BOX(&prototypical_loss_vjp));
}

}  // namespace metafast
