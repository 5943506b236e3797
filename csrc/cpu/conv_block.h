// Sizes of the first convolutional block; the same type for every instruction set.
#pragma once

#include <cstdint>

namespace metafast {

// A 3 x 3 convolution with a border of zeros, and 2 x 2 windows of its outputs.
struct BlockShape {
  int64_t planes, height, width, channels;

  int64_t rows() const { return height / 2; }
  int64_t columns() const { return width / 2; }
  int64_t patch() const { return 9 * planes; }
  int64_t lanes() const { return (channels + 15) / 16 * 16; }
  // An image with its border.
  int64_t stride() const { return width + 2; }
  int64_t plane() const { return (height + 2) * stride(); }
};

}  // namespace metafast
