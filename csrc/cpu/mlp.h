// The layout of an MLP's inner loop in working memory, shared by its driver and its kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "math/activation.h"
#include "math/inner_loss.h"
#include "math/matrix.h"
#include "math/rows.h"

namespace metafast {

// Widths are padded to 16 elements: whole vectors of every instruction set, pads hold zeros.
// A parameter block holds the layers above the first as [out, in], then the first as [in, out] (its products then run
// along `out` for any number of inputs), and after each weight its bias. A block of activations holds layer by layer
// [rows, width].
//
// With one rate for the first layer in each step its weight stays W + D^T X for the support rows X, and its adjoint
// L + R^T X. `factored`: it is left out of the blocks that steps write; what it does to rows follows from their products
// with X, to which 1 is added for the bias.
struct MlpPlan {
  int64_t layers;
  int64_t rows;  // support rows
  int64_t query_rows;
  int64_t steps;
  const int64_t* width;   // [layers + 1]
  const int64_t* weight;  // offset of each layer's weight in a block of parameters
  const int64_t* bias;    // and of its bias
  const int64_t* column;  // columns of a block of activations before each layer
  int64_t parameters;     // size of a block of parameters,
  int64_t stepped;        // and of what is explicit in each step
  int64_t columns;        // columns of a block of activations
  Activation activation;
  InnerLoss loss;
  bool first_order;
  bool factored;

  // The first layer that is explicit.
  int64_t lowest() const { return factored ? 1 : 0; }
  // What a step leaves on the tape: activations, deltas, and the parameters after it.
  int64_t step() const { return 2 * rows * columns + stepped; }
  // Behind the steps and the activations of the query: the products of rows and of query rows with the rows, and D.
  int64_t products() const { return steps * step() + query_rows * columns; }
  int64_t change() const { return products() + (factored ? (rows + query_rows) * padded(rows) : 0); }
  int64_t tape() const { return change() + (factored ? rows * padded(width[1]) : 0); }
  // Numbers of the first layer and of products with rows.
  int64_t first() const { return (width[0] + 1) * padded(width[1]); }
  int64_t scratch(bool backward) const {
    const int64_t sums = rows * padded(width[1]), turned = (width[0] + 1) * padded(rows);
    if (!backward) return factored ? sums + turned : 0;
    return 2 * stepped + (3 * rows + std::max(rows, query_rows)) * columns +
           (factored ? 2 * sums + (rows + query_rows) * padded(rows) + turned + first() : 0);
  }
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
  A* first;           // factored: that of the first layer; null where there is a query
  A* factors;         // factored: [query rows + rows + 1, width], the query's deltas, R, and the bias's gradient
  A* inputs;          // [rows, in]
  A* targets;         // [rows, out]
  A* query;           // [query rows, in]
  A* step_rates;      // [steps, layers]
  A* block_rates;     // block of parameters
  A* scratch;
};

}  // namespace metafast
