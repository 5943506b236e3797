// How kernels see a batch of matrices.
#pragma once

#include <cstdint>

#include "math/host_device.h"

namespace metafast {

// A batch of matrices [T, rows, columns] whose rows are contiguous; batches and rows may have any stride.
template <class T>
struct Rows {
  T* data;
  int64_t batch_stride;
  int64_t row_stride;

  METAFAST_HOST_DEVICE T* row(int64_t batch, int64_t index) const {
    return data + batch * batch_stride + index * row_stride;
  }
};

// Rows rounded up to whole vectors of every width.
constexpr int64_t padded(int64_t rows) { return (rows + 15) / 16 * 16; }

}  // namespace metafast
