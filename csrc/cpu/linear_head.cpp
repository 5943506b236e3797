// The adapted linear head on the CPU: threads over tasks, and over rows and features of few tasks.
#include "cpu/linear_head.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "arguments.h"
#include "cpu/labels.h"

#define METAFAST_KERNELS "cpu/linear_head_kernels.h"
#include "cpu/for_each_isa.h"

namespace metafast {
namespace {

constexpr int64_t kRowBlock = 16;

// An argument with a row for each group of tasks.
template <class A>
struct Grouped {
  std::optional<Tensor> tensor;
  const A* data = nullptr;
  A* out = nullptr;  // the gradient, of the same shape
  int64_t tasks_each = 1;
  int64_t size = 0;  // numbers of one group

  Grouped(const std::optional<Tensor>& any, int64_t tasks) {
    if (!any) return;
    tensor = dense(*any);
    data = tensor->template const_data_ptr<A>();
    const int64_t groups = tensor->size(0);
    tasks_each = groups > 0 ? std::max<int64_t>(1, tasks / groups) : 1;
    size = groups > 0 ? tensor->numel() / groups : 0;
  }
  const A* of(int64_t t) const { return data == nullptr ? nullptr : data + t / tasks_each * size; }
};

// The arguments that both operators share.
template <class A>
struct Head {
  Tensor support, query;
  Grouped<A> weight, bias, rates, bias_rates;
  std::optional<Labels> numbers;
  std::optional<Tensor> soft;
  int64_t T, n, m, d, C, stride;
  A rate;
  InnerLoop<A> loop;

  Head(const Tensor& support_any, const Tensor& labels, const Tensor& query_any, const Tensor& weight_any,
       const std::optional<Tensor>& bias_any, const std::optional<Tensor>& rates_any,
       const std::optional<Tensor>& bias_rates_any, double rate_, int64_t steps, int64_t loss, double momentum,
       double decay, bool first_order)
      : support(contiguous_rows(support_any)),
        query(contiguous_rows(query_any)),
        weight(weight_any, support.size(0)),
        bias(bias_any, support.size(0)),
        rates(rates_any, support.size(0)),
        bias_rates(bias_rates_any, support.size(0)),
        T(support.size(0)),
        n(support.size(1)),
        m(query.size(1)),
        d(support.size(2)),
        C(weight_any.size(1)),
        stride(padded(n)),
        rate(static_cast<A>(rate_)),
        loop{n,
             C,
             stride,
             steps,
             static_cast<InnerLoss>(loss),
             first_order,
             static_cast<A>(momentum),
             static_cast<A>(decay),
             nullptr,
             nullptr} {
    if (labels.dim() == 2) {
      numbers.emplace(labels, "labels", C);
    } else {
      soft = dense(labels);
    }
  }

  // The loop of task t, with its targets written into storage of `stride` (C + 1) numbers.
  InnerLoop<A> loop_of(int64_t t, A* storage) const {
    A *targets = storage, *totals = storage + C * stride;
    for (int64_t k = 0; k < (C + 1) * stride; ++k) storage[k] = A(0);
    for (int64_t i = 0; i < n; ++i) {
      if (numbers) {
        targets[numbers->of(t)[i] * stride + i] = totals[i] = A(1);
        continue;
      }
      const A* row = soft->template const_data_ptr<A>() + (t * n + i) * C;
      for (int64_t c = 0; c < C; ++c) totals[i] += targets[c * stride + i] = row[c];
    }
    InnerLoop<A> own = loop;
    own.targets = targets, own.totals = totals;
    return own;
  }

  Rates<A> rates_of(const Grouped<A>& grouped, int64_t t, bool features) const {
    if (grouped.data == nullptr) return {nullptr, 0, 0, 0, rate};
    const Tensor& shape = *grouped.tensor;
    const int64_t k = features && shape.size(3) > 1 ? 1 : 0, per_class = features ? shape.size(3) : 1;
    return {grouped.of(t), shape.size(1) > 1 ? shape.size(2) * per_class : 0, shape.size(2) > 1 ? per_class : 0, k,
            rate};
  }
  Rates<A> weight_rates(int64_t t) const { return rates_of(rates, t, true); }
  Rates<A> own_bias_rates(int64_t t) const {
    return bias_rates.data == nullptr ? weight_rates(t) : rates_of(bias_rates, t, false);
  }
  bool has_bias() const { return bias.data != nullptr; }
  Rows<const A> support_of(int64_t t) const { return {input_rows<A>(support).row(t, 0), 0, support.stride(1)}; }
  Rows<const A> weight_of(int64_t t) const { return {weight.of(t), 0, d}; }
  int64_t blocks(int64_t rows) const { return (rows + kRowBlock - 1) / kRowBlock; }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_head(const Tensor& support, const Tensor& labels, const Tensor& query,
                                                       const Tensor& weight, const std::optional<Tensor>& bias,
                                                       const std::optional<Tensor>& rates,
                                                       const std::optional<Tensor>& bias_rates, double rate,
                                                       int64_t steps, int64_t loss, double momentum,
                                                       double weight_decay, bool first_order, bool gram) {
  check_cpu(support, "support");
  check_linear_head(support, labels, query, weight, bias, rates, bias_rates, steps, loss, gram);
  const int64_t T = support.size(0), n = support.size(1), m = query.size(1), d = support.size(2), C = weight.size(1);
  Tensor logits = empty(support, {T, m, C}), out_weight = empty(support, {T, C, d});
  Tensor out_bias = empty(support, {T, bias ? C : 0}), tape = empty(support, {T, gram ? n + C : 0, padded(n)});
  dispatch_full(support.scalar_type(), "support", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    const Head<A> head(support, labels, query, weight, bias, rates, bias_rates, rate, steps, loss, momentum,
                       weight_decay, first_order);
    const int64_t stride = head.stride, size = C * stride;
    A *to_weight = out_weight.mutable_data_ptr<A>(), *to_bias = out_bias.mutable_data_ptr<A>();
    A *to_logits = logits.mutable_data_ptr<A>(), *to_tape = tape.mutable_data_ptr<A>();
    auto* products = METAFAST_KERNEL(row_products<A>);
    auto* combine = METAFAST_KERNEL(combine_rows<A, 1>);
    const auto rows_query = input_rows<A>(head.query);
    const auto queries = [&](int64_t t, int64_t block) {
      const int64_t first = block * kRowBlock, last = std::min(first + kRowBlock, m);
      products(rows_query, {to_weight, C * d, d}, t, t, first, last, C, d, A(1), A(0), bias ? to_bias + t * C : nullptr,
               to_logits + t * m * C, C, 1);
    };
    const Stage query_stage{head.blocks(m), kRowBlock * C * d, queries};
    if (!gram) {
      auto* take_steps = METAFAST_KERNEL(weight_steps<A>);
      const auto adapt = [&](int64_t t, int64_t) {
        const Scratch<A> storage((C + 1) * stride), arrays(2 * size + C * d), rest(2 * stride + 2 * C);
        const InnerLoop<A> loop = head.loop_of(t, storage.get());
        A *own_weight = to_weight + t * C * d, *own_bias = bias ? to_bias + t * C : nullptr;
        std::copy_n(head.weight.of(t), C * d, own_weight);
        if (bias) std::copy_n(head.bias.of(t), C, own_bias);
        A* scratch = rest.get();
        take_steps(loop, head.support_of(t), d, head.weight_rates(t), head.own_bias_rates(t),
                   {arrays.get(), arrays.get() + size, arrays.get() + 2 * size, own_weight, scratch, own_bias, 0},
                   scratch + C);
      };
      parallel_stages(T, Stage{1, 2 * steps * n * C * d, adapt}, query_stage);
      return;
    }
    auto* squares = METAFAST_KERNEL(gram_rows<A>);
    auto* take_steps = METAFAST_KERNEL(head_steps<A>);
    const PerRow<A> spans(T, size), scales(T, C);
    const Chunks chunks(T, d, 1);
    const auto products_of_support = [&](int64_t t, int64_t block) {
      const int64_t first = block * kRowBlock, last = std::min(first + kRowBlock, n);
      A *own = to_tape + t * (n + C) * stride, *first_logits = own + n * stride;
      const Rows<const A> x = head.support_of(t);
      for (int64_t i = first; i < last; ++i) std::fill(own + i * stride + n, own + (i + 1) * stride, A(0));
      squares(x, 0, first, last, d, bias ? A(1) : A(0), own, stride);
      products(x, head.weight_of(t), 0, 0, first, last, C, d, A(1), A(0), head.bias.of(t), first_logits, 1, stride);
    };
    const auto adapt = [&](int64_t t, int64_t) {
      const Scratch<A> storage((C + 1) * stride), arrays(2 * size), rest((C + 2) * stride + C);
      A *own = to_tape + t * (n + C) * stride, *first_logits = own + n * stride;
      for (int64_t c = 0; c < C; ++c) std::fill(first_logits + c * stride + n, first_logits + (c + 1) * stride, A(0));
      const InnerLoop<A> loop = head.loop_of(t, storage.get());
      A* scratch = rest.get();
      take_steps(loop, own, first_logits, head.weight_rates(t),
                 {arrays.get(), arrays.get() + size, spans.of(t), scales.of(t), scratch, 0}, scratch + C);
      if (!bias) return;
      for (int64_t c = 0; c < C; ++c) {
        double value = scales.of(t)[c] * head.bias.of(t)[c];
        for (int64_t i = 0; i < n; ++i) value += spans.of(t)[c * stride + i];
        to_bias[t * C + c] = static_cast<A>(value);
      }
    };
    const auto weights = [&](int64_t t, int64_t chunk) {
      const int64_t first = chunk * chunks.size, last = std::min(first + chunks.size, d);
      const Rows<const A> x = head.support_of(t);
      const Terms<A> terms[1] = {{spans.of(t), stride, 1, x.data, x.row_stride, n}};
      combine(terms, A(1), head.weight.of(t), d, scales.of(t), to_weight + t * C * d, d, C, first, last);
    };
    parallel_stages(T, Stage{head.blocks(n), kRowBlock * (n / 2 + C) * d, products_of_support},
                    Stage{1, steps * n * stride * C, adapt}, Stage{chunks.count, n * C * chunks.size, weights},
                    query_stage);
  });
  return {logits, out_weight, out_bias, tape};
}

// The sum over the tasks of each group of what each task gives, in their order: `size` numbers a task.
template <class A>
void sum_groups(const A* parts, const Tensor& out, int64_t tasks) {
  const int64_t groups = out.size(0);
  A* to = out.mutable_data_ptr<A>();
  if (groups == 0) return;
  const int64_t size = out.numel() / groups, each = tasks / groups;
  constexpr int64_t kPiece = 1024;
  const int64_t pieces = (size + kPiece - 1) / kPiece;
  parallel(groups * pieces, each * kPiece, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t g = item / pieces, first = item % pieces * kPiece, last = std::min(first + kPiece, size);
      A* own = to + g * size;
      std::fill(own + first, own + last, A(0));
      for (int64_t t = g * each; t < (g + 1) * each; ++t) {
        for (int64_t k = first; k < last; ++k) own[k] += parts[t * size + k];
      }
    }
  });
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients linear_head_vjp(const std::optional<Tensor>& grad_logits, const std::optional<Tensor>& grad_weight,
                          const std::optional<Tensor>& grad_bias, const Tensor& support, const Tensor& labels,
                          const Tensor& query, const Tensor& weight, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& rates, const std::optional<Tensor>& bias_rates, double rate,
                          int64_t steps, int64_t loss, double momentum, double weight_decay, bool first_order,
                          bool gram, const Tensor& adapted, const Tensor& tape) {
  check_cpu(support, "support");
  check_linear_head(support, labels, query, weight, bias, rates, bias_rates, steps, loss, gram);
  check_linear_head_upstream(grad_logits, grad_weight, grad_bias, support, query, weight, bias, gram, adapted, tape);
  const int64_t T = support.size(0), n = support.size(1), m = query.size(1), d = support.size(2), C = weight.size(1);
  const bool soft = labels.dim() == 3;
  Tensor to_support = empty(support, {T, n, d}), to_labels = empty(support, {soft ? T : 0, n, C});
  Tensor to_query = empty(support, {T, m, d}), to_weight = empty(support, {weight.size(0), C, d});
  Tensor to_bias = empty(support, {bias ? bias->size(0) : 0, C});
  const auto like = [&](const std::optional<Tensor>& tensor) {
    return tensor ? torch::stable::empty_like(dense(*tensor)) : empty(support, {0});
  };
  Tensor to_rates = like(rates), to_bias_rates = like(bias_rates);
  dispatch_full(support.scalar_type(), "support", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    const Head<A> head(support, labels, query, weight, bias, rates, bias_rates, rate, steps, loss, momentum,
                       weight_decay, first_order);
    const int64_t stride = head.stride, size = C * stride;
    const auto upstream = [&](const std::optional<Tensor>& grad) {
      return grad ? std::optional<Tensor>(dense(*grad)) : std::nullopt;
    };
    const std::optional<Tensor> own_logits = upstream(grad_logits), own_weight = upstream(grad_weight),
                                own_bias = upstream(grad_bias);
    const A* from_logits = own_logits ? own_logits->template const_data_ptr<A>() : nullptr;
    const A* from_weight = own_weight ? own_weight->template const_data_ptr<A>() : nullptr;
    const A* from_bias = own_bias ? own_bias->template const_data_ptr<A>() : nullptr;
    const Tensor rows_adapted = dense(adapted), rows_tape = dense(tape);
    const A* last_weight = rows_adapted.template const_data_ptr<A>();
    A *features_grad = to_support.mutable_data_ptr<A>(), *query_grad = to_query.mutable_data_ptr<A>();
    A* labels_grad = to_labels.mutable_data_ptr<A>();
    auto* products = METAFAST_KERNEL(row_products<A>);
    auto* combine = METAFAST_KERNEL(combine_rows<A, 1>);
    const auto rows_query = input_rows<A>(head.query);
    const Chunks chunks(T, d, 1);
    // What each task gives the arguments of its group.
    const PerRow<A> weight_parts(T, C * d), bias_parts(T, C), rates_parts(T, rates ? head.rates.size : 0);
    const PerRow<A> bias_rates_parts(T, bias_rates ? head.bias_rates.size : 0);

    const auto last_gradients = [&](int64_t t, int64_t chunk) {
      const int64_t first = chunk * chunks.size, last = std::min(first + chunks.size, d);
      const A* own = from_logits == nullptr ? nullptr : from_logits + t * m * C;
      const int64_t rows = from_logits == nullptr ? 0 : m;
      const Terms<A> of_weight[1] = {{own, 1, C, rows_query.row(t, 0), head.query.stride(1), rows}};
      combine(of_weight, A(1), from_weight == nullptr ? nullptr : from_weight + t * C * d, d, nullptr,
              weight_parts.of(t), d, C, first, last);
      const Terms<A> of_query[1] = {{own, C, 1, last_weight + t * C * d, d, from_logits == nullptr ? 0 : C}};
      combine(of_query, A(1), nullptr, 0, nullptr, query_grad + t * m * d, d, m, first, last);
    };
    const auto last_bias = [&](int64_t t, int64_t) {
      for (int64_t c = 0; c < C; ++c) {
        double value = from_bias == nullptr ? A(0) : from_bias[t * C + c];
        for (int64_t i = 0; from_logits != nullptr && i < m; ++i) value += from_logits[(t * m + i) * C + c];
        bias_parts.of(t)[c] = static_cast<A>(value);
      }
    };
    const Stage gradients_stage{chunks.count, 2 * m * C * chunks.size, last_gradients};
    const Stage bias_stage{bias ? 1 : 0, m * C, last_bias};
    const auto store_labels = [&](int64_t t, const A* targets_grad) {
      for (int64_t i = 0; soft && i < n; ++i) {
        for (int64_t c = 0; c < C; ++c) labels_grad[(t * n + i) * C + c] = targets_grad[c * stride + i];
      }
    };
    if (gram) {
      auto* take_steps = METAFAST_KERNEL(head_steps<A>);
      auto* reverse = METAFAST_KERNEL(head_reverse<A>);
      auto* combine_three = METAFAST_KERNEL(combine_rows<A, 3>);
      const A* tapes = rows_tape.template const_data_ptr<A>();
      const PerRow<A> span_grads(T, size), logits_grads(T, size), spans(T, size), scales(T, C), grams(T, n * stride);
      const auto products_of_gradient = [&](int64_t t, int64_t block) {
        const int64_t first = block * kRowBlock, last = std::min(first + kRowBlock, n);
        products(head.support_of(t), {weight_parts.of(t), 0, d}, 0, 0, first, last, C, d, A(1), A(0),
                 bias ? bias_parts.of(t) : nullptr, span_grads.of(t), 1, stride);
      };
      const auto sweep = [&](int64_t t, int64_t) {
        const Scratch<A> storage((C + 1) * stride), arrays((3 * steps + 1) * size), targets_grad(size);
        const Scratch<A> small((2 * steps + 1) * C + C), rates_grad(steps * C), rest(2 * size + 2 * stride + C);
        const InnerLoop<A> loop = head.loop_of(t, storage.get());
        const A *own = tapes + t * (n + C) * stride, *first_logits = own + n * stride;
        A *probability = arrays.get(), *direction = probability + steps * size, *span = direction + steps * size;
        A *scale = small.get(), *momenta = scale + (steps + 1) * C, *scale_grad = momenta + steps * C;
        const SpanTape<A> kept{probability, direction, span, scale, momenta, 1};
        const Rates<A> own_rates = head.weight_rates(t);
        take_steps(loop, own, first_logits, own_rates, kept, rest.get());
        std::copy_n(span + steps * size, size, spans.of(t));
        // Of a first-order loop the adapted weight is W_0 and a constant.
        for (int64_t c = 0; c < C; ++c) scales.of(t)[c] = first_order ? A(1) : scale[steps * C + c];
        for (int64_t c = 0; c < C; ++c) {
          std::fill(span_grads.of(t) + c * stride + n, span_grads.of(t) + (c + 1) * stride, A(0));
          scale_grad[c] = A(0);
        }
        if (loop.decay != A(0)) {
          for (int64_t c = 0; c < C; ++c) {
            const Rows<const A> first{head.weight.of(t) + c * d, 0, d};
            products({weight_parts.of(t), 0, d}, first, 0, 0, c, c + 1, 1, d, A(1), A(0), nullptr, scale_grad + c, 0,
                     1);
            if (bias) scale_grad[c] += bias_parts.of(t)[c] * head.bias.of(t)[c];
          }
        }
        reverse(loop, own, first_logits, own_rates, kept, span_grads.of(t), scale_grad, logits_grads.of(t), grams.of(t),
                rates_grad.get(), targets_grad.get(), rest.get());
        store_labels(t, targets_grad.get());
        if (rates) {
          A* to = rates_parts.of(t);
          std::fill_n(to, head.rates.size, A(0));
          for (int64_t k = 0; k < steps * C; ++k) {
            to[k / C * own_rates.step_stride + k % C * own_rates.class_stride] += rates_grad.get()[k];
          }
        }
        for (int64_t c = 0; bias && c < C; ++c) {
          double value = scales.of(t)[c] * bias_parts.of(t)[c];
          for (int64_t i = 0; i < n; ++i) value += logits_grads.of(t)[c * stride + i];
          bias_parts.of(t)[c] = static_cast<A>(value);
        }
      };
      const auto first_gradients = [&](int64_t t, int64_t chunk) {
        const int64_t first = chunk * chunks.size, last = std::min(first + chunks.size, d);
        const Rows<const A> x = head.support_of(t);
        A* own = weight_parts.of(t);
        const int64_t used = first_order ? 0 : 1;
        const Terms<A> of_features[3] = {{logits_grads.of(t), 1, stride, head.weight.of(t), d, used * C},
                                         {spans.of(t), 1, stride, own, d, used * C},
                                         {grams.of(t), stride, 1, x.data, x.row_stride, used * n}};
        combine_three(of_features, A(1), nullptr, 0, nullptr, features_grad + t * n * d, d, n, first, last);
        const Terms<A> of_weight[1] = {{logits_grads.of(t), stride, 1, x.data, x.row_stride, n}};
        combine(of_weight, A(1), own, d, scales.of(t), own, d, C, first, last);
      };
      parallel_stages(T, gradients_stage, bias_stage, Stage{head.blocks(n), kRowBlock * C * d, products_of_gradient},
                      Stage{1, 4 * steps * n * stride * C, sweep},
                      Stage{chunks.count, n * (n + 3 * C) * chunks.size, first_gradients});
    } else {
      auto* take_steps = METAFAST_KERNEL(weight_steps<A>);
      auto* reverse = METAFAST_KERNEL(weight_reverse<A>);
      const auto sweep = [&](int64_t t, int64_t) {
        const Scratch<A> storage((C + 1) * stride), arrays(2 * steps * size), weights((2 * steps + 1) * C * d);
        const Scratch<A> small((2 * steps + 1) * C), targets_grad(size), rest(size + C * (d + 1) + 2 * stride);
        const InnerLoop<A> loop = head.loop_of(t, storage.get());
        A *probability = arrays.get(), *error = probability + steps * size;
        A *direction = weights.get(), *own_weights = direction + steps * C * d;
        A *bias_direction = small.get(), *biases = bias_direction + steps * C;
        std::copy_n(head.weight.of(t), C * d, own_weights);
        if (bias) std::copy_n(head.bias.of(t), C, biases);
        const WeightTape<A> kept{
            probability, error, direction, own_weights, bias_direction, bias ? biases : nullptr, 1};
        const Rates<A> own_rates = head.weight_rates(t), bias_rates_of = head.own_bias_rates(t);
        take_steps(loop, head.support_of(t), d, own_rates, bias_rates_of, kept, rest.get());
        if (rates) std::fill_n(rates_parts.of(t), head.rates.size, A(0));
        if (bias_rates) std::fill_n(bias_rates_parts.of(t), head.bias_rates.size, A(0));
        A* to_rates_of_bias = bias_rates ? bias_rates_parts.of(t) : (rates ? rates_parts.of(t) : nullptr);
        reverse(loop, head.support_of(t), d, own_rates, bias_rates_of, kept, weight_parts.of(t),
                bias ? bias_parts.of(t) : nullptr, {features_grad + t * n * d, 0, d},
                rates ? rates_parts.of(t) : nullptr, to_rates_of_bias, targets_grad.get(), rest.get());
        store_labels(t, targets_grad.get());
      };
      parallel_stages(T, gradients_stage, bias_stage, Stage{1, 6 * steps * n * C * d, sweep});
    }
    sum_groups(weight_parts.values.get(), to_weight, T);
    if (bias) sum_groups(bias_parts.values.get(), to_bias, T);
    if (rates) sum_groups(rates_parts.values.get(), to_rates, T);
    if (bias_rates) sum_groups(bias_rates_parts.values.get(), to_bias_rates, T);
  });
  return {to_support, to_labels, to_query, to_weight, to_bias, to_rates, to_bias_rates};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, m) {
  m.impl("linear_head", TORCH_BOX(&linear_head));
  m.impl("linear_head_vjp", TORCH_BOX(&linear_head_vjp));
}

}  // namespace metafast
