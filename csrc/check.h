// Checks of operator arguments; the public Python functions check first and in the user's words, these are the last line.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace metafast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The prefix is what metafast/_library.py turns into a ValueError.
template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "metafast: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t k = 0; k < tensor.dim(); ++k) text << (k ? ", " : "") << tensor.size(k);
  text << ']';
  return text.str();
}

inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t k = 0;
  for (int64_t size : shape) {
    if (same && tensor.size(k) != size) same = false;
    ++k;
  }
  if (!same) {
    std::ostringstream want;
    const char* comma = "";
    for (int64_t size : shape) want << comma << size, comma = ", ";
    fail(name, ": expected shape [", want.str(), "], got ", shape_text(tensor));
  }
}

inline void check_dim(const Tensor& tensor, const char* name, int64_t dim, const char* shape) {
  if (tensor.dim() != dim) fail(name, ": expected shape ", shape, ", got ", shape_text(tensor));
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType dtype) {
  if (tensor.scalar_type() != dtype) {
    fail(name, ": expected ", torch::headeronly::toString(dtype), ", got ",
         torch::headeronly::toString(tensor.scalar_type()));
  }
}

inline void check_cpu(const Tensor& tensor, const char* name) {
  if (!tensor.is_cpu()) fail(name, ": expected a tensor on the CPU");
}

// The device and the dtype of another argument.
inline void check_like(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  if (tensor.device() != other.device()) fail(name, ": expected the device of ", other_name);
  check_dtype(tensor, name, other.scalar_type());
}

inline void check_labels(const Tensor& labels, const char* name, const Tensor& rows) {
  if (labels.device() != rows.device()) fail(name, ": expected the device of the features");
  check_dtype(labels, name, ScalarType::Long);
  check_dim(labels, name, 2, "[T, rows]");
}

}  // namespace metafast
