// What the families built on distances share on the CPU.
#pragma once

#include <memory>

#include "check.h"
#include "cpu/parallel.h"
#include "dispatch.h"
#include "math/distance.h"
#include "tensor.h"

namespace metafast {

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

// Numbers for each row of each task.
template <class A>
struct PerRow {
  std::unique_ptr<A[]> values;
  int64_t rows;

  PerRow(int64_t tasks, int64_t rows_) : values(new A[tasks * rows_]), rows(rows_) {}
  A* of(int64_t t) const { return values.get() + t * rows; }
};

// |x_i|^2 of every row where the metric M needs them.
template <class M, class S, class Kernel>
PerRow<accumulate_t<S>> squares(Rows<const S> x, int64_t T, int64_t n, int64_t d, Kernel* row_squares) {
  PerRow<accumulate_t<S>> result(M::kRows ? T : 0, n);
  if constexpr (M::kRows) {
    parallel(T, n * d, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) row_squares(x, t, n, d, result.of(t));
    });
  }
  return result;
}

}  // namespace metafast
