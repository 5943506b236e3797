// Checks of the operators' arguments that hold on every device.
#pragma once

#include <optional>

#include "check.h"

namespace metafast {

inline void check_pair(const Tensor& x, const Tensor& y) {
  check_dim(x, "x", 3, "[T, n, d]");
  check_like(y, "y", x, "x");
  check_dim(y, "y", 3, "[T, m, d]");
  check_shape(y, "y", {x.size(0), y.size(1), x.size(2)});
}

inline void check_pair_grad(const Tensor& grad, const Tensor& x, const Tensor& y) {
  check_like(grad, "grad", x, "x");
  check_shape(grad, "grad", {x.size(0), x.size(1), y.size(1)});
}

inline void check_pair_tangents(const Tensor& tangent_x, const Tensor& tangent_y, const Tensor& x, const Tensor& y) {
  check_like(tangent_x, "tangent_x", x, "x");
  check_like(tangent_y, "tangent_y", x, "x");
  check_shape(tangent_x, "tangent_x", {x.size(0), x.size(1), x.size(2)});
  check_shape(tangent_y, "tangent_y", {y.size(0), y.size(1), y.size(2)});
}

inline void check_features(const Tensor& features, const char* name, const Tensor& labels, const char* labels_name) {
  check_dim(features, name, 3, "[T, rows, d]");
  check_labels(labels, labels_name, features);
  check_shape(labels, labels_name, {features.size(0), features.size(1)});
}

inline void check_means_grad(const Tensor& grad, const Tensor& labels) {
  check_dim(grad, "grad", 3, "[T, C, d]");
  check_labels(labels, "labels", grad);
  check_shape(labels, "labels", {grad.size(0), labels.size(1)});
}

inline void check_classes(int64_t num_classes) {
  if (num_classes < 0) fail("num_classes: expected a number of classes, got ", num_classes);
}

inline void check_episodes(const Tensor& support, const Tensor& support_labels, const Tensor& query,
                           const Tensor& query_labels, const std::optional<Tensor>& temperature) {
  check_features(support, "support", support_labels, "support_labels");
  check_features(query, "query", query_labels, "query_labels");
  check_like(query, "query", support, "support");
  check_shape(query, "query", {support.size(0), query.size(1), support.size(2)});
  if (temperature) {
    check_like(*temperature, "temperature", support, "support");
    check_shape(*temperature, "temperature", {support.size(0)});
  }
}

// The gradients that prototypical_loss_vjp is given, and what was saved for it.
inline void check_upstream(const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_logits,
                           const std::optional<Tensor>& grad_prototypes, const Tensor& query, const Tensor& logits,
                           const Tensor& prototypes) {
  check_dim(logits, "logits", 3, "[T, m, C]");
  const int64_t T = query.size(0), m = query.size(1), d = query.size(2), C = logits.size(2);
  const auto check = [&](const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
    check_like(tensor, name, query, "query");
    check_shape(tensor, name, shape);
  };
  check(logits, "logits", {T, m, C});
  check(prototypes, "prototypes", {T, C, d});
  if (grad_loss) check(*grad_loss, "grad_loss", {T});
  if (grad_logits) check(*grad_logits, "grad_logits", {T, m, C});
  if (grad_prototypes) check(*grad_prototypes, "grad_prototypes", {T, C, d});
}

// An argument for groups of equally many consecutive tasks: its first size divides theirs.
inline void check_groups(const Tensor& tensor, const char* name, int64_t tasks) {
  const int64_t groups = tensor.dim() > 0 ? tensor.size(0) : 0;
  if (groups == 0 ? tasks != 0 : tasks % groups != 0) {
    fail(name, ": expected a first size that divides ", tasks, " tasks, got shape ", shape_text(tensor));
  }
}

// Sizes of 1 stand for all steps, classes and features.
inline void check_rates(const Tensor& rates, const char* name, const Tensor& support, int64_t steps, int64_t classes,
                        bool features) {
  check_like(rates, name, support, "support");
  check_dim(rates, name, features ? 4 : 3, features ? "[G, K, C, d]" : "[G, K, C]");
  check_groups(rates, name, support.size(0));
  const auto fits = [&](int64_t dim, int64_t size) { return rates.size(dim) == 1 || rates.size(dim) == size; };
  if (!fits(1, steps) || !fits(2, classes) || (features && !fits(3, support.size(2)))) {
    fail(name, ": expected a size of 1 or that of the steps, classes and features, got ", shape_text(rates));
  }
}

inline void check_linear_head(const Tensor& support, const Tensor& labels, const Tensor& query, const Tensor& weight,
                              const std::optional<Tensor>& bias, const std::optional<Tensor>& rates,
                              const std::optional<Tensor>& bias_rates, int64_t steps, int64_t loss, bool gram) {
  if (loss != 0 && loss != 1) fail("loss: expected 0 or 1, got ", loss);
  check_dim(support, "support", 3, "[T, n, d]");
  check_dim(weight, "weight", 3, "[G, C, d]");
  const int64_t T = support.size(0), n = support.size(1), d = support.size(2), C = weight.size(1);
  if (labels.dim() == 2) {
    if (loss != 0) fail("labels: expected targets [T, n, C] for the squared error");
    check_labels(labels, "labels", support);
    check_shape(labels, "labels", {T, n});
  } else {
    check_like(labels, "labels", support, "support");
    check_shape(labels, "labels", {T, n, C});
  }
  check_like(query, "query", support, "support");
  check_dim(query, "query", 3, "[T, m, d]");
  check_shape(query, "query", {T, query.size(1), d});
  check_like(weight, "weight", support, "support");
  check_groups(weight, "weight", T);
  check_shape(weight, "weight", {weight.size(0), C, d});
  if (bias) {
    check_like(*bias, "bias", support, "support");
    check_dim(*bias, "bias", 2, "[G, C]");
    check_groups(*bias, "bias", T);
    check_shape(*bias, "bias", {bias->size(0), C});
  }
  if (rates) check_rates(*rates, "rates", support, steps, C, true);
  if (bias_rates) check_rates(*bias_rates, "bias_rates", support, steps, C, false);
  if (rates && !bias_rates && bias && rates->size(3) > 1) fail("bias_rates: expected them beside rates of features");
  if (gram && (bias_rates || (rates && rates->size(3) > 1))) fail("gram: expected rates of steps and classes alone");
  if (steps < 0) fail("steps: expected a number of steps, got ", steps);
}

// The gradients that linear_head_vjp is given, and what was saved for it.
inline void check_linear_head_upstream(const std::optional<Tensor>& grad_logits,
                                       const std::optional<Tensor>& grad_weight, const std::optional<Tensor>& grad_bias,
                                       const Tensor& support, const Tensor& query, const Tensor& weight,
                                       const std::optional<Tensor>& bias, bool gram, const Tensor& adapted,
                                       const Tensor& tape) {
  const int64_t T = support.size(0), n = support.size(1), m = query.size(1), d = support.size(2), C = weight.size(1);
  const auto check = [&](const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
    check_like(tensor, name, support, "support");
    check_shape(tensor, name, shape);
  };
  if (grad_logits) check(*grad_logits, "grad_logits", {T, m, C});
  if (grad_weight) check(*grad_weight, "grad_weight", {T, C, d});
  if (grad_bias) check(*grad_bias, "grad_bias", {T, bias ? C : 0});
  check(adapted, "adapted", {T, C, d});
  check_dim(tape, "tape", 3, "[T, n + C, padded n]");
  check(tape, "tape", {T, gram ? n + C : 0, tape.size(2)});
}

// What both operators of the ridge head are given; labels are class numbers or weights.
inline void check_ridge(const Tensor& support, const Tensor& labels, const Tensor& query, int64_t num_classes) {
  check_classes(num_classes);
  check_dim(support, "support", 3, "[T, n, d]");
  check_dim(query, "query", 3, "[T, m, d]");
  const int64_t T = query.size(0), n = support.size(1);
  check_like(query, "query", support, "support");
  check_shape(support, "support", {T, n, query.size(2)});
  if (labels.dim() == 3) {
    check_like(labels, "labels", support, "support");
    check_shape(labels, "labels", {T, n, num_classes});
  } else {
    check_labels(labels, "labels", support);
    check_shape(labels, "labels", {T, n});
  }
}

inline void check_per_task(const std::optional<Tensor>& value, const char* name, const Tensor& support) {
  if (!value) return;
  check_like(*value, name, support, "support");
  check_shape(*value, name, {support.size(0)});
}

// The gradient of the logits, and what was saved for the ridge head's backward.
inline void check_ridge_upstream(const Tensor& grad, const Tensor& support, const Tensor& query, const Tensor& weight,
                                 const Tensor& alpha, const Tensor& factor) {
  check_dim(grad, "grad", 3, "[T, m, C]");
  const int64_t T = query.size(0), n = support.size(1), m = query.size(1), d = query.size(2), C = grad.size(2);
  const auto check = [&](const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
    check_like(tensor, name, query, "query");
    check_shape(tensor, name, shape);
  };
  check(grad, "grad", {T, m, C});
  check(weight, "weight", {T, C, d});
  check(alpha, "alpha", {T, n, C});
  check(factor, "factor", {T, n, n});
}

// What both operators of matching networks are given.
inline void check_matching(const Tensor& support, const Tensor& labels, const Tensor& query,
                           const std::optional<Tensor>& scale, int64_t num_classes) {
  check_labels(labels, "labels", support);
  check_ridge(support, labels, query, num_classes);
  check_per_task(scale, "scale", support);
}

// The gradient of the logarithms, and what was saved for their backward.
inline void check_matching_upstream(const Tensor& grad, const Tensor& support, const Tensor& query,
                                    const Tensor& log_probs, const Tensor& totals, const Tensor& cosines) {
  const int64_t T = query.size(0), n = support.size(1), m = query.size(1), C = grad.size(2);
  const auto check = [&](const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
    check_like(tensor, name, query, "query");
    check_shape(tensor, name, shape);
  };
  check(grad, "grad", {T, m, C});
  check(log_probs, "log_probs", {T, m, C});
  check(totals, "totals", {T, m});
  check(cosines, "cosines", {T, n, m});
}

inline void check_attention_lstm(const Tensor& support, const Tensor& query, const Tensor& weight, const Tensor& bias,
                                 const Tensor& hidden, const Tensor& cell, int64_t steps) {
  check_dim(support, "support", 3, "[T, n, d]");
  check_dim(query, "query", 3, "[T, m, d]");
  const int64_t T = support.size(0), m = query.size(1), d = support.size(2);
  const auto check = [&](const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
    check_like(tensor, name, support, "support");
    check_shape(tensor, name, shape);
  };
  check(query, "query", {T, m, d});
  check(weight, "weight", {3 * d, 4 * d});
  check(bias, "bias", {4 * d});
  check(hidden, "hidden", {T, m, d});
  check(cell, "cell", {T, m, d});
  if (steps < 0) fail("steps: expected 0 or more, got ", steps);
}

}  // namespace metafast
