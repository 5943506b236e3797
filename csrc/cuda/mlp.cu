// The inner loop of an MLP and its reverse sweep on a GPU: checks, memory and the order of the launches.
#include "cuda/mlp.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cuda/tensors.cuh"
#include "mlp_arguments.h"

namespace metafast {
namespace {

using cuda::Scratch;
using cuda::StepRates;
using cuda::Strided;
using cuda::TaskLabels;
using cuda::WorkingMemory;
using torch::stable::new_empty;

template <class A>
Strided<A> batch_of(const Tensor& tensor) {
  return {tensor.const_data_ptr<A>(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// A matrix or a vector, of which `own` is the number of dimensions, for each group or for all.
template <class A>
Strided<A> groups_of(const Tensor& tensor, int64_t own) {
  const int64_t lead = tensor.dim() - own;
  return {tensor.const_data_ptr<A>(), lead ? tensor.stride(0) : 0, tensor.stride(lead),
          own == 2 ? tensor.stride(lead + 1) : 0};
}

// What the kernels of one call work on, and what it needs to stay alive.
template <class A>
struct MlpCall {
  cuda::MlpProblem<A> problem{};
  int64_t rate_numbers = 0;  // of a task
  std::optional<TaskLabels> labels;
  std::optional<WorkingMemory<A>> memory;

  MlpCall(const MlpArguments& from, double rate, A* tape, bool backward) {
    cuda::MlpProblem<A>& p = problem;
    p.inputs = batch_of<A>(from.inputs);
    if (from.labelled()) {
      labels.emplace(from.targets);
      p.labels = labels->view();
    } else {
      p.targets = batch_of<A>(from.targets);
    }
    if (from.query) p.query = batch_of<A>(*from.query);
    p.layers = from.layers(), p.in = from.width[0], p.rows = from.rows, p.query_rows = from.query_rows;
    p.row_limit = std::max(p.rows, std::min(p.query_rows, cuda::kQueryRows));
    p.steps = from.steps;
    p.group_tasks = from.tasks / from.groups, p.rate_group_tasks = from.tasks / from.rate_groups;
    p.rate = static_cast<A>(rate);
    p.rates =
        from.rates.empty() ? StepRates::number : (from.rate_for_each() ? StepRates::parameters : StepRates::steps);
    p.activation = from.activation, p.loss = from.loss, p.first_order = from.first_order, p.factored = from.factored;
    p.tape = tape, p.tape_size = from.tape;
    for (int64_t l = 0; l < p.layers; ++l) add_layer(from, l);
    if (p.rates == StepRates::parameters) rate_numbers = p.packed;
    p.memory = p.memory_of(backward);
    memory.emplace(from.inputs, from.tasks, p.memory);
    p.global = memory->global();
  }

 private:
  void add_layer(const MlpArguments& from, int64_t l) {
    cuda::MlpProblem<A>& p = problem;
    cuda::MlpLayer<A>& layer = p.layer[l];
    const int64_t in = from.width[l], out = from.width[l + 1];
    layer = {groups_of<A>(from.weights[l], 2),
             groups_of<A>(from.biases[l], 1),
             {},
             {},
             out,
             p.parameters,
             p.packed,
             p.columns,
             p.tape_columns,
             0,
             0};
    if (l >= p.lowest()) {
      p.parameters += out * cuda::odd_stride(in + 1);
    } else {
      p.skipped = out * (in + 1);
    }
    p.packed += out * (in + 1);
    p.columns += cuda::odd_stride(out + 1);
    p.tape_columns += out;
    if (p.rates == StepRates::parameters) {
      layer.weight_rates = groups_of<A>(from.rates[l], 2);
      layer.bias_rates = groups_of<A>(from.rates[p.layers + l], 1);
    } else if (p.rates == StepRates::steps) {
      const bool one = from.rates.size() == 1;
      const Tensor& own = from.rates[one ? 0 : l];
      const int64_t size = own.size(-1);
      layer.weight_rates = groups_of<A>(own, 1);
      if (size == 1) layer.weight_rates.row = 0;
      layer.rate_at = one ? 0 : rate_numbers;
      layer.rate_step = size == 1 ? 0 : 1;
      rate_numbers = layer.rate_at + size;
    }
  }
};

void check_layers(const MlpArguments& arguments) {
  if (arguments.layers() > cuda::kMostLayers) {
    fail("weights: expected at most ", cuda::kMostLayers, " layers on a GPU, got ", arguments.layers());
  }
}

std::tuple<Tensor, Tensor, Tensor> mlp_loop(const Tensor& inputs, const Tensor& targets,
                                            const std::optional<Tensor>& query, const Tensors& weights,
                                            const Tensors& biases, const Tensors& rates, double rate, int64_t steps,
                                            int64_t activation, int64_t loss, bool first_order, bool factored) {
  cuda::check_device(inputs, "inputs");
  const MlpArguments arguments(inputs, targets, query, weights, biases, rates, steps, activation, loss, first_order,
                               factored);
  check_layers(arguments);
  const auto guard = cuda::device_guard(inputs);
  const int64_t T = arguments.tasks;
  Tensor outputs = new_empty(inputs, {T, arguments.query_rows, arguments.classes()});
  Tensor parameters = new_empty(inputs, {T, query ? 0 : arguments.packed});
  Tensor tape = new_empty(inputs, {T, arguments.tape});
  if (T == 0) return {outputs, parameters, tape};
  const auto stream = cuda::current_stream(inputs);
  dispatch_full(inputs.scalar_type(), "inputs", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    const MlpCall<A> call(arguments, rate, tape.template mutable_data_ptr<A>(), false);
    cuda::launch_mlp_adapt(call.problem, outputs.template mutable_data_ptr<A>(),
                           query ? nullptr : parameters.template mutable_data_ptr<A>(), T, call.memory->shared_bytes(),
                           stream);
  });
  return {outputs, parameters, tape};
}

// The gradients of `count` tensors from rows of numbers of the tasks. One for each parameter: the weights, then the
// biases, in rows that hold them layer by layer.
template <class A>
void sum_parts(const A* rows, const Tensor* tensors, int64_t count, int64_t layers, int64_t tasks, int64_t groups,
               cuda::Stream stream) {
  if (groups == 0) return;
  cuda::RowParts<A> parts{};
  int64_t size = 0;
  for (int64_t k = 0; k < count; ++k) {
    const Tensor& tensor = tensors[count == 2 * layers ? k / 2 + k % 2 * layers : k];
    size += tensor.numel() / groups;
    parts.to[k] = tensor.mutable_data_ptr<A>();
    parts.end[k] = size;
  }
  cuda::launch_sum_parts(rows, parts, tasks, groups, size, stream);
}

Tensors mlp_loop_vjp(const std::optional<Tensor>& grad_outputs, const std::optional<Tensor>& grad_parameters,
                     const Tensor& inputs, const Tensor& targets, const std::optional<Tensor>& query,
                     const Tensors& weights, const Tensors& biases, const Tensors& rates, double rate, int64_t steps,
                     int64_t activation, int64_t loss, bool first_order, bool factored, const Tensor& tape_any,
                     bool data) {
  cuda::check_device(inputs, "inputs");
  const MlpArguments arguments(inputs, targets, query, weights, biases, rates, steps, activation, loss, first_order,
                               factored);
  arguments.check_upstream(grad_outputs, grad_parameters, tape_any);
  check_layers(arguments);
  const auto guard = cuda::device_guard(inputs);
  const Tensor tape = dense(tape_any);
  const int64_t T = arguments.tasks, layers = arguments.layers();
  Tensors gradients =
      arguments.gradients(data, [&](std::initializer_list<int64_t> sizes) { return new_empty(inputs, sizes); });
  const auto stream = cuda::current_stream(inputs);
  dispatch_full(inputs.scalar_type(), "inputs", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    const Scratch<A> packed(inputs, T * arguments.packed);
    std::optional<Scratch<A>> of_rates;
    if (T > 0) {
      // The kernel only reads it.
      A* const tapes = const_cast<A*>(tape.template const_data_ptr<A>());
      const MlpCall<A> call(arguments, rate, tapes, true);
      of_rates.emplace(inputs, T * call.rate_numbers);
      cuda::MlpGradients<A> own{};
      if (grad_outputs && grad_outputs->numel() > 0) own.outputs = batch_of<A>(*grad_outputs);
      if (grad_parameters && !query) {
        const Tensor& given = *grad_parameters;
        own.parameters = {given.template const_data_ptr<A>(), given.stride(0), 0, given.stride(1)};
      }
      const auto values = [&](int64_t k, bool wanted) {
        return wanted ? gradients[k].template mutable_data_ptr<A>() : nullptr;
      };
      own.inputs = values(0, data);
      own.targets = values(1, data && !arguments.labelled());
      own.query = values(2, data && query);
      own.packed = packed.data(), own.rates = of_rates->data(), own.rate_numbers = call.rate_numbers;
      cuda::launch_mlp_adapt_vjp(call.problem, own, T, call.memory->shared_bytes(), stream);
    }
    const int64_t count = static_cast<int64_t>(rates.size());
    sum_parts(packed.data(), gradients.data() + 3, 2 * layers, layers, T, arguments.groups, stream);
    if (count == 0) return;
    const A* const rows = of_rates ? of_rates->data() : nullptr;
    sum_parts(rows, gradients.data() + 3 + 2 * layers, count, layers, T, arguments.rate_groups, stream);
  });
  return gradients;
}

}  // namespace

METAFAST_CUDA_LIBRARY(m) {
  m.impl("mlp_loop", TORCH_BOX(&mlp_loop));
  m.impl("mlp_loop_vjp", TORCH_BOX(&mlp_loop_vjp));
}

}  // namespace metafast
