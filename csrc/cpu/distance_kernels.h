// Pairwise distances of the rows of one task. Read once for each instruction set: no guard.

// How many vectors are summed before they join the total: it bounds the rounding error of long rows.
constexpr int64_t kBlock = 64;

template <class S, class M, int R, int C>
__attribute__((noinline)) void tile_sums(const S* const (&x)[R], const S* const (&y)[C], int64_t d,
                                         accumulate_t<S> (&result)[R][C][M::kSums]) {
  using A = accumulate_t<S>;
  using V = vector_t<A>;
  constexpr int64_t W = kWidth<A>;
  V total[R][C][M::kSums] = {};
  for (int64_t begin = 0; begin < d; begin += kBlock * W) {
    const int64_t end = begin + kBlock * W < d ? begin + kBlock * W : d;
    V part[R][C][M::kSums] = {};
    int64_t k = begin;
    for (; k + W <= end; k += W) {
      V columns[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) columns[c] = load<S>(y[c] + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V row = load<S>(x[r] + k);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) M::add(part[r][c], row, columns[c]);
      }
    }
    if (k < end) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V row = load_part<S>(x[r] + k, end - k);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) M::add(part[r][c], row, load_part<S>(y[c] + k, end - k));
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        for (int s = 0; s < M::kSums; ++s) total[r][c][s] += part[r][c][s];
      }
    }
  }
  for (int s = 0; s < M::kSums; ++s) {
    V column[R * C];
    A folded[R * C];
#pragma GCC unroll 16
    for (int k = 0; k < R * C; ++k) column[k] = total[k / C][k % C][s];
    sums<A, R * C>(column, folded);
    for (int k = 0; k < R * C; ++k) result[k / C][k % C][s] = folded[k];
  }
}

// finish(i, j, sums) for R rows from i and all m columns.
template <class S, class M, int R, class Finish>
METAFAST_HOST_DEVICE void tile_row(Rows<const S> x, Rows<const S> y, int64_t t, int64_t i, int64_t m, int64_t d,
                                   const Finish& finish) {
  constexpr int C = M::kSums == 1 ? 4 : 2;
  const S* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = x.row(t, i + r);
  int64_t j = 0;
  for (; j + C <= m; j += C) {
    const S* columns[C];
    for (int c = 0; c < C; ++c) columns[c] = y.row(t, j + c);
    accumulate_t<S> sums[R][C][M::kSums];
    tile_sums<S, M, R, C>(rows, columns, d, sums);
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) finish(i + r, j + c, sums[r][c]);
    }
  }
  for (; j < m; ++j) {
    const S* const columns[1] = {y.row(t, j)};
    accumulate_t<S> sums[R][1][M::kSums];
    tile_sums<S, M, R, 1>(rows, columns, d, sums);
    for (int r = 0; r < R; ++r) finish(i + r, j, sums[r][0]);
  }
}

// finish(i, j, sums) for the rows begin..end and all m columns.
template <class S, class M, class Finish>
METAFAST_HOST_DEVICE void for_each_pair(Rows<const S> x, Rows<const S> y, int64_t t, int64_t begin, int64_t end,
                                        int64_t m, int64_t d, const Finish& finish) {
  constexpr int R = M::kSums == 1 ? (METAFAST_VECTOR_BYTES == 64 ? 4 : 2) : 1;
  int64_t i = begin;
  for (; i + R <= end; i += R) tile_row<S, M, R>(x, y, t, i, m, d, finish);
  for (; i < end; ++i) tile_row<S, M, 1>(x, y, t, i, m, d, finish);
}

template <class S, class O, class M>
void distance_value(Rows<const S> x, Rows<const S> y, Rows<O> out, int64_t t, int64_t begin, int64_t end, int64_t m,
                    int64_t d) {
  using A = accumulate_t<S>;
  for_each_pair<S, M>(x, y, t, begin, end, m, d, [&](int64_t i, int64_t j, const A(&sums)[M::kSums]) {
    out.row(t, i)[j] = static_cast<O>(M::template value<A>(sums));
  });
}

// weight [n, m] = grad * w of each pair's slope; x_part [n] and y_part [m] are what the slopes add of the rows themselves.
template <class S, class M>
void distance_slopes(Rows<const S> grad, Rows<const S> x, Rows<const S> y, int64_t t, int64_t n, int64_t m, int64_t d,
                     accumulate_t<S>* weight, accumulate_t<S>* x_part, accumulate_t<S>* y_part) {
  using A = accumulate_t<S>;
  for (int64_t i = 0; i < n; ++i) x_part[i] = A(0);
  for (int64_t j = 0; j < m; ++j) y_part[j] = A(0);
  const auto finish = [&](int64_t i, int64_t j, const A(&sums)[M::kSums]) {
    const A g = static_cast<A>(grad.row(t, i)[j]);
    const Slope<A> slope = M::template slope<A>(sums);
    weight[i * m + j] = g * slope.w;
    x_part[i] += g * slope.x_part;
    y_part[j] += g * slope.y_part;
  };
  if constexpr (M::kNeedsSums) {
    for_each_pair<S, M>(x, y, t, 0, n, m, d, finish);
  } else {
    const A none[M::kSums] = {};
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < m; ++j) finish(i, j, none);
    }
  }
}

// For R rows from i, over the features begin..end:
//   grad_x_i = x_part_i x_i + sum_j weight_ij of(x_i, y_j),    grad_y_j -= sum_i weight_ij of(x_i, y_j)
// grad_y [m, chunk] stays in the first-level cache, so each row of x is read once.
template <class S, class D, int R>
METAFAST_HOST_DEVICE void spread_rows(const accumulate_t<S>* weight, const accumulate_t<S>* x_part, Rows<const S> x,
                                      const accumulate_t<S>* y, Rows<S> grad_x, accumulate_t<S>* grad_y, int64_t t,
                                      int64_t i, int64_t m, int64_t begin, int64_t end, int64_t chunk) {
  using A = accumulate_t<S>;
  using V = vector_t<A>;
  constexpr int64_t W = kWidth<A>;
  for (int64_t k = begin; k < end; k += W) {
    const int64_t count = end - k < W ? end - k : W;
    V rows[R], gradient[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      rows[r] = count == W ? load<S>(x.row(t, i + r) + k) : load_part<S>(x.row(t, i + r) + k, count);
      gradient[r] = rows[r] * x_part[i + r];
    }
    const A* column = y + (k - begin);
    A* grad_column = grad_y + (k - begin);
    for (int64_t j = 0; j < m; ++j, column += chunk, grad_column += chunk) {
      const V other = load<A>(column);
      V opposite = load<A>(grad_column);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const V step = D::template of<V>(rows[r], other) * weight[(i + r) * m + j];
        gradient[r] += step;
        opposite -= step;
      }
      store<A>(grad_column, opposite);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      S* to = grad_x.row(t, i + r) + k;
      if (count == W) {
        store<S>(to, gradient[r]);
      } else {
        store_part<S>(to, gradient[r], count);
      }
    }
  }
}

// The features begin..end of both gradients of one task; scratch holds 2 m chunk numbers, of which the second half
// returns the gradient of y. chunk is end - begin rounded up to whole vectors.
template <class S, class O, class D>
void distance_spread(const accumulate_t<S>* weight, const accumulate_t<S>* x_part, const accumulate_t<S>* y_part,
                     Rows<const S> x, Rows<const S> y, Rows<S> grad_x, Rows<O> grad_y, int64_t t, int64_t n, int64_t m,
                     int64_t begin, int64_t end, int64_t chunk, accumulate_t<S>* scratch) {
  using A = accumulate_t<S>;
  constexpr int64_t W = kWidth<A>;
  A* columns = scratch;
  A* sums = scratch + m * chunk;
  for (int64_t j = 0; j < m; ++j) {
    for (int64_t k = begin; k < end; k += W) {
      const auto row = end - k < W ? load_part<S>(y.row(t, j) + k, end - k) : load<S>(y.row(t, j) + k);
      store<A>(columns + j * chunk + (k - begin), row);
      store<A>(sums + j * chunk + (k - begin), row * y_part[j]);
    }
  }
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    spread_rows<S, D, 4>(weight, x_part, x, columns, grad_x, sums, t, i, m, begin, end, chunk);
  }
  for (; i + 2 <= n; i += 2) {
    spread_rows<S, D, 2>(weight, x_part, x, columns, grad_x, sums, t, i, m, begin, end, chunk);
  }
  for (; i < n; ++i) {
    spread_rows<S, D, 1>(weight, x_part, x, columns, grad_x, sums, t, i, m, begin, end, chunk);
  }
  for (int64_t j = 0; j < m; ++j) {
    O* to = grad_y.row(t, j);
    for (int64_t k = begin; k < end; ++k) to[k] = static_cast<O>(sums[j * chunk + (k - begin)]);
  }
}

// One row of the forward-mode derivative: <slope, tangents> of every pair.
template <class S, class M>
void distance_tangent(Rows<const S> x, Rows<const S> y, Rows<const S> tangent_x, Rows<const S> tangent_y, Rows<S> out,
                      int64_t t, int64_t i, int64_t m, int64_t d) {
  using A = accumulate_t<S>;
  using V = vector_t<A>;
  using D = std::conditional_t<std::is_same_v<M, Cityblock>, Sign, Difference>;
  constexpr int64_t W = kWidth<A>;
  const S *row = x.row(t, i), *row_tangent = tangent_x.row(t, i);
  for (int64_t j = 0; j < m; ++j) {
    const S *column = y.row(t, j), *column_tangent = tangent_y.row(t, j);
    V sums[M::kSums] = {}, difference = {}, x_part = {}, y_part = {};
    for (int64_t k = 0; k < d; k += W) {
      const int64_t count = d - k < W ? d - k : W;
      const auto read = [&](const S* from) { return count == W ? load<S>(from) : load_part<S>(from, count); };
      const V a = read(row + k), b = read(column + k), u = read(row_tangent + k), v = read(column_tangent + k);
      M::add(sums, a, b);
      difference += D::template of<V>(a, b) * (u - v);
      x_part += a * u;
      y_part += b * v;
    }
    A totals[M::kSums];
    for (int s = 0; s < M::kSums; ++s) totals[s] = sum<A>(sums[s]);
    const Slope<A> slope = M::template slope<A>(totals);
    A value = slope.w * sum<A>(difference);
    if constexpr (M::kSums > 1) value += slope.x_part * sum<A>(x_part) + slope.y_part * sum<A>(y_part);
    out.row(t, i)[j] = static_cast<S>(value);
  }
}
