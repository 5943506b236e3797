// The ridge regression head on a GPU: checks, memory and the order of the launches.
#include "cuda/ridge.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "arguments.h"
#include "cuda/row_tensors.cuh"

namespace metafast {
namespace {

using cuda::Combination;
using cuda::fixed_scale;
using cuda::per_task;
using cuda::RowProducts;
using cuda::Scale;
using cuda::Scratch;
using cuda::WideRows;
using cuda::WorkingMemory;
using torch::stable::new_empty;

std::tuple<Tensor, Tensor, Tensor, Tensor> ridge_logits(const Tensor& support_any, const Tensor& labels_any,
                                                        const Tensor& query_any,
                                                        const std::optional<Tensor>& regularisation,
                                                        const std::optional<Tensor>& scale,
                                                        const std::optional<Tensor>& offset,
                                                        double fixed_regularisation, double fixed_scale_,
                                                        double fixed_offset, int64_t num_classes) {
  cuda::check_device(support_any, "support");
  check_ridge(support_any, labels_any, query_any, num_classes);
  check_per_task(regularisation, "regularisation", support_any);
  check_per_task(scale, "scale", support_any);
  check_per_task(offset, "offset", support_any);
  const auto guard = cuda::device_guard(support_any);
  const Tensor support = contiguous_rows(support_any), query = contiguous_rows(query_any);
  const Tensor labels = dense(labels_any);
  const int64_t T = query.size(0), n = support.size(1), m = query.size(1), d = query.size(2), C = num_classes;
  Tensor logits = new_empty(query, {T, m, C}), weight = new_empty(query, {T, C, d});
  Tensor alpha = new_empty(query, {T, n, C}), factor = new_empty(query, {T, n, n});
  if (T == 0) return {logits, weight, alpha, factor};
  const auto stream = cuda::current_stream(query);
  dispatch_full(query.scalar_type(), "query", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    const bool soft = labels.dim() == 3;
    const auto rows_support = cuda::input_wide<A>(support);
    A* alphas = alpha.template mutable_data_ptr<A>();
    const RowProducts<A> gram(support, rows_support, T, n, n, d, stream);
    const WorkingMemory<A> memory(query, T, cuda::ridge_memory(n, C));
    cuda::launch_ridge_solve<A>(
        gram.products(),
        {{soft ? nullptr : labels.const_data_ptr<int64_t>(), n}, soft ? labels.template const_data_ptr<A>() : nullptr},
        per_task<A>(regularisation, fixed_regularisation), alphas, factor.template mutable_data_ptr<A>(), C,
        memory.global(), memory.shared_bytes(), stream);
    const Scale<A> one = fixed_scale(A(1));
    const Combination<A, 1> of_weight{{{alphas, n * C, 1, C, rows_support, n}}, one, {}, one};
    cuda::launch_combine_rows<A, 1>(of_weight, cuda::output_wide<A>(weight), T, C, d, stream);
    const RowProducts<A> of_query(query, cuda::input_wide<A>(weight), T, m, C, d, stream);
    cuda::launch_finish_products<A>(of_query.products(), per_task<A>(scale, fixed_scale_),
                                    per_task<A>(offset, fixed_offset), nullptr, 0,
                                    logits.template mutable_data_ptr<A>(), stream);
  });
  return {logits, weight, alpha, factor};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ridge_logits_vjp(
    const Tensor& grad_any, const Tensor& support_any, const Tensor& labels_any, const Tensor& query_any,
    const std::optional<Tensor>& regularisation, const std::optional<Tensor>& scale, double, double fixed_scale_,
    const Tensor& weight_any, const Tensor& alpha_any, const Tensor& factor_any) {
  cuda::check_device(support_any, "support");
  const int64_t C = grad_any.dim() == 3 ? grad_any.size(2) : 0;
  check_ridge(support_any, labels_any, query_any, C);
  check_per_task(regularisation, "regularisation", support_any);
  check_per_task(scale, "scale", support_any);
  check_ridge_upstream(grad_any, support_any, query_any, weight_any, alpha_any, factor_any);
  const auto guard = cuda::device_guard(support_any);
  const Tensor support = contiguous_rows(support_any), query = contiguous_rows(query_any);
  const Tensor grad = dense(grad_any), weight = dense(weight_any), labels = dense(labels_any);
  const Tensor alpha = dense(alpha_any), factor = dense(factor_any);
  const int64_t T = query.size(0), n = support.size(1), m = query.size(1), d = query.size(2);
  const bool soft = labels_any.dim() == 3;
  Tensor grad_support = new_empty(query, {T, n, d}), grad_query = new_empty(query, {T, m, d});
  Tensor grad_labels = new_empty(query, {soft ? T : 0, n, C});
  Tensor grad_regularisation = new_empty(query, {regularisation ? T : 0});
  Tensor grad_scale = new_empty(query, {scale ? T : 0}), grad_offset = new_empty(query, {T});
  if (T == 0) return {grad_support, grad_labels, grad_query, grad_regularisation, grad_scale, grad_offset};
  const auto stream = cuda::current_stream(query);
  dispatch_full(query.scalar_type(), "query", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    const auto rows_support = cuda::input_wide<A>(support), rows_weight = cuda::input_wide<A>(weight);
    const A *upstream = grad.template const_data_ptr<A>(), *alphas = alpha.template const_data_ptr<A>();
    const Scale<A> scales = per_task<A>(scale, fixed_scale_), one = fixed_scale(A(1));
    const Scratch<A> slopes(query, T * C * d), solution(query, T * n * C);
    const WideRows<A> rows_slope = cuda::wide_rows(Rows<A>{slopes.data(), C * d, d});
    const WideRows<const A> slope{{slopes.data(), C * d, d}, rows_slope.wide}, none{};
    const Combination<A, 1> of_slope{{{upstream, m * C, 1, C, cuda::input_wide<A>(query), m}}, one, none, one};
    cuda::launch_combine_rows<A, 1>(of_slope, rows_slope, T, C, d, stream);
    const Combination<A, 1> of_query{{{upstream, m * C, C, 1, rows_weight, C}}, scales, none, one};
    cuda::launch_combine_rows<A, 1>(of_query, cuda::output_wide<A>(grad_query), T, m, d, stream);
    const RowProducts<A> products(support, slope, T, n, C, d, stream);
    const WorkingMemory<A> memory(query, T, cuda::ridge_memory(n, C));
    cuda::launch_ridge_gradients<A>(
        products.products(),
        {upstream,
         slopes.data(),
         weight.template const_data_ptr<A>(),
         alphas,
         factor.template const_data_ptr<A>(),
         {soft ? nullptr : labels.const_data_ptr<int64_t>(), n},
         m,
         d},
        scales,
        {solution.data(), soft ? grad_labels.template mutable_data_ptr<A>() : nullptr,
         regularisation ? grad_regularisation.template mutable_data_ptr<A>() : nullptr,
         scale ? grad_scale.template mutable_data_ptr<A>() : nullptr, grad_offset.template mutable_data_ptr<A>()},
        memory.global(), memory.shared_bytes(), stream);
    // The weight's gradient without what the solution takes back.
    const Combination<A, 1> of_rest{{{solution.data(), n * C, 1, C, rows_support, n}}, one, slope, scales};
    cuda::launch_combine_rows<A, 1>(of_rest, rows_slope, T, C, d, stream);
    const Combination<A, 2> of_support{
        {{alphas, n * C, C, 1, slope, C}, {solution.data(), n * C, C, 1, rows_weight, C}}, one, none, one};
    cuda::launch_combine_rows<A, 2>(of_support, cuda::output_wide<A>(grad_support), T, n, d, stream);
  });
  return {grad_support, grad_labels, grad_query, grad_regularisation, grad_scale, grad_offset};
}

}  // namespace

METAFAST_CUDA_LIBRARY(m) {
  m.impl("ridge_logits", TORCH_BOX(&ridge_logits));
  m.impl("ridge_logits_vjp", TORCH_BOX(&ridge_logits_vjp));
}

}  // namespace metafast
