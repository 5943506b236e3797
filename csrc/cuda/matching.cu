// Matching networks on a GPU: checks, memory and the order of the launches.
#include "cuda/matching.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "arguments.h"
#include "cuda/row_tensors.cuh"

namespace metafast {
namespace {

using cuda::Combination;
using cuda::fixed_scale;
using cuda::Matching;
using cuda::RowProducts;
using cuda::Scratch;
using torch::stable::new_empty;

// The squared lengths of all rows.
template <class A>
Scratch<A> squares_of(const Tensor& rows, cuda::Stream stream) {
  const Scratch<A> squares(rows, rows.size(0) * rows.size(1));
  const int64_t d = rows.size(2);
  cuda::launch_row_squares<A>(cuda::input_wide<A>(rows), squares.data(), rows.size(0), rows.size(1), d,
                              cuda::slabs_of<A>(d), stream);
  return squares;
}

std::tuple<Tensor, Tensor, Tensor> matching_log_probs(const Tensor& support_any, const Tensor& labels_any,
                                                      const Tensor& query_any, const std::optional<Tensor>& scale,
                                                      double fixed, double eps, int64_t num_classes) {
  cuda::check_device(support_any, "support");
  check_matching(support_any, labels_any, query_any, scale, num_classes);
  const auto guard = cuda::device_guard(support_any);
  const Tensor support = contiguous_rows(support_any), query = contiguous_rows(query_any);
  const cuda::TaskLabels labels(labels_any);
  const int64_t T = query.size(0), n = support.size(1), m = query.size(1), d = query.size(2), C = num_classes;
  Tensor log_probs = new_empty(query, {T, m, C}), totals = new_empty(query, {T, m});
  Tensor cosines = new_empty(query, {T, n, m});
  const auto stream = cuda::current_stream(query);
  dispatch_full(query.scalar_type(), "query", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    const auto squares = squares_of<A>(support, stream), query_squares = squares_of<A>(query, stream);
    const RowProducts<A> products(support, cuda::input_wide<A>(query), T, n, m, d, stream);
    const Matching<A> of{squares.data(),
                         query_squares.data(),
                         labels.view(),
                         cuda::per_task<A>(scale, fixed),
                         static_cast<A>(eps),
                         m,
                         C};
    cuda::launch_matching<A>(products.products(), of, log_probs.template mutable_data_ptr<A>(),
                             totals.template mutable_data_ptr<A>(), cosines.template mutable_data_ptr<A>(), stream);
  });
  return {log_probs, totals, cosines};
}

std::tuple<Tensor, Tensor, Tensor> matching_log_probs_vjp(const Tensor& grad_any, const Tensor& support_any,
                                                          const Tensor& labels_any, const Tensor& query_any,
                                                          const std::optional<Tensor>& scale, double fixed, double eps,
                                                          const Tensor& log_probs_any, const Tensor& totals_any,
                                                          const Tensor& cosines_any) {
  cuda::check_device(support_any, "support");
  check_dim(grad_any, "grad", 3, "[T, m, C]");
  const int64_t C = grad_any.size(2);
  check_matching(support_any, labels_any, query_any, scale, C);
  check_matching_upstream(grad_any, support_any, query_any, log_probs_any, totals_any, cosines_any);
  const auto guard = cuda::device_guard(support_any);
  const Tensor support = contiguous_rows(support_any), query = contiguous_rows(query_any);
  const Tensor grad = dense(grad_any), log_probs = dense(log_probs_any), totals = dense(totals_any);
  const Tensor cosines = dense(cosines_any);
  const cuda::TaskLabels labels(labels_any);
  const int64_t T = query.size(0), n = support.size(1), m = query.size(1), d = query.size(2);
  Tensor grad_support = new_empty(query, {T, n, d}), grad_query = new_empty(query, {T, m, d});
  Tensor grad_scale = new_empty(query, {scale ? T : 0});
  const auto stream = cuda::current_stream(query);
  dispatch_full(query.scalar_type(), "query", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    const auto squares = squares_of<A>(support, stream), query_squares = squares_of<A>(query, stream);
    const Matching<A> of{squares.data(),
                         query_squares.data(),
                         labels.view(),
                         cuda::per_task<A>(scale, fixed),
                         static_cast<A>(eps),
                         m,
                         C};
    const Scratch<A> slopes(query, T * n * m), parts(query, T * n), query_parts(query, T * m),
        scale_parts(query, T * m);
    const A* angles = cosines.template const_data_ptr<A>();
    cuda::launch_matching_slopes<A>(grad.template const_data_ptr<A>(), log_probs.template const_data_ptr<A>(),
                                    totals.template const_data_ptr<A>(), angles, of, slopes.data(), query_parts.data(),
                                    scale_parts.data(), T, stream);
    cuda::launch_matching_parts<A>(slopes.data(), angles, of, parts.data(), T, stream);
    const auto one = fixed_scale(A(1));
    const auto rows_support = cuda::input_wide<A>(support), rows_query = cuda::input_wide<A>(query);
    const Combination<A, 1> of_query{
        {{slopes.data(), n * m, 1, m, rows_support, n}}, one, rows_query, {query_parts.data(), m, 1, A(0)}};
    cuda::launch_combine_rows<A, 1>(of_query, cuda::output_wide<A>(grad_query), T, m, d, stream);
    const Combination<A, 1> of_support{
        {{slopes.data(), n * m, m, 1, rows_query, m}}, one, rows_support, {parts.data(), n, 1, A(0)}};
    cuda::launch_combine_rows<A, 1>(of_support, cuda::output_wide<A>(grad_support), T, n, d, stream);
    if (!scale) return;
    cuda::launch_sum_parts<A>(scale_parts.data(), {{grad_scale.template mutable_data_ptr<A>()}, {1}}, T * m, T, 1,
                              stream);
  });
  return {grad_support, grad_query, grad_scale};
}

}  // namespace

METAFAST_CUDA_LIBRARY(m) {
  m.impl("matching_log_probs", TORCH_BOX(&matching_log_probs));
  m.impl("matching_log_probs_vjp", TORCH_BOX(&matching_log_probs_vjp));
}

}  // namespace metafast
