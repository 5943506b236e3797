// Ridge regression of one task. Read once for each instruction set: no guard.

#include "cpu/distance_kernels.h"

// R combinations over V vectors of columns (with Part, the first `count` columns of one):
// out_r = (onto ? out_r : 0) + gain sum_j factor_rj x_j.
template <class A, int R, int V, bool Part>
METAFAST_HOST_DEVICE void combine_tile(Factors<A> factors, const A* x, int64_t x_stride, int64_t rows, A gain,
                                       bool onto, A* out, int64_t out_stride, int64_t count) {
  constexpr int64_t W = kWidth<A>;
  vector_t<A> sums[R][V] = {};
  for (int64_t j = 0; j < rows; ++j, x += x_stride) {
    vector_t<A> columns[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) columns[v] = Part ? load_part<A>(x, count) : load<A>(x + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const A factor = factors.data[r * factors.out_step + j * factors.in_step];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] += columns[v] * factor;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      A* to = out + r * out_stride + v * W;
      vector_t<A> value = sums[r][v] * gain;
      if (onto) value += Part ? load_part<A>(to, count) : load<A>(to);
      if (Part) {
        store_part<A>(to, value, count);
      } else {
        store<A>(to, value);
      }
    }
  }
}

template <class A, int R>
__attribute__((noinline)) void combine_rows(Factors<A> factors, const A* x, int64_t x_stride, int64_t rows, A gain,
                                            bool onto, A* out, int64_t out_stride, int64_t columns) {
  constexpr int64_t W = kWidth<A>;
  constexpr int V = METAFAST_VECTOR_BYTES == 64 ? 4 : 2;
  // Few rows at once: the processor follows that many streams of memory, and partial sums stay accurate.
  constexpr int64_t kRows = 16;
  int64_t first = 0;
  do {
    const int64_t count = rows - first < kRows ? rows - first : kRows;
    int64_t k = 0;
    for (; k + V * W <= columns; k += V * W) {
      combine_tile<A, R, V, false>(factors, x + k, x_stride, count, gain, onto, out + k, out_stride, W);
    }
    for (; k + W <= columns; k += W) {
      combine_tile<A, R, 1, false>(factors, x + k, x_stride, count, gain, onto, out + k, out_stride, W);
    }
    if (k < columns) {
      combine_tile<A, R, 1, true>(factors, x + k, x_stride, count, gain, onto, out + k, out_stride, columns - k);
    }
    first += kRows;
    factors.data += kRows * factors.in_step;
    x += kRows * x_stride;
    onto = true;
  } while (first < rows);
}

// out_i = (onto ? out_i : 0) + gain sum_j factor_ij x_j for `outs` combinations of `rows` rows.
template <class A>
void combine(Factors<A> factors, const A* x, int64_t x_stride, int64_t rows, A gain, bool onto, A* out,
             int64_t out_stride, int64_t outs, int64_t columns) {
  const auto next = [&](auto width) {
    constexpr int R = decltype(width)::value;
    combine_rows<A, R>(factors, x, x_stride, rows, gain, onto, out, out_stride, columns);
    factors.data += R * factors.out_step;
    out += R * out_stride;
    outs -= R;
  };
  while (outs >= 5) next(std::integral_constant<int, 5>{});
  if (outs == 4) next(std::integral_constant<int, 4>{});
  if (outs == 3) next(std::integral_constant<int, 3>{});
  if (outs == 2) next(std::integral_constant<int, 2>{});
  if (outs == 1) next(std::integral_constant<int, 1>{});
}

// Of the upper half of x x^T + ridge I, the columns first..last; of its rows first..last what is no part of it, as zeros.
template <class A>
void ridge_gram(Rows<const A> x, A ridge, A* gram, int64_t stride, int64_t t, int64_t first, int64_t last, int64_t n,
                int64_t d) {
  constexpr int R = METAFAST_VECTOR_BYTES == 64 ? 4 : 2;
  for (int64_t i = first; i < last; ++i) {
    for (int64_t k = 0; k < i; ++k) gram[i * stride + k] = A(0);
    for (int64_t k = n; k < stride; ++k) gram[i * stride + k] = A(0);
  }
  const auto finish = [&](int64_t i, int64_t j, A sum) {
    if (j <= i) gram[j * stride + i] = i == j ? sum + ridge : sum;
  };
  int64_t i = first;
  for (; i + R <= last; i += R) tile_row<A, Cosine, R>(x, x, t, i, i + R, d, finish);
  for (; i < last; ++i) tile_row<A, Cosine, 1>(x, x, t, i, i + 1, d, finish);
}

// The upper factor U of a = U^T U in the place of the upper half of a, whose lower half is 0. Rows have `stride` entries,
// whole vectors. From the first pivot that is not positive on the rows are NaN.
template <class A>
void cholesky(A* a, int64_t n, int64_t stride) {
  constexpr int64_t W = kWidth<A>, kPanel = 16, kGroup = 5;
  for (int64_t panel = 0; panel < n; panel += kPanel) {
    const int64_t last = panel + kPanel < n ? panel + kPanel : n;
    for (int64_t k = panel; k < last; ++k) {
      A* row = a + k * stride;
      const A pivot = row[k] > A(0) ? std::sqrt(row[k]) : A(NAN);
      const A inverse = A(1) / pivot;
      for (int64_t j = k / W * W; j < stride; j += W) store<A>(row + j, load<A>(row + j) * inverse);
      row[k] = pivot;
      for (int64_t i = k + 1; i < last; ++i) {
        A* to = a + i * stride;
        const A factor = row[i];
        for (int64_t j = i / W * W; j < stride; j += W) store<A>(to + j, load<A>(to + j) - load<A>(row + j) * factor);
        // What the vector reached left of the diagonal.
        for (int64_t j = i / W * W; j < i; ++j) to[j] = A(0);
      }
    }
    for (int64_t i = last; i < n; i += kGroup) {
      const int64_t rows = n - i < kGroup ? n - i : kGroup, begin = i / W * W;
      combine<A>({a + panel * stride + i, 1, stride}, a + panel * stride + begin, stride, last - panel, A(-1), true,
                 a + i * stride + begin, stride, rows, stride - begin);
      for (int64_t r = i; r < i + rows; ++r) {
        for (int64_t j = begin; j < r; ++j) a[r * stride + j] = A(0);
      }
    }
  }
}

// The rows of b [n, classes] become those of (U^T U)^-1 b; `classes` is a number of whole vectors.
template <class A>
void cholesky_solve(const A* u, int64_t n, int64_t stride, A* b, int64_t classes) {
  using V = vector_t<A>;
  for (int64_t c = 0; c < classes; c += kWidth<A>, b += kWidth<A>) {
    for (int64_t k = 0; k < n; ++k) {
      const A* row = u + k * stride;
      const V value = load<A>(b + k * classes) * (A(1) / row[k]);
      store<A>(b + k * classes, value);
      for (int64_t j = k + 1; j < n; ++j) store<A>(b + j * classes, load<A>(b + j * classes) - value * row[j]);
    }
    for (int64_t k = n - 1; k >= 0; --k) {
      const A* row = u + k * stride;
      // Sums side by side: an addition waits for the one before.
      V part[4] = {};
      int64_t j = k + 1;
      for (; j + 4 <= n; j += 4) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) part[r] += load<A>(b + (j + r) * classes) * row[j + r];
      }
      for (; j < n; ++j) part[0] += load<A>(b + j * classes) * row[j];
      const V value = load<A>(b + k * classes) - ((part[0] + part[1]) + (part[2] + part[3]));
      store<A>(b + k * classes, value * (A(1) / row[k]));
    }
  }
}

// out_ij = scale x_i.w_j + offset for the rows first..last of x and every row of w.
template <class A>
void ridge_products(Rows<const A> x, Rows<const A> w, A scale, A offset, A* out, int64_t row_step, int64_t column_step,
                    int64_t t, int64_t first, int64_t last, int64_t columns, int64_t d) {
  for_each_sum<A, Cosine>(x, w, t, first, last, columns, d, [&](int64_t i, int64_t j, A sum) {
    out[i * row_step + j * column_step] = scale * sum + offset;
  });
}

// The sum of the products of two rows' entries.
template <class A>
A ridge_dot(const A* x, const A* y, int64_t d) {
  const A *const rows[1] = {x}, *const columns[1] = {y};
  A result[1][1];
  tile_sums<A, Cosine, 1, 1>(rows, columns, d, result);
  return result[0][0];
}
