// What the families built on distances share on the CPU.
#pragma once

#include <memory>

#include "check.h"
#include "cpu/parallel.h"
#include "dispatch.h"
#include "math/distance.h"
#include "tensor.h"

namespace metafast {

// Numbers for each row of each task.
template <class A>
struct PerRow {
  std::unique_ptr<A[]> values;
  int64_t rows;

  PerRow(int64_t tasks, int64_t rows_) : values(new A[tasks * rows_]), rows(rows_) {}
  A* of(int64_t t) const { return values.get() + t * rows; }
};

// The squared norm of every row, where a metric needs them: made by a stage of the tasks' work.
template <class M, class S>
struct Squares : PerRow<accumulate_t<S>> {
  using Kernel = void(Rows<const S>, int64_t, int64_t, int64_t, accumulate_t<S>*);

  Squares(int64_t tasks, int64_t n) : PerRow<accumulate_t<S>>(M::kRows ? tasks : 0, M::kRows ? n : 0) {}

  auto stage(Rows<const S> x, int64_t n, int64_t d, Kernel* row_squares) const {
    return Stage{M::kRows ? 1 : 0, n * d,
                 [=, this_ = this](int64_t t, int64_t) { row_squares(x, t, n, d, this_->of(t)); }};
  }
};

}  // namespace metafast
