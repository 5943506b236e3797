// From a tensor's dtype to a C++ type.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "check.h"

namespace metafast {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

template <class T>
struct Tag {
  using type = T;
};

// What sums of T are kept in.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

template <class Body>
void dispatch_floating(ScalarType dtype, const char* name, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(Tag<float>{});
    case ScalarType::Double:
      return body(Tag<double>{});
    case ScalarType::BFloat16:
      return body(Tag<BFloat16>{});
    case ScalarType::Half:
      return body(Tag<Half>{});
    default:
      fail(name, ": expected float32, float64, bfloat16 or float16");
  }
}

}  // namespace metafast
