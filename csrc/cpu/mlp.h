// The layout of an MLP's inner loop in working memory, shared by its driver and its kernels.
#pragma once

#include <cstdint>

#include "math/activation.h"
#include "math/inner_loss.h"
#include "math/matrix.h"

namespace metafast {

// Widths are padded to 16 elements: whole vectors of every instruction set, pads hold zeros.
// A parameter block holds layer 0 as [in, out] (its products then run along `out` for any number of inputs), the others
// as [out, in], and after each weight its bias. A block of activations holds layer by layer [rows, width].
struct MlpPlan {
  int64_t layers;
  int64_t rows;  // support rows
  int64_t query_rows;
  int64_t steps;
  const int64_t* width;   // [layers + 1]
  const int64_t* weight;  // offset of each layer's weight in a block of parameters
  const int64_t* bias;    // and of its bias
  const int64_t* column;  // columns of a block of activations before each layer
  int64_t parameters;     // size of a block of parameters
  int64_t columns;        // columns of a block of activations
  Activation activation;
  InnerLoss loss;
  bool first_order;

  // What a step leaves on the tape: activations, deltas, and the parameters after it.
  int64_t step() const { return 2 * rows * columns + parameters; }
  int64_t tape() const { return steps * step() + query_rows * columns; }
};

// One task. The labels or the soft targets are null; so is the table of rates where each parameter has one.
template <class A>
struct MlpTask {
  Matrix<A> inputs;
  Matrix<A> targets;
  const int64_t* labels;
  Matrix<A> query;
  const A* initial;      // block of parameters
  const A* step_rates;   // [steps, layers]
  const A* block_rates;  // block of parameters
  A* tape;
};

// What the reverse sweep of a task writes; null where it is not wanted.
template <class A>
struct MlpGradients {
  Matrix<A> outputs;  // upstream
  A* parameters;      // block: on entry the gradient of the adapted parameters where there is no query
  A* inputs;          // [rows, in]
  A* targets;         // [rows, out]
  A* query;           // [query rows, in]
  A* step_rates;      // [steps, layers]
  A* block_rates;     // block of parameters
  A* scratch;
};

}  // namespace metafast
