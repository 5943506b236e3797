// What the ridge head's kernels for every instruction set share.
#pragma once

#include <cstdint>

namespace metafast {

// Factors of combinations of rows, in any layout: that of row j in combination i is data[i * out_step + j * in_step].
template <class A>
struct Factors {
  const A* data;
  int64_t out_step;
  int64_t in_step;
};

}  // namespace metafast
