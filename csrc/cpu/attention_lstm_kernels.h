// An LSTM that reads support rows with attention. Read once for each instruction set: no guard.

#include "cpu/row_kernels.h"

template <class A>
METAFAST_HOST_DEVICE vector_t<A> sigmoid(vector_t<A> x) {
  return A(1) / (A(1) + exponential(-x));
}

// hidden and cell [rows, d], the states before, become those after all steps; a query row reads without the others.
// Scratch: scores [rows, stride], fixed and gates [rows, 4 d], which are torch's: entered, kept, new, shown.
template <class A>
void attention_lstm_rows(const AttentionLstm<A>& of, int64_t rows, A* hidden, A* cell, A* scores, A* fixed, A* gates) {
  using V = vector_t<A>;
  constexpr int64_t W = kWidth<A>;
  const int64_t d = of.d, wide = 4 * d;
  const Terms<A> of_query[1] = {{of.query, d, 1, of.of_query, wide, d}};
  const Terms<A> of_support[1] = {{hidden, d, 1, of.turned, of.stride, d}};
  const Terms<A> of_both[2] = {{scores, of.stride, 1, of.projected, wide, of.n}, {hidden, d, 1, of.of_state, wide, d}};
  combine_rows<A, 1>(of_query, A(1), of.bias, 0, nullptr, fixed, wide, rows, 0, wide);
  for (int64_t step = 0; step < of.steps; ++step) {
    combine_rows<A, 1>(of_support, A(1), nullptr, 0, nullptr, scores, of.stride, rows, 0, of.stride);
    for (int64_t i = 0; i < rows; ++i) softmax_row<A>(scores + i * of.stride, of.n, scores + i * of.stride);
    combine_rows<A, 2>(of_both, A(1), fixed, wide, nullptr, gates, wide, rows, 0, wide);
    for (int64_t i = 0; i < rows; ++i) {
      const A* gate = gates + i * wide;
      for (int64_t k = 0; k < d; k += W) {
        const int64_t count = d - k < W ? d - k : W, at = i * d + k;
        const V entered = sigmoid<A>(load_some<A>(gate + k, count)),
                kept = sigmoid<A>(load_some<A>(gate + d + k, count));
        const V added = tangens(load_some<A>(gate + 2 * d + k, count));
        const V shown = sigmoid<A>(load_some<A>(gate + 3 * d + k, count));
        const V state = kept * load_some<A>(cell + at, count) + entered * added;
        store_some<A>(cell + at, state, count);
        store_some<A>(hidden + at, shown * tangens(state) + load_some<A>(of.query + at, count), count);
      }
    }
  }
}
