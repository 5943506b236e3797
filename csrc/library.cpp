// Every operator schema. No defaults: the dispatcher strips arguments that equal one before a Python kernel sees them.
#include <Python.h>
#include <torch/csrc/stable/library.h>

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

  // The inner loop of an MLP. inputs [T, n, in], targets [T, n, out] or class numbers [T, n], query [T, m, in]; weights
  // [out, in], biases [out], all shared or all with a leading dimension G that divides T. rates: none (the number is),
  // one or one for each layer of [1] or [steps], or one for each parameter; a leading dimension as for the weights.
  // outputs [T, m, out]; without a query the packed adapted parameters [T, P]; what the vjp wants to know.
  m.def(
      "mlp_loop(Tensor inputs, Tensor targets, Tensor? query, Tensor[] weights, Tensor[] biases, Tensor[] rates, "
      "float rate, int steps, int activation, int loss, bool first_order) -> (Tensor, Tensor, Tensor)");
  // Gradients of inputs, targets and query (empty unless `data`), weights, biases and rates.
  m.def(
      "mlp_loop_vjp(Tensor? grad_outputs, Tensor? grad_parameters, Tensor inputs, Tensor targets, Tensor? query, "
      "Tensor[] weights, Tensor[] biases, Tensor[] rates, float rate, int steps, int activation, int loss, "
      "bool first_order, Tensor tape, bool data) -> Tensor[]");

  m.def("vector_bits(int bits) -> int");
  m.def("keep_pages() -> bool");
  m.def("build_info() -> str");
  m.def("cuda_probe(Tensor x) -> Tensor");
}

// The import of metafast._C loads the library; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
