// The inner loop of an MLP and its reverse sweep on the CPU: one thread for each task.
#include "cpu/mlp.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/distance.h"
#include "mlp_arguments.h"

#define METAFAST_KERNELS "cpu/mlp_kernels.h"
#include "cpu/for_each_isa.h"

namespace metafast {
namespace {

// The checked arguments that both operators share, and the layout of the blocks.
struct MlpLayout : MlpArguments {
  std::vector<int64_t> weight, bias, column;
  MlpPlan plan{};

  template <class... Arguments>
  explicit MlpLayout(const Tensor& any, const Arguments&... rest) : MlpArguments(any, rest...) {
    check_cpu(inputs, "inputs");
    int64_t parameters = 0, columns = 0;
    weight.resize(layers()), bias.resize(layers()), column.resize(layers());
    for (int64_t l = 0; l < layers(); ++l) {
      column[l] = columns;
      columns += padded(width[l + 1]);
    }
    const auto place = [&](int64_t l, int64_t numbers) {
      weight[l] = parameters;
      bias[l] = parameters + numbers;
      parameters = bias[l] + padded(width[l + 1]);
    };
    for (int64_t l = 1; l < layers(); ++l) place(l, width[l + 1] * padded(width[l]));
    const int64_t above = parameters;
    place(0, width[0] * padded(width[1]));
    plan = {layers(),      rows,        query_rows,    steps,       width.data(),
            weight.data(), bias.data(), column.data(), parameters,  factored ? above : parameters,
            columns,       activation,  loss,          first_order, factored};
  }

  int64_t group(int64_t t) const { return t / (tasks / groups); }
  int64_t rate_group(int64_t t) const { return t / (tasks / rate_groups); }

  // About the multiply-adds of a task, forward or backward.
  int64_t work(bool backward) const {
    return plan.parameters * (plan.steps * plan.rows * (backward ? 6 : 3) + plan.query_rows * (backward ? 2 : 1) + 1);
  }
};

// Group g of a tensor with or without a leading dimension; a vector is one row.
template <class A>
Matrix<A> matrix_of(const Tensor& tensor, int64_t own, int64_t g) {
  const int64_t lead = tensor.dim() - own;
  const A* data = tensor.const_data_ptr<A>() + (lead ? g * tensor.stride(0) : 0);
  return {data, own == 2 ? tensor.stride(lead) : 0, tensor.stride(tensor.dim() - 1)};
}

// visit(o, k) for a weight [out, in]; in squares, as one of what is read and what is written is a column at a time.
template <class Visit>
void for_each_weight(int64_t out, int64_t in, const Visit& visit) {
  constexpr int64_t kSide = 16;
  for (int64_t first_o = 0; first_o < out; first_o += kSide) {
    for (int64_t first_k = 0; first_k < in; first_k += kSide) {
      for (int64_t o = first_o; o < std::min(first_o + kSide, out); ++o) {
        for (int64_t k = first_k; k < std::min(first_k + kSide, in); ++k) visit(o, k);
      }
    }
  }
}

// A block of parameters, pads zero, from tensors of the layers beginning with `lowest`.
template <class A>
void pack(const MlpPlan& plan, const Tensor* weights, const Tensor* biases, int64_t lowest, int64_t g, A* block) {
  std::fill_n(block, lowest == 0 ? plan.parameters : plan.stepped, A(0));
  for (int64_t l = lowest; l < plan.layers; ++l) {
    const int64_t in = plan.width[l], out = plan.width[l + 1];
    const Matrix<A> weight = matrix_of<A>(weights[l], 2, g), bias = matrix_of<A>(biases[l], 1, g);
    A* to = block + plan.weight[l];
    const int64_t row = l == 0 ? 1 : padded(in), column = l == 0 ? padded(out) : 1;
    for_each_weight(out, in, [&](int64_t o, int64_t k) {
      to[o * row + k * column] = weight.data[o * weight.row + k * weight.column];
    });
    for (int64_t o = 0; o < out; ++o) block[plan.bias[l] + o] = bias.data[o * bias.column];
  }
}

// Visits the elements of the first layer and of a block with the others in the order of the packed parameters: layer by
// layer, weight [out, in] and bias.
template <class Element, class Visit>
void for_each_parameter(const MlpPlan& plan, Element* first, Element* others, const Visit& visit) {
  for (int64_t l = 0; l < plan.layers; ++l) {
    const int64_t in = plan.width[l], out = plan.width[l + 1];
    Element* from = l == 0 ? first : others + plan.weight[l];
    const int64_t row = l == 0 ? 1 : padded(in), column = l == 0 ? padded(out) : 1;
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t k = 0; k < in; ++k) visit(from[o * row + k * column]);
    }
    from += plan.bias[l] - plan.weight[l];
    for (int64_t o = 0; o < out; ++o) visit(from[o]);
  }
}

// The initial parameters of every group and the rates of every group of rates, as the kernels want them.
template <class A>
struct MlpBlocks {
  const MlpLayout& arguments;
  Scratch<A> initial;      // [G, block]
  Scratch<A> step_rates;   // [rate groups, steps, layers]
  Scratch<A> block_rates;  // [rate groups, block]
  Tensor labels;

  MlpBlocks(const MlpLayout& from, double rate, bool first_layer)
      : arguments(from),
        initial(from.groups * from.plan.parameters),
        step_rates(from.rate_groups * from.plan.steps * from.plan.layers),
        block_rates(from.rate_for_each() ? from.rate_groups * from.plan.parameters : 0),
        labels(from.targets) {
    const MlpPlan& plan = from.plan;
    for (int64_t g = 0; g < from.groups; ++g) {
      pack<A>(plan, from.weights.data(), from.biases.data(), first_layer ? 0 : 1, g,
              initial.get() + g * plan.parameters);
    }
    for (int64_t g = 0; g < from.rate_groups; ++g) {
      if (from.rate_for_each()) {
        pack<A>(plan, from.rates.data(), from.rates.data() + plan.layers, 0, g,
                block_rates.get() + g * plan.parameters);
        continue;
      }
      for (int64_t t = 0; t < plan.steps; ++t) {
        for (int64_t l = 0; l < plan.layers; ++l) {
          A value = static_cast<A>(rate);
          if (!from.rates.empty()) {
            const Tensor& own = from.rates[from.rates.size() == 1 ? 0 : l];
            const Matrix<A> row = matrix_of<A>(own, 1, g);
            value = row.data[own.size(-1) == 1 ? 0 : t * row.column];
          }
          step_rates.get()[(g * plan.steps + t) * plan.layers + l] = value;
        }
      }
    }
    if (from.labelled()) {
      if (!labels.is_contiguous()) labels = torch::stable::contiguous(labels);
      const int64_t* const begin = labels.const_data_ptr<int64_t>();
      const int64_t* const end = begin + from.tasks * plan.rows;
      const int64_t classes = from.width.back();
      const int64_t* const bad = std::find_if(begin, end, [&](int64_t y) { return y < 0 || y >= classes; });
      if (bad != end) fail("targets: expected class numbers from 0 to ", classes - 1, ", got ", *bad);
    }
  }

  MlpTask<A> task(int64_t t, A* tape) const {
    const MlpPlan& plan = arguments.plan;
    const int64_t g = arguments.rate_group(t);
    MlpTask<A> own{};
    own.inputs = matrix_of<A>(arguments.inputs, 2, t);
    if (arguments.labelled()) {
      own.labels = labels.const_data_ptr<int64_t>() + t * plan.rows;
    } else {
      own.targets = matrix_of<A>(arguments.targets, 2, t);
    }
    if (arguments.query) own.query = matrix_of<A>(*arguments.query, 2, t);
    own.initial = initial.get() + arguments.group(t) * plan.parameters;
    if (arguments.rate_for_each()) {
      own.block_rates = block_rates.get() + g * plan.parameters;
    } else {
      own.step_rates = step_rates.get() + g * plan.steps * plan.layers;
    }
    own.tape = tape + t * plan.tape();
    return own;
  }
};

std::tuple<Tensor, Tensor, Tensor> mlp_loop(const Tensor& inputs, const Tensor& targets,
                                            const std::optional<Tensor>& query, const Tensors& weights,
                                            const Tensors& biases, const Tensors& rates, double rate, int64_t steps,
                                            int64_t activation, int64_t loss, bool first_order, bool factored) {
  const MlpLayout arguments(inputs, targets, query, weights, biases, rates, steps, activation, loss, first_order,
                            factored);
  const MlpPlan& plan = arguments.plan;
  const int64_t T = arguments.tasks, m = plan.query_rows, C = arguments.width.back(), P = arguments.packed;
  Tensor outputs = empty(inputs, {T, m, C}), parameters = empty(inputs, {T, query ? 0 : P});
  Tensor tape = empty(inputs, {T, plan.tape()});
  dispatch_full(inputs.scalar_type(), "inputs", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    const MlpBlocks<A> blocks(arguments, rate, true);
    auto* kernel = METAFAST_KERNEL(mlp_adapt<A>);
    auto* first_layer = METAFAST_KERNEL(mlp_first_layer<A>);
    A* tapes = tape.template mutable_data_ptr<A>();
    A* to_outputs = outputs.template mutable_data_ptr<A>();
    A* to_parameters = parameters.template mutable_data_ptr<A>();
    parallel(T, arguments.work(false), [&](int64_t begin, int64_t end) {
      const Scratch<A> scratch(plan.scratch(false)), first(plan.factored && !query ? plan.first() : 0);
      for (int64_t t = begin; t < end; ++t) {
        const MlpTask<A> task = blocks.task(t, tapes);
        kernel(plan, task, scratch.get());
        const A* top = task.tape + steps * plan.step() + m * plan.column[plan.layers - 1];
        for (int64_t i = 0; i < m; ++i) std::copy_n(top + i * padded(C), C, to_outputs + (t * m + i) * C);
        if (query) continue;
        A* to = to_parameters + t * P;
        const A* adapted = steps == 0 ? task.initial : task.tape + steps * plan.step() - plan.stepped;
        if (plan.factored) first_layer(plan, task, first.get());
        for_each_parameter(plan, plan.factored ? first.get() : adapted + plan.weight[0], adapted,
                           [&](const A& value) { *to++ = value; });
      }
    });
  });
  return {outputs, parameters, tape};
}

Tensors mlp_loop_vjp(const std::optional<Tensor>& grad_outputs, const std::optional<Tensor>& grad_parameters,
                     const Tensor& inputs, const Tensor& targets, const std::optional<Tensor>& query,
                     const Tensors& weights, const Tensors& biases, const Tensors& rates, double rate, int64_t steps,
                     int64_t activation, int64_t loss, bool first_order, bool factored, const Tensor& tape_any,
                     bool data) {
  const MlpLayout arguments(inputs, targets, query, weights, biases, rates, steps, activation, loss, first_order,
                            factored);
  const MlpPlan& plan = arguments.plan;
  const int64_t T = arguments.tasks, n = plan.rows, m = plan.query_rows;
  const int64_t in = arguments.width[0], C = arguments.width.back();
  arguments.check_upstream(grad_outputs, grad_parameters, tape_any);
  const Tensor tape = tape_any.is_contiguous() ? tape_any : torch::stable::contiguous(tape_any);
  const bool soft = data && !arguments.labelled();
  Tensors gradients =
      arguments.gradients(data, [&](std::initializer_list<int64_t> sizes) { return empty(inputs, sizes); });
  dispatch_full(inputs.scalar_type(), "inputs", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    // The factored sweep needs the first layer for the data's gradients only.
    const MlpBlocks<A> blocks(arguments, rate, data || !plan.factored);
    auto* kernel = METAFAST_KERNEL(mlp_adapt_vjp<A>);
    auto* first_gradient = METAFAST_KERNEL(mlp_first_gradient<A>);
    auto* add_up = METAFAST_KERNEL(sum_blocks<A>);
    const int64_t block = plan.stepped, table = plan.steps * plan.layers;
    const bool each = arguments.rate_for_each(), any_rate = !rates.empty();
    const Scratch<A> lam(T * block);
    const Scratch<A> to_block_rates(each ? T * block : 0), to_step_rates(any_rate && !each ? T * table : 0);
    const int64_t stride = padded(arguments.width[1]), factors = plan.factored ? (m + n + 1) * stride : 0;
    const bool given = plan.factored && !query;
    const Scratch<A> all_factors(T * factors), all_given(given ? T * plan.first() : 0);
    // The kernel only reads it.
    A* tapes = const_cast<A*>(tape.template const_data_ptr<A>());
    const auto values = [&](int64_t k, bool wanted) {
      return wanted ? gradients[k].template mutable_data_ptr<A>() : nullptr;
    };
    A* const to_inputs = values(0, data);
    A* const to_targets = values(1, soft);
    A* const to_query = values(2, data && query);
    const bool upstream = grad_outputs && m * C > 0;
    const int64_t work = arguments.work(true);
    parallel(T, work, [&](int64_t begin, int64_t end) {
      const Scratch<A> scratch(plan.scratch(true));
      for (int64_t t = begin; t < end; ++t) {
        MlpGradients<A> own{};
        own.parameters = lam.get() + t * block;
        if (upstream) {
          own.outputs = matrix_of<A>(*grad_outputs, 2, t);
        } else {
          std::fill_n(own.parameters, block, A(0));
        }
        own.factors = all_factors.get() + t * factors;
        if (plan.factored && !upstream) std::fill_n(own.factors, factors, A(0));
        if (given) std::fill_n(own.first = all_given.get() + t * plan.first(), plan.first(), A(0));
        if (grad_parameters && !query) {
          const Matrix<A> from = matrix_of<A>(*grad_parameters, 1, t);
          int64_t k = 0;
          for_each_parameter(plan, given ? own.first : own.parameters + plan.weight[0], own.parameters,
                             [&](A& value) { value = from.data[k++ * from.column]; });
        }
        if (to_inputs) std::fill_n(own.inputs = to_inputs + t * n * in, n * in, A(0));
        if (to_targets) std::fill_n(own.targets = to_targets + t * n * C, n * C, A(0));
        if (to_query) {
          own.query = to_query + t * m * in;
          if (!upstream) std::fill_n(own.query, m * in, A(0));
        }
        if (each) std::fill_n(own.block_rates = to_block_rates.get() + t * block, block, A(0));
        if (any_rate && !each) own.step_rates = to_step_rates.get() + t * table;
        own.scratch = scratch.get();
        kernel(plan, blocks.task(t, tapes), own);
      }
    });
    // Each group's sum over its tasks, in their order, into the block of its first.
    const auto add_groups = [&](const Scratch<A>& of_tasks, int64_t size, int64_t groups) {
      if (groups == 0 || groups == T || T == 0) return;
      constexpr int64_t kChunk = 1024;
      const int64_t count = T / groups, chunks = (size + kChunk - 1) / kChunk;
      parallel(groups * chunks, count * kChunk, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          const int64_t first = k % chunks * kChunk;
          A* own = of_tasks.get() + k / chunks * count * size;
          add_up(own, size, count, first, std::min(first + kChunk, size));
        }
      });
    };
    const auto write_block = [&](const Scratch<A>& of_tasks, int64_t groups, int64_t at) {
      add_groups(of_tasks, block, groups);
      for (int64_t g = 0; g < groups; ++g) {
        for (int64_t l = plan.lowest(); l < plan.layers; ++l) {
          const int64_t fan_in = plan.width[l], out = plan.width[l + 1];
          A* to_weight = gradients[at + l].template mutable_data_ptr<A>() + g * out * fan_in;
          A* to_bias = gradients[at + plan.layers + l].template mutable_data_ptr<A>() + g * out;
          if (T == 0) {
            std::fill_n(to_weight, out * fan_in, A(0));
            std::fill_n(to_bias, out, A(0));
            continue;
          }
          const A* own = of_tasks.get() + g * (T / groups) * block;
          const int64_t row = l == 0 ? 1 : padded(fan_in), column = l == 0 ? padded(out) : 1;
          for_each_weight(out, fan_in, [&](int64_t o, int64_t k) {
            to_weight[o * fan_in + k] = own[plan.weight[l] + o * row + k * column];
          });
          std::copy_n(own + plan.bias[l], out, to_bias);
        }
      }
    };
    write_block(lam, arguments.groups, 3);
    if (plan.factored) {
      // Rows of each group's gradient, tasks in their order.
      constexpr int64_t kChunk = 64;
      const int64_t groups = arguments.groups, count = groups == 0 ? 0 : T / groups;
      const int64_t chunks = (in + kChunk - 1) / kChunk, out = arguments.width[1];
      A* const to_weight = gradients[3].template mutable_data_ptr<A>();
      A* const to_bias = gradients[3 + plan.layers].template mutable_data_ptr<A>();
      parallel(groups * chunks, count * kChunk * (n + m) * stride, [&](int64_t begin, int64_t end) {
        const Scratch<A> rows(kChunk * stride);
        for (int64_t item = begin; item < end; ++item) {
          const int64_t g = item / chunks, first = item % chunks * kChunk, last = std::min(first + kChunk, in);
          std::fill_n(rows.get(), kChunk * stride, A(0));
          for (int64_t t = g * count; t < (g + 1) * count; ++t) {
            const A* const from = all_given.get() + t * plan.first() + first * stride;
            for (int64_t k = 0; given && k < (last - first) * stride; ++k) rows.get()[k] += from[k];
            first_gradient(plan, blocks.task(t, tapes), all_factors.get() + t * factors, first, last, rows.get());
          }
          for (int64_t o = 0; o < out; ++o) {
            for (int64_t k = first; k < last; ++k) {
              to_weight[(g * out + o) * in + k] = rows.get()[(k - first) * stride + o];
            }
          }
        }
      });
      std::fill_n(to_bias, groups * out, A(0));
      for (int64_t t = 0; t < T; ++t) {
        const A* const from = all_factors.get() + (t + 1) * factors - stride;
        for (int64_t o = 0; o < out; ++o) to_bias[t / count * out + o] += from[o];
      }
    }
    const int64_t first_rate = 3 + 2 * plan.layers;
    if (each) write_block(to_block_rates, arguments.rate_groups, first_rate);
    if (!any_rate || each) return;
    add_groups(to_step_rates, table, arguments.rate_groups);
    for (size_t k = 0; k < rates.size(); ++k) {
      A* to = gradients[first_rate + k].template mutable_data_ptr<A>();
      const int64_t size = rates[k].size(-1);
      std::fill_n(to, arguments.rate_groups * size, A(0));
      for (int64_t g = 0; T > 0 && g < arguments.rate_groups; ++g) {
        const A* own = to_step_rates.get() + g * (T / arguments.rate_groups) * table;
        for (int64_t t = 0; t < steps; ++t) {
          A& sum = to[g * size + (size == 1 ? 0 : t)];
          for (int64_t l = 0; l < plan.layers; ++l) {
            if (rates.size() == 1 || l == static_cast<int64_t>(k)) sum += own[t * plan.layers + l];
          }
        }
      }
    }
  });
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, m) {
  m.impl("mlp_loop", TORCH_BOX(&mlp_loop));
  m.impl("mlp_loop_vjp", TORCH_BOX(&mlp_loop_vjp));
}

}  // namespace metafast
