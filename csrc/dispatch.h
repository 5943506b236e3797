// From a tensor's dtype to a C++ type.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "check.h"
#include "math/accumulate.h"
#include "math/distance.h"

namespace metafast {

template <class T>
struct Tag {
  using type = T;
};

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

// The inner losses and inner loops take float32 and float64; the public functions promote the halves.
template <class Body>
void dispatch_full(ScalarType dtype, const char* name, const Body& body) {
  if (dtype == ScalarType::Float) return body(Tag<float>{});
  if (dtype == ScalarType::Double) return body(Tag<double>{});
  fail(name, ": expected float32 or float64");
}

template <class Body>
void dispatch_metric(int64_t metric, const Body& body) {
  switch (static_cast<Metric>(metric)) {
    case Metric::sqeuclidean:
      return body(Tag<SqEuclidean>{});
    case Metric::euclidean:
      return body(Tag<Euclidean>{});
    case Metric::cityblock:
      return body(Tag<Cityblock>{});
    case Metric::cosine:
      return body(Tag<Cosine>{});
  }
  fail("metric: expected 0 to 3, got ", metric);
}

}  // namespace metafast
