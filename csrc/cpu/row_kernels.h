// Inner products and combinations of rows: matrix products one side of which has few rows.
// Read once for each instruction set: no guard.

#include "cpu/distance_kernels.h"

// out[i row_step + j step] = scale <x_i, y_j> + offset + bias_j for the rows begin..end of x; bias may be null.
template <class A>
void row_products(Rows<const A> x, Rows<const A> y, int64_t t, int64_t y_batch, int64_t begin, int64_t end, int64_t m,
                  int64_t d, A scale, A offset, const A* bias, A* out, int64_t row_step, int64_t step) {
  const Rows<const A> other{y.row(y_batch, 0), 0, y.row_stride};
  for_each_sum<A, Dot>(x, other, t, begin, end, m, d, [&](int64_t i, int64_t j, A sum) {
    const A value = scale * sum + offset;
    out[i * row_step + j * step] = bias == nullptr ? value : value + bias[j];
  });
}

// gram [n, stride] = <x_i, x_j> + add: the rows begin..end up to their diagonal, and what mirrors them.
template <class A>
void gram_rows(Rows<const A> x, int64_t t, int64_t begin, int64_t end, int64_t d, A add, A* gram, int64_t stride) {
  constexpr int R = 4;
  const auto finish = [&](int64_t i, int64_t j, A sum) { gram[i * stride + j] = gram[j * stride + i] = sum + add; };
  int64_t i = begin;
  for (; i + R <= end; i += R) tile_row<A, Dot, R>(x, x, t, i, i + R, d, finish);
  for (; i < end; ++i) tile_row<A, Dot, 1>(x, x, t, i, i + 1, d, finish);
}

// columns [C, padded rows] = exp(columns - max); maxima and totals [padded rows] are their largest entries and sums.
// NaN spreads over its row, as in torch: the maximum may lose it, the sum does not.
template <class A>
METAFAST_HOST_DEVICE void softmax_columns(A* columns, int64_t rows, int64_t num_classes, A* maxima, A* totals) {
  using V = vector_t<A>;
  const int64_t stride = padded(rows);
  for (int64_t i = 0; i < rows; i += kWidth<A>) {
    V largest = load<A>(columns + i);
    for (int64_t c = 1; c < num_classes; ++c) {
      const V value = load<A>(columns + c * stride + i);
      largest = largest >= value ? largest : value;
    }
    V total = {};
    for (int64_t c = 0; c < num_classes; ++c) {
      const V value = exponential(load<A>(columns + c * stride + i) - largest);
      store<A>(columns + c * stride + i, value);
      total += value;
    }
    store<A>(maxima + i, largest);
    store<A>(totals + i, total);
  }
}

// out = base * scale (a number for each row) + gain * the terms, for R rows from r and V vectors of features from k; the last
// vector has `count` entries. Null: no base, no scale. Long sums go in blocks: it bounds their rounding error.
template <class A, bool Long, int R, int V, int N>
METAFAST_HOST_DEVICE void combine_tile(const Terms<A> (&terms)[N], A gain, const A* base, int64_t base_stride,
                                       const A* scale, A* out, int64_t out_stride, int64_t r, int64_t k,
                                       int64_t count) {
  using W = vector_t<A>;
  constexpr int64_t kLanes = kWidth<A>;
  const auto read = [&](const A* from) { return V == 1 && count < kLanes ? load_part<A>(from, count) : load<A>(from); };
  W part[R][V] = {}, total[Long ? R : 1][V] = {};
  int64_t room = kBlock;
#pragma GCC unroll 4
  for (int s = 0; s < N; ++s) {
    const Terms<A>& term = terms[s];
    const A* row = term.rows + k;
    const A* coefficients = term.coefficients + r * term.row_step;
    for (int64_t j = 0; j < term.count;) {
      const int64_t last = Long ? std::min(term.count, j + room) : term.count;
      room -= last - j;
      for (; j < last; ++j, row += term.stride, coefficients += term.step) {
        W values[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) values[v] = read(row + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
          const A coefficient = coefficients[i * term.row_step];
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) part[i][v] += values[v] * coefficient;
        }
      }
      if (Long && room == 0) {
#pragma GCC unroll 32
        for (int i = 0; i < R * V; ++i) {
          total[i / V][i % V] += part[i / V][i % V];
          part[i / V][i % V] = W{};
        }
        room = kBlock;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      W value = (Long ? total[i][v] + part[i][v] : part[i][v]) * gain;
      if (base != nullptr) {
        const W from = read(base + (r + i) * base_stride + k + v * kLanes);
        value += scale != nullptr ? from * scale[r + i] : from;
      }
      A* to = out + (r + i) * out_stride + k + v * kLanes;
      if (V == 1 && count < kLanes) {
        store_part<A>(to, value, count);
      } else {
        store<A>(to, value);
      }
    }
  }
}

template <class A, bool Long, int N>
METAFAST_HOST_DEVICE void combine_columns(const Terms<A> (&terms)[N], A gain, const A* base, int64_t base_stride,
                                          const A* scale, A* out, int64_t out_stride, int64_t rows, int64_t begin,
                                          int64_t end) {
  constexpr int64_t W = kWidth<A>;
  // As many as there are registers for, and 5 rows because 5-way data come in multiples of it.
  constexpr int R = 5, V = METAFAST_VECTOR_BYTES == 64 ? 4 : 2;
  const auto columns = [&](auto vectors, int64_t k, int64_t count) {
    constexpr int kVectors = decltype(vectors)::value;
    int64_t r = 0;
    for (; r + R <= rows; r += R) {
      combine_tile<A, Long, R, kVectors>(terms, gain, base, base_stride, scale, out, out_stride, r, k, count);
    }
    for (; r < rows; ++r) {
      combine_tile<A, Long, 1, kVectors>(terms, gain, base, base_stride, scale, out, out_stride, r, k, count);
    }
  };
  int64_t k = begin;
  for (; k + V * W <= end; k += V * W) columns(std::integral_constant<int, V>{}, k, W);
  for (; k + 2 * W <= end; k += 2 * W) columns(std::integral_constant<int, 2>{}, k, W);
  for (; k < end; k += W) columns(std::integral_constant<int, 1>{}, k, std::min(W, end - k));
}

// The features begin..end of `rows` rows: out = base * scale + gain * the terms. out may be base.
template <class A, int N>
void combine_rows(const Terms<A> (&terms)[N], A gain, const A* base, int64_t base_stride, const A* scale, A* out,
                  int64_t out_stride, int64_t rows, int64_t begin, int64_t end) {
  int64_t count = 0;
  for (const Terms<A>& term : terms) count += term.count;
  if (count > kBlock) {
    combine_columns<A, true>(terms, gain, base, base_stride, scale, out, out_stride, rows, begin, end);
  } else {
    combine_columns<A, false>(terms, gain, base, base_stride, scale, out, out_stride, rows, begin, end);
  }
}

// to [d, stride]: rows begin..end of x as its columns.
template <class A>
void turned_rows(Rows<const A> x, int64_t t, int64_t begin, int64_t end, int64_t d, A* to, int64_t stride) {
  for (int64_t k = 0; k < d; ++k) {
    for (int64_t i = begin; i < end; ++i) to[k * stride + i - begin] = x.row(t, i)[k];
  }
}
