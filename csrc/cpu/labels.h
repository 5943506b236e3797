// Class numbers, checked.
#pragma once

#include <algorithm>

#include "tensor.h"

namespace metafast {

// Class numbers [T, n] in rows.
struct Labels {
  Tensor tensor;
  const int64_t* labels;
  int64_t tasks;
  int64_t n;
  int64_t num_classes;

  Labels(const Tensor& any, const char* name, int64_t num_classes_)
      : tensor(dense(any)),
        labels(tensor.const_data_ptr<int64_t>()),
        tasks(any.size(0)),
        n(any.size(1)),
        num_classes(num_classes_) {
    const int64_t* const end = labels + tasks * n;
    const int64_t* const bad = std::find_if(labels, end, [&](int64_t y) { return y < 0 || y >= num_classes; });
    if (bad != end) fail(name, ": expected class numbers from 0 to ", num_classes - 1, ", got ", *bad);
  }

  const int64_t* of(int64_t t) const { return labels + t * n; }
};

}  // namespace metafast
