// The ridge regression head on the CPU: threads over tasks, or over rows and features where tasks are few.
#include "cpu/distance.h"
#include "cpu/labels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "arguments.h"

#define METAFAST_KERNELS "cpu/ridge_kernels.h"
#include "cpu/for_each_isa.h"

namespace metafast {
namespace {

constexpr int64_t kRowBlock = 16;

// Rows of a copy in which every row is padded with zeros to whole vectors.
template <class A>
void pad_rows(const A* from, int64_t rows, int64_t columns, A* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    std::copy(from + i * columns, from + (i + 1) * columns, to + i * stride);
    std::fill(to + i * stride + columns, to + (i + 1) * stride, A(0));
  }
}

// to [n, classes] = the targets of one task: one-hot class numbers, or the weights [n, C] beside zeros.
template <class A>
void targets(const Tensor& labels, int64_t t, int64_t n, int64_t num_classes, A* to, int64_t classes) {
  if (labels.dim() == 3) return pad_rows(labels.const_data_ptr<A>() + t * n * num_classes, n, num_classes, to, classes);
  const int64_t* numbers = labels.const_data_ptr<int64_t>() + t * n;
  std::fill(to, to + n * classes, A(0));
  for (int64_t i = 0; i < n; ++i) to[i * classes + numbers[i]] = A(1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ridge_logits(const Tensor& support_any, const Tensor& labels_any,
                                                        const Tensor& query_any,
                                                        const std::optional<Tensor>& regularisation,
                                                        const std::optional<Tensor>& scale,
                                                        const std::optional<Tensor>& offset,
                                                        double fixed_regularisation, double fixed_scale,
                                                        double fixed_offset, int64_t num_classes) {
  check_cpu(support_any, "support");
  check_ridge(support_any, labels_any, query_any, num_classes);
  check_per_task(regularisation, "regularisation", support_any);
  check_per_task(scale, "scale", support_any);
  check_per_task(offset, "offset", support_any);
  const Tensor support = contiguous_rows(support_any), query = contiguous_rows(query_any);
  const Tensor labels = dense(labels_any);
  const int64_t T = query.size(0), n = support.size(1), m = query.size(1), d = query.size(2), C = num_classes;
  if (labels.dim() == 2) Labels(labels, "labels", C);
  Tensor logits = empty(query, {T, m, C}), weight = empty(query, {T, C, d});
  Tensor alpha = empty(query, {T, n, C}), factor = empty(query, {T, n, n});
  dispatch_full(query.scalar_type(), "query", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    auto* gram_of = METAFAST_KERNEL(gram_rows<A>);
    auto* factorise = METAFAST_KERNEL(cholesky<A>);
    auto* solve = METAFAST_KERNEL(cholesky_solve<A>);
    auto* combine = METAFAST_KERNEL(combine_rows<A, 1>);
    auto* products = METAFAST_KERNEL(row_products<A>);
    const auto rows_support = input_rows<A>(support), rows_query = input_rows<A>(query);
    const Rows<A> rows_weight{weight.template mutable_data_ptr<A>(), C * d, d};
    const Rows<const A> rows_weight_in{rows_weight.data, C * d, d};
    A *alphas = alpha.template mutable_data_ptr<A>(), *factors = factor.template mutable_data_ptr<A>();
    A* out = logits.template mutable_data_ptr<A>();
    const PerTask<A> ridges(regularisation, fixed_regularisation), scales(scale, fixed_scale);
    const PerTask<A> offsets(offset, fixed_offset);
    const int64_t stride = padded(n), classes = padded(C);
    const PerRow<A> gram(T, n * stride);
    const Chunks chunks(T, d, 1);
    const auto products_of_rows = [&](int64_t t, int64_t block) {
      gram_of(rows_support, t, block * kRowBlock, std::min((block + 1) * kRowBlock, n), d, A(0), gram.of(t), stride);
    };
    const auto solutions = [&](int64_t t, int64_t) {
      const Scratch<A> b(n * classes);
      A* u = gram.of(t);
      for (int64_t i = 0; i < n; ++i) {
        std::fill(u + i * stride, u + i * stride + i, A(0));
        std::fill(u + i * stride + n, u + (i + 1) * stride, A(0));
        u[i * stride + i] += ridges[t];
      }
      factorise(u, n, stride);
      targets<A>(labels, t, n, C, b.get(), classes);
      solve(u, n, stride, b.get(), classes);
      for (int64_t i = 0; i < n; ++i) std::copy_n(b.get() + i * classes, C, alphas + (t * n + i) * C);
      for (int64_t i = 0; i < n; ++i) std::copy_n(u + i * stride, n, factors + (t * n + i) * n);
    };
    const auto weights = [&](int64_t t, int64_t chunk) {
      const int64_t first = chunk * chunks.size, last = std::min(first + chunks.size, d);
      const Terms<A> terms[1] = {{alphas + t * n * C, 1, C, rows_support.row(t, 0), rows_support.row_stride, n}};
      combine(terms, A(1), nullptr, 0, nullptr, rows_weight.row(t, 0), d, C, first, last);
    };
    const auto rows = [&](int64_t t, int64_t block) {
      products(rows_query, rows_weight_in, t, t, block * kRowBlock, std::min((block + 1) * kRowBlock, m), C, d,
               scales[t], offsets[t], nullptr, out + t * m * C, C, 1);
    };
    parallel_stages(T, Stage{(n + kRowBlock - 1) / kRowBlock, kRowBlock * n * d / 2, products_of_rows},
                    Stage{1, n * n * (n / 6 + C), solutions}, Stage{chunks.count, n * C * chunks.size, weights},
                    Stage{(m + kRowBlock - 1) / kRowBlock, std::min(m, kRowBlock) * C * d, rows});
  });
  return {logits, weight, alpha, factor};
}

// The gradients for support, labels (of weights), query, regularisation, scale and offset.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ridge_logits_vjp(
    const Tensor& grad_any, const Tensor& support_any, const Tensor& labels, const Tensor& query_any,
    const std::optional<Tensor>& regularisation, const std::optional<Tensor>& scale, double, double fixed_scale,
    const Tensor& weight_any, const Tensor& alpha_any, const Tensor& factor_any) {
  check_cpu(support_any, "support");
  const int64_t C = grad_any.dim() == 3 ? grad_any.size(2) : 0;
  check_ridge(support_any, labels, query_any, C);
  check_per_task(regularisation, "regularisation", support_any);
  check_per_task(scale, "scale", support_any);
  check_ridge_upstream(grad_any, support_any, query_any, weight_any, alpha_any, factor_any);
  const Tensor support = contiguous_rows(support_any), query = contiguous_rows(query_any);
  const Tensor grad = dense(grad_any), weight = dense(weight_any);
  const Tensor alpha = dense(alpha_any), factor = dense(factor_any);
  const int64_t T = query.size(0), n = support.size(1), m = query.size(1), d = query.size(2);
  const bool soft = labels.dim() == 3;
  Tensor grad_support = empty(query, {T, n, d}), grad_query = empty(query, {T, m, d});
  Tensor grad_labels = empty(query, {soft ? T : 0, n, C}), grad_regularisation = empty(query, {regularisation ? T : 0});
  Tensor grad_scale = empty(query, {scale ? T : 0}), grad_offset = empty(query, {T});
  dispatch_full(query.scalar_type(), "query", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    auto* solve = METAFAST_KERNEL(cholesky_solve<A>);
    auto* combine = METAFAST_KERNEL(combine_rows<A, 1>);
    auto* combine_two = METAFAST_KERNEL(combine_rows<A, 2>);
    auto* products = METAFAST_KERNEL(row_products<A>);
    const auto rows_support = input_rows<A>(support), rows_query = input_rows<A>(query);
    const auto rows_grad_support = output_rows<A>(grad_support), rows_grad_query = output_rows<A>(grad_query);
    const A *upstream = grad.template const_data_ptr<A>(), *weights = weight.template const_data_ptr<A>();
    const A *alphas = alpha.template const_data_ptr<A>(), *factors = factor.template const_data_ptr<A>();
    const PerTask<A> scales(scale, fixed_scale);
    A* to_labels = soft ? grad_labels.template mutable_data_ptr<A>() : nullptr;
    A *to_regularisation = grad_regularisation.template mutable_data_ptr<A>(),
      *to_scale = grad_scale.template mutable_data_ptr<A>(), *to_offset = grad_offset.template mutable_data_ptr<A>();
    const int64_t classes = padded(C);
    // The gradient of the weight before its scale, then without what the solution takes back; and minus the solution's.
    const PerRow<A> slopes(T, C * d), u(T, n * classes);
    const Chunks chunks(T, d, 1);
    const auto queries = [&](int64_t t, int64_t chunk) {
      const int64_t first = chunk * chunks.size, last = std::min(first + chunks.size, d);
      const A* own = upstream + t * m * C;
      const Terms<A> of_weight[1] = {{own, 1, C, rows_query.row(t, 0), rows_query.row_stride, m}};
      combine(of_weight, A(1), nullptr, 0, nullptr, slopes.of(t), d, C, first, last);
      const Terms<A> of_query[1] = {{own, C, 1, weights + t * C * d, d, C}};
      combine(of_query, scales[t], nullptr, 0, nullptr, rows_grad_query.row(t, 0), d, m, first, last);
    };
    const auto solutions = [&](int64_t t, int64_t) {
      A* b = u.of(t);
      std::fill(b, b + n * classes, A(0));
      products(rows_support, {slopes.of(t), 0, d}, t, 0, 0, n, C, d, scales[t], A(0), nullptr, b, classes, 1);
      solve(factors + t * n * n, n, n, b, classes);
      double regularisation_sum = 0, scale_sum = 0, offset_sum = 0;
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t c = 0; c < C; ++c) regularisation_sum -= double(b[i * classes + c]) * alphas[(t * n + i) * C + c];
      }
      for (int64_t c = 0; c < C; ++c) {
        A along;
        const int64_t at = c * d;
        products({slopes.of(t) + at, 0, d}, {weights + t * C * d + at, 0, d}, 0, 0, 0, 1, 1, d, A(1), A(0), nullptr,
                 &along, 1, 1);
        scale_sum += along;
      }
      for (int64_t k = 0; k < m * C; ++k) offset_sum += upstream[t * m * C + k];
      if (regularisation) to_regularisation[t] = static_cast<A>(regularisation_sum);
      if (scale) to_scale[t] = static_cast<A>(scale_sum);
      to_offset[t] = static_cast<A>(offset_sum);
      for (int64_t i = 0; soft && i < n; ++i) std::copy_n(b + i * classes, C, to_labels + (t * n + i) * C);
      for (int64_t k = 0; k < n * classes; ++k) b[k] = -b[k];
    };
    const auto supports = [&](int64_t t, int64_t chunk) {
      const int64_t first = chunk * chunks.size, last = std::min(first + chunks.size, d);
      A *slope = slopes.of(t), *to = rows_grad_support.row(t, 0);
      const Scratch<A> scale_of(C);
      std::fill_n(scale_of.get(), C, scales[t]);
      const Terms<A> of_slope[1] = {{u.of(t), 1, classes, rows_support.row(t, 0), rows_support.row_stride, n}};
      combine(of_slope, A(1), slope, d, scale_of.get(), slope, d, C, first, last);
      const Terms<A> of_support[2] = {{alphas + t * n * C, C, 1, slope, d, C},
                                      {u.of(t), classes, 1, weights + t * C * d, d, C}};
      combine_two(of_support, A(1), nullptr, 0, nullptr, to, d, n, first, last);
    };
    parallel_stages(T, Stage{chunks.count, 2 * m * C * chunks.size, queries}, Stage{1, n * C * (d + 2 * n), solutions},
                    Stage{chunks.count, 3 * n * C * chunks.size, supports});
  });
  return {grad_support, grad_labels, grad_query, grad_regularisation, grad_scale, grad_offset};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, m) {
  m.impl("ridge_logits", TORCH_BOX(&ridge_logits));
  m.impl("ridge_logits_vjp", TORCH_BOX(&ridge_logits_vjp));
}

}  // namespace metafast
