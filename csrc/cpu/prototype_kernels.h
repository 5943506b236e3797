// Class means and the prototypical loss of one task. Read once for each instruction set: no guard.

#include "cpu/row_kernels.h"

// One class mean over N vectors of features from k: order names its `count` rows.
template <class S, int N>
METAFAST_HOST_DEVICE void mean_of_rows(Rows<const S> features, const int64_t* order, int64_t count,
                                       accumulate_t<S> inverse_count, S* to, int64_t t, int64_t k) {
  using A = accumulate_t<S>;
  constexpr int64_t W = kWidth<A>;
  vector_t<A> sums[N] = {};
  for (int64_t r = 0; r < count; ++r) {
    const S* row = features.row(t, order[r]) + k;
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) sums[v] += load<S>(row + v * W);
  }
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) store<S>(to + v * W, sums[v] * inverse_count);
}

// The features begin..end of the class means. order lists the rows class by class, and offsets [C + 1] where each class
// begins; inverse_count is 0 for an empty class.
template <class S>
void class_means(Rows<const S> features, const int64_t* order, const int64_t* offsets,
                 const accumulate_t<S>* inverse_count, Rows<S> out, int64_t t, int64_t num_classes, int64_t begin,
                 int64_t end) {
  using A = accumulate_t<S>;
  constexpr int64_t W = kWidth<A>;
  for (int64_t c = 0; c < num_classes; ++c) {
    const int64_t* rows = order + offsets[c];
    const int64_t count = offsets[c + 1] - offsets[c];
    const A inverse = inverse_count[c];
    S* to = out.row(t, c);
    int64_t k = begin;
    for (; k + 8 * W <= end; k += 8 * W) mean_of_rows<S, 8>(features, rows, count, inverse, to + k, t, k);
    for (; k + 4 * W <= end; k += 4 * W) mean_of_rows<S, 4>(features, rows, count, inverse, to + k, t, k);
    for (; k + W <= end; k += W) mean_of_rows<S, 1>(features, rows, count, inverse, to + k, t, k);
    for (; k < end; ++k) {
      A sum = A(0);
      for (int64_t r = 0; r < count; ++r) sum += static_cast<A>(features.row(t, rows[r])[k]);
      to[k] = static_cast<S>(sum * inverse);
    }
  }
}

// The features begin..end of grad_features_i = grad_{label_i} / count_{label_i}.
template <class S>
void spread_means(Rows<const S> grad, const int64_t* labels, const accumulate_t<S>* inverse_count, Rows<S> out,
                  int64_t t, int64_t n, int64_t begin, int64_t end) {
  using A = accumulate_t<S>;
  constexpr int64_t W = kWidth<A>;
  for (int64_t i = 0; i < n; ++i) {
    const S* from = grad.row(t, labels[i]);
    const A scale = inverse_count[labels[i]];
    S* to = out.row(t, i);
    int64_t k = begin;
    for (; k + W <= end; k += W) store<S>(to + k, load<S>(from + k) * scale);
    for (; k < end; ++k) to[k] = static_cast<S>(static_cast<A>(from[k]) * scale);
  }
}

// Columns of query rows are class-major, so that the vectors run over rows whatever the number of classes.

// Logits [rows, C] = -temperature D(query, prototype) and the cross-entropy of the query rows begin..end;
// inverse_count is 0 for a class without support. scratch holds padded(rows) (C + 2) numbers.
template <class A, class M>
void prototypical_rows(Rows<const A> query, Rows<const A> prototypes, const A* query_squares, const A* squares,
                       const A* inverse_count, const int64_t* labels, A temperature, Rows<A> logits, A* losses,
                       int64_t t, int64_t begin, int64_t end, int64_t num_classes, int64_t d, A* scratch) {
  const int64_t rows = end - begin, stride = padded(rows);
  A *maxima = scratch + num_classes * stride, *totals = maxima + stride;
  for (int64_t c = 0; c < num_classes; ++c) {
    for (int64_t i = rows; i < stride; ++i) scratch[c * stride + i] = A(0);
  }
  for_each_pair<A, M>(query, prototypes, query_squares, squares, t, begin, end, num_classes, d,
                      [&](int64_t i, int64_t c, Pair<A> pair) {
                        scratch[c * stride + (i - begin)] = pair_value<A, M>(query, prototypes, t, i, c, d, pair);
                      });
  for (int64_t c = 0; c < num_classes; ++c) {
    A* column = scratch + c * stride;
    const bool present = inverse_count[c] > A(0);
    for (int64_t i = 0; i < rows; i += kWidth<A>) {
      store<A>(column + i, present ? load<A>(column + i) * -temperature : vector_t<A>{} - A(INFINITY));
    }
    A* to = logits.row(t, begin) + c;
    for (int64_t i = 0; i < rows; ++i) to[i * num_classes] = column[i];
  }
  if (num_classes == 0) return;
  softmax_columns(scratch, rows, num_classes, maxima, totals);
  for (int64_t i = 0; i < rows; i += kWidth<A>) {
    store<A>(totals + i, load<A>(maxima + i) + logarithm(load<A>(totals + i)));
  }
  for (int64_t i = 0; i < rows; ++i) losses[i] = totals[i] - logits.row(t, begin + i)[labels[i]];
}

// weight [C, padded m] = dL/dD = -temperature dL/dlogits, from the upstream gradients; where temperature_grad is given it
// receives dL/dtemperature, for which the distances are computed again. scratch holds 2 padded(m) numbers.
template <class A, class M>
void prototypical_weights(Rows<const A> query, Rows<const A> prototypes, const A* query_squares, const A* squares,
                          const A* inverse_count, const int64_t* labels, A temperature, Rows<const A> logits,
                          A grad_loss, const Rows<const A>* grad_logits, int64_t t, int64_t m, int64_t num_classes,
                          int64_t d, A* weight, A* scratch, A* temperature_grad) {
  const int64_t stride = padded(m);
  A *maxima = scratch, *totals = maxima + stride;
  for (int64_t c = 0; c < num_classes; ++c) {
    const A* from = logits.row(t, 0) + c;
    for (int64_t i = 0; i < m; ++i) weight[c * stride + i] = from[i * logits.row_stride];
    for (int64_t i = m; i < stride; ++i) weight[c * stride + i] = A(0);
  }
  if (num_classes > 0) softmax_columns(weight, m, num_classes, maxima, totals);
  const A share = grad_loss / static_cast<A>(m);
  for (int64_t i = 0; i < m; i += kWidth<A>) {
    const vector_t<A> scale = share / load<A>(totals + i);
    for (int64_t c = 0; c < num_classes; ++c) {
      A* at = weight + c * stride + i;
      store<A>(at, load<A>(at) * scale);
    }
  }
  for (int64_t i = 0; i < m; ++i) weight[labels[i] * stride + i] -= share;
  for (int64_t c = 0; c < num_classes; ++c) {
    A* column = weight + c * stride;
    if (grad_logits != nullptr) {
      for (int64_t i = 0; i < m; ++i) column[i] += grad_logits->row(t, i)[c];
    }
    // The logit of an absent class is a constant.
    if (inverse_count[c] > A(0)) continue;
    for (int64_t i = 0; i < m; ++i) column[i] = A(0);
  }
  if (temperature_grad != nullptr) {
    double total = 0;
    for_each_pair<A, M>(query, prototypes, query_squares, squares, t, 0, m, num_classes, d,
                        [&](int64_t i, int64_t c, Pair<A> pair) {
                          const A distance = pair_value<A, M>(query, prototypes, t, i, c, d, pair);
                          if (inverse_count[c] > A(0)) total -= double(weight[c * stride + i]) * distance;
                        });
    *temperature_grad = static_cast<A>(total);
  }
  for (int64_t k = 0; k < stride * num_classes; ++k) weight[k] *= -temperature;
}
