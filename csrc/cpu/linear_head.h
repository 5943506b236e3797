// What the kernels of the linear head are told of one task.
#pragma once

#include <cstdint>

#include "cpu/distance.h"
#include "math/inner_loss.h"

namespace metafast {

// The rate of step t, class c and feature k.
template <class A>
struct Rates {
  const A* data;  // null: the constant
  int64_t step_stride;
  int64_t class_stride;
  int64_t feature_stride;
  A constant;

  METAFAST_HOST_DEVICE A at(int64_t t, int64_t c, int64_t k = 0) const {
    return data == nullptr ? constant : data[t * step_stride + c * class_stride + k * feature_stride];
  }
};

// The inner loop of one task: n support rows, C classes. Arrays of its rows are class-major, [C, stride], with zeros
// behind the rows.
template <class A>
struct InnerLoop {
  int64_t n;
  int64_t C;
  int64_t stride;
  int64_t steps;
  InnerLoss loss;
  bool first_order;
  A momentum;
  A decay;
  const A* targets;  // [C, stride]
  const A* totals;   // [stride], the sums of each row's targets

  int64_t size() const { return C * stride; }
};

// What the reverse sweep of the loop on the Gram matrix needs of the steps; or one place for all of them, each step
// overwriting the last.
template <class A>
struct SpanTape {
  A* probability;  // [K, C, stride]: the softmax, or the logits of the squared error
  A* direction;    // [K, C, stride]: U of the step's direction v W_0 + U^T X
  A* span;         // [K + 1, C, stride]: N of the weight c W_0 + N^T X
  A* scale;        // [K + 1, C]: c
  A* momentum;     // [K, C]: v
  int64_t kept;    // 1, or 0 where nothing is
};

// The same of the loop on the weights themselves.
template <class A>
struct WeightTape {
  A* probability;     // [K, C, stride]
  A* error;           // [K, C, stride]: dL/dlogits
  A* direction;       // [K, C, d]
  A* weight;          // [K + 1, C, d]
  A* bias_direction;  // [K, C]
  A* bias;            // [K + 1, C]
  int64_t kept;
};

}  // namespace metafast
