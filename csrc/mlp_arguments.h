// The arguments of the inner loop of an MLP, checked; they hold on every device.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "check.h"
#include "math/activation.h"
#include "math/inner_loss.h"
#include "math/rows.h"

namespace metafast {

using Tensors = std::vector<Tensor>;

struct MlpArguments {
  const Tensor& inputs;
  const Tensor& targets;
  const std::optional<Tensor>& query;
  const Tensors& weights;
  const Tensors& biases;
  const Tensors& rates;
  int64_t steps;
  bool first_order;
  bool factored;
  Activation activation{};
  InnerLoss loss{};
  int64_t tasks = 0;
  int64_t rows = 0;
  int64_t query_rows = 0;
  int64_t groups = 1;
  int64_t rate_groups = 1;
  int64_t packed = 0;  // numbers of a task's parameters
  int64_t tape = 0;    // numbers of a task's tape
  std::vector<int64_t> width;

  MlpArguments(const Tensor& inputs_, const Tensor& targets_, const std::optional<Tensor>& query_,
               const Tensors& weights_, const Tensors& biases_, const Tensors& rates_, int64_t steps_,
               int64_t activation_, int64_t loss_, bool first_order_, bool factored_)
      : inputs(inputs_),
        targets(targets_),
        query(query_),
        weights(weights_),
        biases(biases_),
        rates(rates_),
        steps(steps_),
        first_order(first_order_),
        factored(factored_) {
    check_dim(inputs, "inputs", 3, "[T, n, in]");
    tasks = inputs.size(0), rows = inputs.size(1);
    if (layers() == 0 || biases.size() != weights.size()) fail("weights: expected at least one, and a bias for each");
    if (steps < 0) fail("steps: expected 0 or more, got ", steps);
    if (activation_ < 0 || activation_ > 1) fail("activation: expected 0 or 1, got ", activation_);
    if (loss_ < 0 || loss_ > 1) fail("loss: expected 0 or 1, got ", loss_);
    activation = static_cast<Activation>(activation_), loss = static_cast<InnerLoss>(loss_);
    const bool shared = weights[0].dim() == 2;
    if (!shared) groups = weights[0].size(0);
    check_group_count(groups, "weights");
    width.push_back(inputs.size(2));
    int64_t parameters = 0, columns = 0;
    for (int64_t l = 0; l < layers(); ++l) {
      const int64_t in = width[l], out = biases[l].size(-1);
      check_parameter(weights[l], "weights", groups, shared, {out, in});
      check_parameter(biases[l], "biases", groups, shared, {out});
      width.push_back(out);
      if (l > 0 || !factored) parameters += (l == 0 ? in * padded(out) : out * padded(in)) + padded(out);
      columns += padded(out);
      packed += out * (in + 1);
    }
    if (query) {
      check_like(*query, "query", inputs, "inputs");
      check_dim(*query, "query", 3, "[T, m, in]");
      query_rows = query->size(1);
      check_shape(*query, "query", {tasks, query_rows, width[0]});
    }
    if (labelled()) {
      check_labels(targets, "targets", inputs);
      check_shape(targets, "targets", {tasks, rows});
      if (loss != InnerLoss::cross_entropy) fail("targets: class numbers need cross_entropy");
    } else {
      check_like(targets, "targets", inputs, "inputs");
      check_shape(targets, "targets", {tasks, rows, width.back()});
    }
    check_rates();
    tape = steps * (2 * rows * columns + parameters) + query_rows * columns;
    if (factored) tape += (rows + query_rows) * padded(rows) + rows * padded(width[1]);
  }
  MlpArguments(const MlpArguments&) = delete;

  int64_t layers() const { return static_cast<int64_t>(weights.size()); }
  int64_t classes() const { return width.back(); }
  bool rate_for_each() const { return rates.size() == 2 * weights.size(); }
  bool labelled() const { return targets.scalar_type() == ScalarType::Long; }

  void check_upstream(const std::optional<Tensor>& grad_outputs, const std::optional<Tensor>& grad_parameters,
                      const Tensor& from_forward) const {
    check_like(from_forward, "tape", inputs, "inputs");
    check_shape(from_forward, "tape", {tasks, tape});
    if (grad_outputs) {
      check_like(*grad_outputs, "grad_outputs", inputs, "inputs");
      check_shape(*grad_outputs, "grad_outputs", {tasks, query_rows, classes()});
    }
    if (grad_parameters) {
      check_like(*grad_parameters, "grad_parameters", inputs, "inputs");
      check_shape(*grad_parameters, "grad_parameters", {tasks, query ? 0 : packed});
    }
  }

  // What the vjp returns, made by make({sizes}): gradients of inputs, targets, query, weights, biases and rates.
  template <class Make>
  Tensors gradients(bool data, const Make& make) const {
    Tensors made{data ? make({tasks, rows, width[0]}) : make({0}),
                 data && !labelled() ? make({tasks, rows, classes()}) : make({0}),
                 data && query ? make({tasks, query_rows, width[0]}) : make({0})};
    for (const Tensors* list : {&weights, &biases, &rates}) {
      for (const Tensor& tensor : *list) {
        switch (tensor.dim()) {
          case 1:
            made.push_back(make({tensor.size(0)}));
            break;
          case 2:
            made.push_back(make({tensor.size(0), tensor.size(1)}));
            break;
          default:
            made.push_back(make({tensor.size(0), tensor.size(1), tensor.size(2)}));
        }
      }
    }
    return made;
  }

 private:
  void check_group_count(int64_t count, const char* name) const {
    if (count < 0 || (count == 0 ? tasks != 0 : tasks % count != 0)) {
      fail(name, ": expected a leading dimension that divides ", tasks, ", got ", count);
    }
  }

  void check_parameter(const Tensor& tensor, const char* name, int64_t count, bool shared,
                       std::initializer_list<int64_t> own) const {
    check_like(tensor, name, inputs, "inputs");
    std::vector<int64_t> shape(own);
    if (!shared) shape.insert(shape.begin(), count);
    bool same = tensor.dim() == static_cast<int64_t>(shape.size());
    for (int64_t k = 0; same && k < tensor.dim(); ++k) same = tensor.size(k) == shape[k];
    if (!same) fail(name, ": shapes do not fit those of the layers before, got ", shape_text(tensor));
  }

  void check_rates() {
    if (rates.empty()) return;
    const int64_t count = static_cast<int64_t>(rates.size());
    if (count != 1 && count != layers() && count != 2 * layers()) {
      fail("rates: expected none, one, one for each layer or one for each parameter, got ", count);
    }
    const bool shared = rates[0].dim() == (rate_for_each() ? 2 : 1);
    if (!shared) rate_groups = rates[0].size(0);
    check_group_count(rate_groups, "rates");
    if (rate_for_each() && factored) fail("factored: expected False where each parameter has a rate");
    for (int64_t k = 0; k < count; ++k) {
      if (rate_for_each()) {
        const int64_t l = k % layers();
        if (k < layers()) {
          check_parameter(rates[k], "rates", rate_groups, shared, {width[l + 1], width[l]});
        } else {
          check_parameter(rates[k], "rates", rate_groups, shared, {width[l + 1]});
        }
      } else {
        const int64_t size = rates[k].size(-1);
        check_parameter(rates[k], "rates", rate_groups, shared, {size});
        if (size != 1 && size != steps) fail("rates: expected 1 or ", steps, " numbers, got ", size);
      }
    }
  }
};

}  // namespace metafast
