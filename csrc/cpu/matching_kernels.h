// Matching networks of one task. Read once for each instruction set: no guard.
// Vectors run over query rows: rows of the cosines belong to support rows.

#include "cpu/row_kernels.h"

// What stands under an inner product of rows of these lengths.
template <class A>
METAFAST_HOST_DEVICE vector_t<A> bounded(vector_t<A> product, A eps) {
  return product < eps ? vector_t<A>{} + eps : product;
}

// cosines [n, stride], of `rows` query rows, from inner products in their place; log_probs [rows, C] and totals [rows].
template <class A>
void matching_rows(const A* lengths, const A* query_lengths, const int64_t* order, const int64_t* offsets, A scale,
                   A eps, int64_t rows, int64_t num_classes, A* cosines, int64_t stride, A* log_probs, A* totals,
                   A* scratch) {
  using V = vector_t<A>;
  constexpr int64_t W = kWidth<A>;
  for (int64_t j = 0; j < rows; j += W) {
    const int64_t count = rows - j < W ? rows - j : W;
    const V length = load_some<A>(query_lengths + j, count);
    V most = V{} - A(INFINITY);
    for (int64_t c = 0; c < num_classes; ++c) {
      V largest = V{} - A(INFINITY), sum = {};
      for (int64_t r = offsets[c]; r < offsets[c + 1]; ++r) {
        A* at = cosines + order[r] * stride + j;
        const V cosine = load_some<A>(at, count) / bounded<A>(length * lengths[order[r]], eps), value = cosine * scale;
        store_some<A>(at, cosine, count);
        largest = largest >= value ? largest : value;
      }
      for (int64_t r = offsets[c]; r < offsets[c + 1]; ++r) {
        sum += exponential(load_some<A>(cosines + order[r] * stride + j, count) * scale - largest);
      }
      const bool present = offsets[c] < offsets[c + 1];
      const V value = present ? largest + logarithm(sum) : largest;
      store<A>(scratch + c * W, value);
      most = most >= value ? most : value;
    }
    V sum = {};
    for (int64_t c = 0; c < num_classes; ++c) sum += exponential(load<A>(scratch + c * W) - most);
    const V total = most + logarithm(sum);
    store_some<A>(totals + j, total, count);
    for (int64_t c = 0; c < num_classes; ++c) {
      const V value = load<A>(scratch + c * W) - total;
      for (int64_t k = 0; k < count; ++k) log_probs[(j + k) * num_classes + c] = value[k];
    }
  }
}

// From grad [rows, C]: slopes [n, stride] for the inner products, the coefficients of the query rows themselves in their
// own gradients, and what each contributes to the gradient of the scale.
template <class A>
void matching_slopes(const A* grad, const A* log_probs, const A* totals, const A* cosines, const A* lengths,
                     const A* query_lengths, const int64_t* order, const int64_t* offsets, A scale, A eps, int64_t rows,
                     int64_t num_classes, int64_t stride, A* slopes, A* query_parts, A* scale_parts) {
  using V = vector_t<A>;
  constexpr int64_t W = kWidth<A>;
  for (int64_t j = 0; j < rows; j += W) {
    const int64_t count = rows - j < W ? rows - j : W;
    const V length = load_some<A>(query_lengths + j, count), total = load_some<A>(totals + j, count);
    const auto of_class = [&](const A* from, int64_t c) {
      V value = {};
      for (int64_t k = 0; k < count; ++k) value[k] = from[(j + k) * num_classes + c];
      return value;
    };
    V all = {}, along = {}, of_scale = {};
    for (int64_t c = 0; c < num_classes; ++c) all += of_class(grad, c);
    for (int64_t c = 0; c < num_classes; ++c) {
      if (offsets[c] == offsets[c + 1]) continue;
      const V log_prob = of_class(log_probs, c), of_rows = total + log_prob;
      const V weight = of_class(grad, c) - all * exponential(log_prob);
      V turned = {}, part = {};
      for (int64_t r = offsets[c]; r < offsets[c + 1]; ++r) {
        const int64_t at = order[r] * stride + j;
        const V cosine = load_some<A>(cosines + at, count), product = length * lengths[order[r]];
        const V slope = exponential(cosine * scale - of_rows) * weight;
        part += slope * cosine;
        store_some<A>(slopes + at, slope * scale / bounded<A>(product, eps), count);
        turned += product > eps ? slope * scale * cosine : V{};
      }
      of_scale += part;
      along += turned;
    }
    // A row of zeros has no part of its own.
    store_some<A>(query_parts + j, along == A(0) ? V{} : -along / (length * length), count);
    store_some<A>(scale_parts + j, of_scale, count);
  }
}

// The coefficient of a support row itself in its gradient.
template <class A>
void matching_part(const A* slopes, const A* cosines, A length, const A* query_lengths, A eps, int64_t rows, A* part) {
  using V = vector_t<A>;
  constexpr int64_t W = kWidth<A>;
  V sum = {};
  for (int64_t j = 0; j < rows; j += W) {
    const int64_t count = rows - j < W ? rows - j : W;
    const V product = load_some<A>(query_lengths + j, count) * length;
    const V along = load_some<A>(slopes + j, count) * load_some<A>(cosines + j, count) * product;
    sum += product > eps ? along : V{};
  }
  A along = A(0);
  for (int64_t k = 0; k < W; ++k) along += sum[k];
  *part = along == A(0) ? A(0) : -along / (length * length);
}
