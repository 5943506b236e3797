// The adapted linear head on a GPU: checks, memory and the order of the launches.
#include "cuda/linear_head.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "arguments.h"
#include "cuda/row_tensors.cuh"

namespace metafast {
namespace {

using cuda::Combination;
using cuda::fixed_scale;
using cuda::Groups;
using cuda::RowProducts;
using cuda::Scale;
using cuda::Scratch;
using cuda::WideRows;
using cuda::WorkingMemory;
using torch::stable::new_empty;

// The arguments that both operators share, as their kernels see them.
template <class A>
struct Head {
  Tensor support, query, labels;
  Groups<A> weight, bias, rates, bias_rates;
  int64_t T, n, m, d, C;
  cuda::WeightLoop<A> loop;

  Head(const Tensor& support_any, const Tensor& labels_any, const Tensor& query_any, const Tensor& weight_any,
       const std::optional<Tensor>& bias_any, const std::optional<Tensor>& rates_any,
       const std::optional<Tensor>& bias_rates_any, double rate, int64_t steps, int64_t loss, double momentum,
       double decay, bool first_order, cuda::Stream stream)
      : support(contiguous_rows(support_any)),
        query(contiguous_rows(query_any)),
        labels(dense(labels_any)),
        weight(weight_any, support.size(0), stream),
        bias(bias_any, support.size(0), stream),
        rates(rates_any, support.size(0), stream),
        bias_rates(bias_rates_any, support.size(0), stream),
        T(support.size(0)),
        n(support.size(1)),
        m(query.size(1)),
        d(support.size(2)),
        C(weight_any.size(1)) {
    const bool soft = labels.dim() == 3;
    const cuda::Rates<A> own = rates_of(rates, rates_any, true, rate);
    loop = {{n,
             C,
             steps,
             static_cast<InnerLoss>(loss),
             first_order,
             static_cast<A>(momentum),
             static_cast<A>(decay),
             {soft ? nullptr : labels.const_data_ptr<int64_t>(), n},
             soft ? labels.template const_data_ptr<A>() : nullptr,
             bias.data(),
             bias.task_stride(),
             own},
            cuda::input_wide<A>(support),
            cuda::wide_rows(Rows<const A>{weight.data(), weight.task_stride(), d}),
            bias_rates_any ? rates_of(bias_rates, bias_rates_any, false, rate) : own,
            d};
  }

 private:
  static cuda::Rates<A> rates_of(const Groups<A>& groups, const std::optional<Tensor>& any, bool features,
                                 double rate) {
    if (!any) return {nullptr, 0, 0, 0, 0, static_cast<A>(rate)};
    const int64_t per_class = features ? any->size(3) : 1;
    return {groups.data(),
            groups.task_stride(),
            any->size(1) > 1 ? any->size(2) * per_class : 0,
            any->size(2) > 1 ? per_class : 0,
            per_class > 1 ? 1 : 0,
            A(0)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_head(const Tensor& support, const Tensor& labels, const Tensor& query,
                                                       const Tensor& weight, const std::optional<Tensor>& bias,
                                                       const std::optional<Tensor>& rates,
                                                       const std::optional<Tensor>& bias_rates, double rate,
                                                       int64_t steps, int64_t loss, double momentum,
                                                       double weight_decay, bool first_order, bool gram) {
  cuda::check_device(support, "support");
  check_linear_head(support, labels, query, weight, bias, rates, bias_rates, steps, loss, gram);
  const auto guard = cuda::device_guard(support);
  const int64_t T = support.size(0), n = support.size(1), m = query.size(1), d = support.size(2), C = weight.size(1);
  const int64_t stride = padded(n);
  Tensor logits = new_empty(support, {T, m, C}), out_weight = new_empty(support, {T, C, d});
  Tensor out_bias = new_empty(support, {T, bias ? C : 0}), tape = new_empty(support, {T, gram ? n + C : 0, stride});
  if (T == 0) return {logits, out_weight, out_bias, tape};
  const auto stream = cuda::current_stream(support);
  dispatch_full(support.scalar_type(), "support", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    const Head<A> head(support, labels, query, weight, bias, rates, bias_rates, rate, steps, loss, momentum,
                       weight_decay, first_order, stream);
    A* to_bias = bias ? out_bias.template mutable_data_ptr<A>() : nullptr;
    const WideRows<A> to_weight = cuda::output_wide<A>(out_weight);
    if (gram) {
      const RowProducts<A> squares(head.support, head.loop.support, T, n, n, d, stream);
      const RowProducts<A> first(head.support, head.loop.first, T, n, C, d, stream);
      const Scratch<A> spans(support, T * C * n), scales(support, T * C);
      const WorkingMemory<A> memory(support, T, cuda::span_memory(n, C));
      cuda::launch_head_steps<A>(head.loop.head, squares.products(), first.products(),
                                 {tape.template mutable_data_ptr<A>(), stride}, spans.data(), scales.data(), to_bias,
                                 memory.global(), memory.shared_bytes(), stream);
      const Combination<A, 1> combination{{{spans.data(), C * n, n, 1, head.loop.support, n}},
                                          fixed_scale(A(1)),
                                          head.loop.first,
                                          {scales.data(), C, 1, A(0)}};
      cuda::launch_combine_rows<A, 1>(combination, to_weight, T, C, d, stream);
    } else {
      const WorkingMemory<A> memory(support, T, cuda::weight_memory(n, C, d));
      cuda::launch_weight_steps<A>(head.loop, to_weight.data, to_bias, T, memory.global(), memory.shared_bytes(),
                                   stream);
    }
    const RowProducts<A> of_query(head.query, cuda::input_wide<A>(out_weight), T, m, C, d, stream);
    cuda::launch_finish_products<A>(of_query.products(), fixed_scale(A(1)), fixed_scale(A(0)), to_bias, C,
                                    logits.template mutable_data_ptr<A>(), stream);
  });
  return {logits, out_weight, out_bias, tape};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients linear_head_vjp(const std::optional<Tensor>& grad_logits, const std::optional<Tensor>& grad_weight,
                          const std::optional<Tensor>& grad_bias, const Tensor& support, const Tensor& labels,
                          const Tensor& query, const Tensor& weight, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& rates, const std::optional<Tensor>& bias_rates, double rate,
                          int64_t steps, int64_t loss, double momentum, double weight_decay, bool first_order,
                          bool gram, const Tensor& adapted_any, const Tensor& tape_any) {
  cuda::check_device(support, "support");
  check_linear_head(support, labels, query, weight, bias, rates, bias_rates, steps, loss, gram);
  check_linear_head_upstream(grad_logits, grad_weight, grad_bias, support, query, weight, bias, gram, adapted_any,
                             tape_any);
  const auto guard = cuda::device_guard(support);
  const int64_t T = support.size(0), n = support.size(1), m = query.size(1), d = support.size(2), C = weight.size(1);
  const bool soft = labels.dim() == 3;
  Tensor to_support = new_empty(support, {T, n, d}), to_labels = new_empty(support, {soft ? T : 0, n, C});
  Tensor to_query = new_empty(support, {T, m, d}), to_weight = new_empty(support, {weight.size(0), C, d});
  Tensor to_bias = new_empty(support, {bias ? bias->size(0) : 0, C});
  const auto like = [&](const std::optional<Tensor>& tensor) {
    return tensor ? torch::stable::empty_like(dense(*tensor)) : new_empty(support, {0});
  };
  Tensor to_rates = like(rates), to_bias_rates = like(bias_rates);
  const auto stream = cuda::current_stream(support);
  dispatch_full(support.scalar_type(), "support", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    const Head<A> head(support, labels, query, weight, bias, rates, bias_rates, rate, steps, loss, momentum,
                       weight_decay, first_order, stream);
    const cuda::HeadLoop<A>& loop = head.loop.head;
    const auto upstream = [](const std::optional<Tensor>& grad) {
      return grad ? std::optional<Tensor>(dense(*grad)) : std::nullopt;
    };
    const auto pointer = [](const std::optional<Tensor>& tensor) {
      return tensor ? tensor->template const_data_ptr<A>() : nullptr;
    };
    const std::optional<Tensor> own_logits = upstream(grad_logits), own_weight = upstream(grad_weight),
                                own_bias = upstream(grad_bias);
    const Tensor adapted = contiguous_rows(adapted_any), tape = dense(tape_any);
    // What each task gives the arguments of its group.
    const cuda::GroupSums<A> weight_sums(to_weight, T), bias_sums(to_bias, T);
    const cuda::GroupSums<A> rate_sums(to_rates, T), bias_rate_sums(to_bias_rates, T);
    const Scale<A> one = fixed_scale(A(1));
    const WideRows<A> weight_parts = cuda::wide_rows(Rows<A>{weight_sums.parts(), C * d, d});
    const WideRows<const A> last_weight = cuda::input_wide<A>(adapted), none{};
    const WideRows<const A> last_gradient{{weight_parts.data, C * d, d}, weight_parts.wide};
    const A* from_logits = pointer(own_logits);
    const int64_t rows = from_logits == nullptr ? 0 : m, classes = from_logits == nullptr ? 0 : C;
    const Combination<A, 1> of_weight{{{from_logits, m * C, 1, C, cuda::input_wide<A>(head.query), rows}},
                                      one,
                                      own_weight ? cuda::input_wide<A>(*own_weight) : none,
                                      one};
    cuda::launch_combine_rows<A, 1>(of_weight, weight_parts, T, C, d, stream);
    const Combination<A, 1> of_query{{{from_logits, m * C, C, 1, last_weight, classes}}, one, none, one};
    cuda::launch_combine_rows<A, 1>(of_query, cuda::output_wide<A>(to_query), T, m, d, stream);
    const cuda::LastGradient<A> last{from_logits, m, pointer(own_bias), weight_parts.data, head.loop.first, d};
    const auto rate_gradient = [](const cuda::GroupSums<A>& sums, const std::optional<Tensor>& any) {
      return any ? cuda::RateGradient<A>{sums.parts(), any->size(1), any->size(2)} : cuda::RateGradient<A>{};
    };
    const cuda::RateGradient<A> of_rates = rate_gradient(rate_sums, rates);
    A* labels_grad = soft ? to_labels.template mutable_data_ptr<A>() : nullptr;
    if (gram && T > 0) {
      const RowProducts<A> span_products(head.support, last_gradient, T, n, C, d, stream);
      const Scratch<A> spans(support, T * C * n), logits_grad(support, T * C * n), scales(support, T * C);
      const Scratch<A> gram_grad(support, T * n * n);
      const WorkingMemory<A> memory(support, T, cuda::sweep_memory(n, C, steps));
      cuda::launch_head_sweep<A>(
          loop, span_products.products(), {tape.template const_data_ptr<A>(), tape.size(2)}, last,
          {spans.data(), scales.data(), logits_grad.data(), gram_grad.data(), bias_sums.parts(), of_rates, labels_grad},
          memory.global(), memory.shared_bytes(), stream);
      const Combination<A, 3> of_features{{{logits_grad.data(), C * n, 1, n, head.loop.first, C},
                                           {spans.data(), C * n, 1, n, last_gradient, C},
                                           {gram_grad.data(), n * n, n, 1, head.loop.support, n}},
                                          one,
                                          none,
                                          one};
      cuda::launch_combine_rows<A, 3>(of_features, cuda::output_wide<A>(to_support), T, n, d, stream);
      const Combination<A, 1> of_first{
          {{logits_grad.data(), C * n, n, 1, head.loop.support, n}}, one, last_gradient, {scales.data(), C, 1, A(0)}};
      cuda::launch_combine_rows<A, 1>(of_first, weight_parts, T, C, d, stream);
    } else if (T > 0) {
      const WorkingMemory<A> memory(support, T, cuda::reverse_memory(n, C, d, steps));
      const bool of_features = rates && rates->size(3) > 1;
      cuda::launch_weight_reverse<A>(
          head.loop, last,
          {to_support.template mutable_data_ptr<A>(), weight_parts.data, bias_sums.parts(),
           of_features ? cuda::RateGradient<A>{} : of_rates, of_features ? of_rates : cuda::RateGradient<A>{},
           rate_gradient(bias_rate_sums, bias_rates), labels_grad},
          T, memory.global(), memory.shared_bytes(), stream);
    }
    for (const auto* sums : {&weight_sums, &bias_sums, &rate_sums, &bias_rate_sums}) sums->finish(stream);
  });
  return {to_support, to_labels, to_query, to_weight, to_bias, to_rates, to_bias_rates};
}

}  // namespace

METAFAST_CUDA_LIBRARY(m) {
  m.impl("linear_head", TORCH_BOX(&linear_head));
  m.impl("linear_head_vjp", TORCH_BOX(&linear_head_vjp));
}

}  // namespace metafast
