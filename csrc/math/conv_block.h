// Sizes of the first convolutional block.
#pragma once

#include <cstdint>

#include "math/host_device.h"
#include "math/pooling.h"
#include "math/rows.h"

namespace metafast {

// A 3 x 3 convolution with a border of zeros, and 2 x 2 windows of its outputs.
struct BlockShape {
  int64_t planes, height, width, channels;

  METAFAST_HOST_DEVICE int64_t rows() const { return height / 2; }
  METAFAST_HOST_DEVICE int64_t columns() const { return width / 2; }
  METAFAST_HOST_DEVICE int64_t patch() const { return 9 * planes; }
  int64_t lanes() const { return padded(channels); }
  METAFAST_HOST_DEVICE int64_t pixels() const { return planes * height * width; }
  METAFAST_HOST_DEVICE int64_t results() const { return rows() * columns() * channels; }
  // An image with its border.
  METAFAST_HOST_DEVICE int64_t stride() const { return width + 2; }
  METAFAST_HOST_DEVICE int64_t plane() const { return (height + 2) * stride(); }
};

}  // namespace metafast
