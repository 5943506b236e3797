// How kernels see a matrix with any strides.
#pragma once

#include <cstdint>

#include "math/host_device.h"

namespace metafast {

template <class A>
struct Matrix {
  const A* data;
  int64_t row;
  int64_t column;

  METAFAST_HOST_DEVICE A at(int64_t i, int64_t k) const { return data[i * row + k * column]; }
};

template <class A>
METAFAST_HOST_DEVICE Matrix<A> transposed(Matrix<A> m) {
  return {m.data, m.column, m.row};
}

}  // namespace metafast
