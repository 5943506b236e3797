// Every operator schema. No defaults: the dispatcher strips arguments that equal one before a Python kernel sees them.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/draws.h"

STABLE_TORCH_LIBRARY(metafast, m) {
  // x [T, n, d], y [T, m, d] -> [T, n, m]; metric is an index into metafast.distance.METRICS
  m.def("pairwise_distance(Tensor x, Tensor y, int metric) -> Tensor");
  m.def("pairwise_distance_vjp(Tensor grad, Tensor x, Tensor y, int metric) -> (Tensor, Tensor)");
  m.def("pairwise_distance_jvp(Tensor x, Tensor y, Tensor tangent_x, Tensor tangent_y, int metric) -> Tensor");

  // features [T, n, d], labels [T, n] -> [T, C, d]
  m.def("prototypes(Tensor features, Tensor labels, int num_classes) -> Tensor");
  m.def("prototypes_vjp(Tensor grad, Tensor labels) -> Tensor");

  // support [T, n, d], query [T, m, d], temperature [T] -> loss [T], logits [T, m, C], prototypes [T, C, d]
  m.def(
      "prototypical_loss(Tensor support, Tensor support_labels, Tensor query, Tensor query_labels, "
      "Tensor? temperature, float scale, int num_classes, int metric) -> (Tensor, Tensor, Tensor)");
  m.def(
      "prototypical_loss_vjp(Tensor? grad_loss, Tensor? grad_logits, Tensor? grad_prototypes, Tensor support, "
      "Tensor support_labels, Tensor query, Tensor query_labels, Tensor? temperature, float scale, Tensor logits, "
      "Tensor prototypes, int metric) -> (Tensor, Tensor, Tensor)");

  // support [T, n, d], labels [T, n] or [T, n, C], query [T, m, d], weight [G, C, d], bias [G, C], rates [G, K, C, d] and
  // bias_rates [G, K, C] (sizes of 1 stand for all; None: the number `rate`, the bias's those of the weight), where G
  // divides T -> logits [T, m, C], weight [T, C, d], bias [T, C], and what the gradient needs
  m.def(
      "linear_head(Tensor support, Tensor labels, Tensor query, Tensor weight, Tensor? bias, Tensor? rates, "
      "Tensor? bias_rates, float rate, int steps, int loss, float momentum, float weight_decay, bool first_order, "
      "bool gram) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_head_vjp(Tensor? grad_logits, Tensor? grad_weight, Tensor? grad_bias, Tensor support, Tensor labels, "
      "Tensor query, Tensor weight, Tensor? bias, Tensor? rates, Tensor? bias_rates, float rate, int steps, int loss, "
      "float momentum, float weight_decay, bool first_order, bool gram, Tensor adapted, Tensor tape) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // support [T, n, d], labels [T, n] or targets [T, n, C], query [T, m, d]; regularisation, scale and offset [T], or None
  // for the number after them -> logits [T, m, C]; and weight [T, C, d], alpha [T, n, C], factor [T, n, n] for the backward
  m.def(
      "ridge_logits(Tensor support, Tensor labels, Tensor query, Tensor? regularisation, Tensor? scale, Tensor? "
      "offset, "
      "float fixed_regularisation, float fixed_scale, float fixed_offset, int num_classes) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "ridge_logits_vjp(Tensor grad, Tensor support, Tensor labels, Tensor query, Tensor? regularisation, "
      "Tensor? scale, float fixed_regularisation, float fixed_scale, Tensor weight, Tensor alpha, Tensor factor) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // support [T, n, d], labels [T, n], query [T, m, d]; scale [T], or None for the number after it -> log_probs [T, m, C];
  // and for the backward the logarithms of the sums of all rows [T, m], and cosines [T, n, m]
  m.def(
      "matching_log_probs(Tensor support, Tensor labels, Tensor query, Tensor? scale, float fixed_scale, float eps, "
      "int num_classes) -> (Tensor, Tensor, Tensor)");
  // The gradients for support, query and scale.
  m.def(
      "matching_log_probs_vjp(Tensor grad, Tensor support, Tensor labels, Tensor query, Tensor? scale, "
      "float fixed_scale, float eps, Tensor log_probs, Tensor totals, Tensor cosines) -> (Tensor, Tensor, Tensor)");

  // support [T, n, d], query [T, m, d], weight [3 d, 4 d] of query, support rows and state, bias [4 d], hidden and
  // cell [T, m, d] -> the hidden state after all steps [T, m, d]
  m.def(
      "attention_lstm(Tensor support, Tensor query, Tensor weight, Tensor bias, Tensor hidden, Tensor cell, int steps) "
      "-> Tensor");

  // x [T, n, C, H, W] in this order in memory or with the channels last; weight, bias and, where given, mean and var
  // [T, C] in float32 or float64 -> y, the statistics ([T, 0] if given), and which pixel of each window was chosen
  m.def(
      "norm_relu_pool(Tensor x, Tensor weight, Tensor bias, Tensor? mean, Tensor? var, float eps, bool relu, "
      "bool pool) -> (Tensor, Tensor, Tensor, Tensor)");
  // The gradients for x, weight, bias and given statistics.
  m.def(
      "norm_relu_pool_vjp(Tensor grad, Tensor? grad_mean, Tensor? grad_var, Tensor x, Tensor weight, Tensor bias, "
      "Tensor mean, Tensor var, Tensor choice, bool given, float eps, bool relu, bool pool) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The gradients of <u, norm_relu_pool_vjp> for grad, grad_mean, grad_var, x, weight and given statistics.
  m.def(
      "norm_relu_pool_vjp_vjp(Tensor u_x, Tensor u_weight, Tensor u_bias, Tensor? u_mean, Tensor? u_var, Tensor grad, "
      "Tensor? grad_mean, Tensor? grad_var, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, "
      "Tensor choice, bool given, float eps, bool relu, bool pool) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // params_k - rates_k grads_k, or with the one rate for all where rates is empty; the arguments broadcast
  m.def("sgd_update(Tensor[] params, Tensor[] grads, Tensor[] rates, float rate) -> Tensor[]");
  // -rates_k upstream_k, if `scaled`, and then -upstream_k grads_k summed to the shape of rates_k, whose dimensions that are
  // summed stand side by side
  m.def("sgd_update_vjp(Tensor[] upstream, Tensor[] grads, Tensor[] rates, bool scaled) -> Tensor[]");

  // The inner loop of an MLP. inputs [T, n, in], targets [T, n, out] or class numbers [T, n], query [T, m, in]; weights
  // [out, in], biases [out], all shared or all with a leading dimension G that divides T. rates: none (the number is),
  // one or one for each layer of [1] or [steps], or one for each parameter; a leading dimension as for the weights.
  // outputs [T, m, out]; without a query the packed adapted parameters [T, P]; what the vjp wants to know.
  m.def(
      "mlp_loop(Tensor inputs, Tensor targets, Tensor? query, Tensor[] weights, Tensor[] biases, Tensor[] rates, "
      "float rate, int steps, int activation, int loss, bool first_order, bool factored) -> (Tensor, Tensor, Tensor)");
  // Gradients of inputs, targets and query (empty unless `data`), weights, biases and rates.
  m.def(
      "mlp_loop_vjp(Tensor? grad_outputs, Tensor? grad_parameters, Tensor inputs, Tensor targets, Tensor? query, "
      "Tensor[] weights, Tensor[] biases, Tensor[] rates, float rate, int steps, int activation, int loss, "
      "bool first_order, bool factored, Tensor tape, bool data) -> Tensor[]");

  // x [T, n, planes, H, W] convolved with weight [G, C, 9 planes] and bias [G, C], float32 or float64, under a border of
  // zeros; ReLU and 2 x 2 max-pooling -> [T, n, H / 2, W / 2, C], and what each result was: a place in its window, or 4
  m.def("conv_pool(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)");
  // The gradients [T, C, 9 planes] and [T, C] of weight and bias.
  m.def("conv_pool_vjp(Tensor grad, Tensor choice, Tensor x) -> (Tensor, Tensor)");
  // The convolution with weight and bias at the choices, 0 at those of 4.
  m.def("conv_pool_jvp(Tensor choice, Tensor x, Tensor weight, Tensor bias) -> Tensor");
  // Mean [T, 9 planes] and biased covariance of the patches under a 3 x 3 convolution, float64.
  m.def("patch_moments(Tensor x) -> (Tensor, Tensor)");

  m.def("vector_bits(int bits) -> int");
  m.def("keep_pages() -> bool");
  m.def("build_info() -> str");
  m.def("cuda_probe(Tensor x) -> Tensor");
}

// The import of metafast._C loads the library.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, metafast::draws_methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
