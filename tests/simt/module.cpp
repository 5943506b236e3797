// The Python module of the emulator: control of the test device, the cases of cases.cuh, and the functions of
// csrc/math for NumPy.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "cases.cuh"
#include "math/distance.h"

namespace {

namespace py = pybind11;

void configure(const std::string& order, uint64_t seed) {
  static const std::pair<const char*, simt::Order> kOrders[] = {
      {"forward", simt::Order::forward}, {"reverse", simt::Order::reverse}, {"random", simt::Order::random}};
  for (const auto& [name, value] : kOrders) {
    if (order == name) return simt::Machine::shared().configure(value, seed);
  }
  throw py::value_error("order: expected 'forward', 'reverse' or 'random', got '" + order + "'");
}

template <size_t kCount>
std::vector<std::string> names(const cases::Case (&table)[kCount]) {
  std::vector<std::string> found;
  for (const cases::Case& one : table) found.push_back(one.name);
  return found;
}

void run(const std::string& name) {
  for (const cases::Case& one : cases::kCorrect) {
    if (name == one.name) return one.run();
  }
  for (const cases::Case& one : cases::kPlanted) {
    if (name == one.name) return one.run();
  }
  throw py::value_error("no such case: " + name);
}

// What the kernels compute with one number of each row or one pair of rows, for arrays of these.

using Arrays = std::vector<py::array>;
constexpr size_t kMostInputs = 4;

// body(M(), inputs, results) for every element; all arrays have one shape and hold A.
template <class M, class A, size_t kResults, class Body>
py::tuple for_elements(const Arrays& arrays, const Body& body) {
  const py::array& first = arrays[0];
  const A* inputs[kMostInputs] = {};
  for (size_t k = 0; k < arrays.size(); ++k) {
    if (!py::isinstance<py::array_t<A, py::array::c_style>>(arrays[k]) || arrays[k].size() != first.size())
      throw py::type_error("arrays: expected contiguous ones of the same shape, all float32 or all float64");
    inputs[k] = static_cast<const A*>(arrays[k].data());
  }
  A* results[kResults];
  py::tuple returned(kResults);
  for (size_t k = 0; k < kResults; ++k) {
    py::array_t<A> made(std::vector<py::ssize_t>(first.shape(), first.shape() + first.ndim()));
    results[k] = made.mutable_data();
    returned[k] = made;
  }
  for (py::ssize_t element = 0; element < first.size(); ++element) {
    std::array<A, kMostInputs> in{};
    std::array<A, kResults> out{};
    for (size_t k = 0; k < arrays.size(); ++k) in[k] = inputs[k][element];
    body(M(), in, out);
    for (size_t k = 0; k < kResults; ++k) results[k][element] = out[k];
  }
  return returned;
}

template <class M, size_t kResults, class Body>
py::tuple for_metric(const Arrays& arrays, const Body& body) {
  if (py::isinstance<py::array_t<double>>(arrays[0])) return for_elements<M, double, kResults>(arrays, body);
  return for_elements<M, float, kResults>(arrays, body);
}

template <size_t kResults, class Body>
py::tuple elementwise(const std::string& metric, const Arrays& arrays, const Body& body) {
  if (metric == "sqeuclidean") return for_metric<metafast::SqEuclidean, kResults>(arrays, body);
  if (metric == "euclidean") return for_metric<metafast::Euclidean, kResults>(arrays, body);
  if (metric == "cityblock") return for_metric<metafast::Cityblock, kResults>(arrays, body);
  if (metric == "cosine") return for_metric<metafast::Cosine, kResults>(arrays, body);
  throw py::value_error("metric: no such metric: " + metric);
}

py::object add(const std::string& metric, const py::array& sum, const py::array& x, const py::array& y) {
  return elementwise<1>(metric, {sum, x, y}, [](auto m, const auto& in, auto& out) {
    out[0] = in[0];
    m.add(out[0], in[1], in[2]);
  })[0];
}

py::tuple steps(const std::string& metric, const py::array& x, const py::array& y) {
  return elementwise<2>(metric, {x, y}, [](auto m, const auto& in, auto& out) {
    out = {m.step_x(in[0], in[1]), m.step_y(in[0], in[1])};
  });
}

template <class A>
metafast::Pair<A> pair_of(const std::array<A, kMostInputs>& in) {
  return {in[0], in[1], in[2]};
}

py::object value(const std::string& metric, const py::array& sum, const py::array& x_square,
                 const py::array& y_square) {
  return elementwise<1>(metric, {sum, x_square, y_square},
                        [](auto m, const auto& in, auto& out) { out[0] = m.value(pair_of(in)); })[0];
}

py::tuple slope(const std::string& metric, const py::array& sum, const py::array& x_square, const py::array& y_square) {
  return elementwise<3>(metric, {sum, x_square, y_square}, [](auto m, const auto& in, auto& out) {
    const auto slope = m.slope(pair_of(in));
    out = {slope.w, slope.x_part, slope.y_part};
  });
}

// Of the cosine distance: whether the pair is close, and what is its distance then.
py::tuple close_value(const py::array& sum, const py::array& x_square, const py::array& y_square,
                      const py::array& residual) {
  return for_metric<metafast::Cosine, 2>({sum, x_square, y_square, residual}, [](auto m, const auto& in, auto& out) {
    out[0] = m.close(pair_of(in));
    out[1] = m.close_value(pair_of(in), in[3]);
  });
}

}  // namespace

PYBIND11_MODULE(metafast_simt, m) {
  m.attr("kind") = SIMT_KIND;
  m.def("configure", &configure, py::arg("order"), py::arg("seed") = 1);
  m.def("launches", [] { return simt::Machine::shared().launches(); });
  m.def("most_dynamic_shared", [] { return simt::Machine::shared().most_dynamic_shared(); });
  m.attr("correct") = py::tuple(py::cast(names(cases::kCorrect)));
  m.attr("planted") = py::tuple(py::cast(names(cases::kPlanted)));
  m.def("run", &run, py::arg("case"));

  m.def("add", &add);
  m.def("steps", &steps);
  m.def("value", &value);
  m.def("slope", &slope);
  m.def("close_value", &close_value);
}
