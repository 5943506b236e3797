// Arguments of the kernels that combine rows; the same type for every instruction set.
#pragma once

#include <cstdint>

namespace metafast {

// Terms sum_j coefficients[r row_step + j step] rows[j stride + k] of row r and feature k.
template <class A>
struct Terms {
  const A* coefficients;
  int64_t row_step;
  int64_t step;
  const A* rows;
  int64_t stride;
  int64_t count;
};

}  // namespace metafast
