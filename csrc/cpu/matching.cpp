// Matching networks on the CPU: threads over tasks and query rows, and over features for the gradients.
#include "cpu/distance.h"
#include "cpu/labels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "arguments.h"

#define METAFAST_KERNELS "cpu/matching_kernels.h"
#include "cpu/for_each_isa.h"

namespace metafast {
namespace {

constexpr int64_t kQueries = 64;
constexpr int64_t kVectorNumbers = 16;  // of the widest vectors
// Above, an inner product is long enough to be summed in vectors of features; below, vectors run over query rows.
constexpr int64_t kFewFeatures = 256;

int64_t blocks_of(int64_t m) { return (m + kQueries - 1) / kQueries; }

// The lengths of all rows of each task, made by a stage.
template <class A>
struct Lengths : PerRow<A> {
  Lengths(int64_t tasks, int64_t n) : PerRow<A>(tasks, n) {}

  auto stage(Rows<const A> x, int64_t n, int64_t d) const {
    auto* row_squares = METAFAST_KERNEL(row_squares<A>);
    return Stage{1, n * d, [=, this_ = this](int64_t t, int64_t) {
                   A* lengths = this_->of(t);
                   row_squares(x, t, n, d, lengths);
                   for (int64_t i = 0; i < n; ++i) lengths[i] = std::sqrt(lengths[i]);
                 }};
  }
};

std::tuple<Tensor, Tensor, Tensor> matching_log_probs(const Tensor& support_any, const Tensor& labels_any,
                                                      const Tensor& query_any, const std::optional<Tensor>& scale,
                                                      double fixed_scale, double eps, int64_t num_classes) {
  check_cpu(support_any, "support");
  check_matching(support_any, labels_any, query_any, scale, num_classes);
  const Tensor support = contiguous_rows(support_any), query = contiguous_rows(query_any);
  const int64_t T = query.size(0), n = support.size(1), m = query.size(1), d = query.size(2), C = num_classes;
  Tensor log_probs = empty(query, {T, m, C}), totals = empty(query, {T, m}), cosines = empty(query, {T, n, m});
  dispatch_full(query.scalar_type(), "query", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    auto* turned = METAFAST_KERNEL(turned_rows<A>);
    auto* combine = METAFAST_KERNEL(combine_rows<A, 1>);
    auto* multiply = METAFAST_KERNEL(row_products<A>);
    auto* finish = METAFAST_KERNEL(matching_rows<A>);
    const Classes<A> classes(labels_any, "labels", C);
    const PerTask<A> scales(scale, fixed_scale);
    const auto rows_support = input_rows<A>(support), rows_query = input_rows<A>(query);
    const Lengths<A> lengths(T, n), query_lengths(T, m);
    A *out = log_probs.template mutable_data_ptr<A>(), *sums = totals.template mutable_data_ptr<A>();
    A* products = cosines.template mutable_data_ptr<A>();
    const auto rows = [&](int64_t t, int64_t block) {
      const int64_t first = block * kQueries, count = std::min(kQueries, m - first);
      const Scratch<A> columns(d > kFewFeatures ? 0 : d * kQueries), scratch(C * kVectorNumbers);
      A* own = products + t * n * m + first;
      if (d > kFewFeatures) {
        const Rows<const A> others{rows_query.row(t, first), 0, rows_query.row_stride};
        multiply(rows_support, others, t, 0, 0, n, count, d, A(1), A(0), nullptr, own, m, 1);
      } else {
        turned(rows_query, t, first, first + count, d, columns.get(), kQueries);
        const Terms<A> terms[1] = {{rows_support.row(t, 0), rows_support.row_stride, 1, columns.get(), kQueries, d}};
        combine(terms, A(1), nullptr, 0, nullptr, own, m, n, 0, count);
      }
      finish(lengths.of(t), query_lengths.of(t) + first, classes.order_of(t), classes.offsets_of(t), scales[t],
             static_cast<A>(eps), count, C, own, m, out + (t * m + first) * C, sums + t * m + first, scratch.get());
    };
    parallel_stages(T, lengths.stage(rows_support, n, d), query_lengths.stage(rows_query, m, d),
                    Stage{blocks_of(m), std::min(m, kQueries) * (n * (d + 32) + d), rows});
  });
  return {log_probs, totals, cosines};
}

// The gradients for support, query and scale.
std::tuple<Tensor, Tensor, Tensor> matching_log_probs_vjp(const Tensor& grad_any, const Tensor& support_any,
                                                          const Tensor& labels_any, const Tensor& query_any,
                                                          const std::optional<Tensor>& scale, double fixed_scale,
                                                          double eps, const Tensor& log_probs_any,
                                                          const Tensor& totals_any, const Tensor& cosines_any) {
  check_cpu(support_any, "support");
  check_dim(grad_any, "grad", 3, "[T, m, C]");
  const int64_t C = grad_any.size(2);
  check_matching(support_any, labels_any, query_any, scale, C);
  check_matching_upstream(grad_any, support_any, query_any, log_probs_any, totals_any, cosines_any);
  const Tensor support = contiguous_rows(support_any), query = contiguous_rows(query_any);
  const Tensor grad = dense(grad_any), log_probs = dense(log_probs_any), totals = dense(totals_any);
  const Tensor cosines = dense(cosines_any);
  const int64_t T = query.size(0), n = support.size(1), m = query.size(1), d = query.size(2);
  Tensor grad_support = empty(query, {T, n, d}), grad_query = empty(query, {T, m, d});
  Tensor grad_scale = empty(query, {scale ? T : 0});
  dispatch_full(query.scalar_type(), "query", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    auto* weigh = METAFAST_KERNEL(matching_slopes<A>);
    auto* part = METAFAST_KERNEL(matching_part<A>);
    auto* combine = METAFAST_KERNEL(combine_rows<A, 1>);
    const Classes<A> classes(labels_any, "labels", C);
    const PerTask<A> scales(scale, fixed_scale);
    const A least = static_cast<A>(eps);
    const auto rows_support = input_rows<A>(support), rows_query = input_rows<A>(query);
    const auto to_support = output_rows<A>(grad_support), to_query = output_rows<A>(grad_query);
    const Lengths<A> lengths(T, n), query_lengths(T, m);
    const PerRow<A> slopes(T, n * m), parts(T, n), query_parts(T, m), scale_parts(T, m);
    const A *upstream = grad.template const_data_ptr<A>(), *logs = log_probs.template const_data_ptr<A>();
    const A *sums = totals.template const_data_ptr<A>(), *angles = cosines.template const_data_ptr<A>();
    A* to_scale = grad_scale.template mutable_data_ptr<A>();
    const auto queries = [&](int64_t t, int64_t block) {
      const int64_t first = block * kQueries, count = std::min(kQueries, m - first), row = t * m + first;
      weigh(upstream + row * C, logs + row * C, sums + row, angles + t * n * m + first, lengths.of(t),
            query_lengths.of(t) + first, classes.order_of(t), classes.offsets_of(t), scales[t], least, count, C, m,
            slopes.of(t) + first, query_parts.of(t) + first, scale_parts.of(t) + first);
    };
    const auto own_parts = [&](int64_t t, int64_t) {
      for (int64_t i = 0; i < n; ++i) {
        part(slopes.of(t) + i * m, angles + (t * n + i) * m, lengths.of(t)[i], query_lengths.of(t), least, m,
             parts.of(t) + i);
      }
      double sum = 0;
      for (int64_t j = 0; j < m; ++j) sum += static_cast<double>(scale_parts.of(t)[j]);
      if (scale) to_scale[t] = static_cast<A>(sum);
    };
    const Chunks chunks(T, d, 1);
    const auto gradients = [&](int64_t t, int64_t chunk) {
      const int64_t first = chunk * chunks.size, last = std::min(first + chunks.size, d);
      const A *support_rows = rows_support.row(t, 0), *query_rows = rows_query.row(t, 0);
      const Terms<A> of_query[1] = {{slopes.of(t), 1, m, support_rows, rows_support.row_stride, n}};
      combine(of_query, A(1), query_rows, rows_query.row_stride, query_parts.of(t), to_query.row(t, 0), d, m, first,
              last);
      const Terms<A> of_support[1] = {{slopes.of(t), m, 1, query_rows, rows_query.row_stride, m}};
      combine(of_support, A(1), support_rows, rows_support.row_stride, parts.of(t), to_support.row(t, 0), d, n, first,
              last);
    };
    parallel_stages(T, lengths.stage(rows_support, n, d), query_lengths.stage(rows_query, m, d),
                    Stage{blocks_of(m), std::min(m, kQueries) * n * 32, queries}, Stage{1, 4 * n * m, own_parts},
                    Stage{chunks.count, 2 * n * m * chunks.size, gradients});
  });
  return {grad_support, grad_query, grad_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, m) {
  m.impl("matching_log_probs", TORCH_BOX(&matching_log_probs));
  m.impl("matching_log_probs_vjp", TORCH_BOX(&matching_log_probs_vjp));
}

}  // namespace metafast
