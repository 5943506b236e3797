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

}  // namespace metafast
