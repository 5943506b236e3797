// Pairwise distances of the rows of one task. Read once for each instruction set: no guard.

// How many vectors, or pairs, are summed before they join the total: it bounds the rounding error of long sums.
constexpr int64_t kBlock = 64;

template <class S, class M, int R, int C>
__attribute__((noinline)) void tile_sums(const S* const (&x)[R], const S* const (&y)[C], int64_t d,
                                         accumulate_t<S> (&result)[R][C]) {
  using A = accumulate_t<S>;
  using V = vector_t<A>;
  constexpr int64_t W = kWidth<A>;
  V total[R * C];
  int64_t begin = 0;
  do {
    const int64_t end = begin + kBlock * W < d ? begin + kBlock * W : d;
    V part[R][C] = {};
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
#pragma GCC unroll 32
    for (int k = 0; k < R * C; ++k) total[k] = begin == 0 ? part[k / C][k % C] : total[k] + part[k / C][k % C];
    begin += kBlock * W;
  } while (begin < d);
  sums<A, R * C>(total, &result[0][0]);
}

// |x - factor y|^2
template <class S>
__attribute__((noinline)) accumulate_t<S> residual_square(const S* x, const S* y, accumulate_t<S> factor, int64_t d) {
  using A = accumulate_t<S>;
  using V = vector_t<A>;
  constexpr int64_t W = kWidth<A>;
  V total = {};
  for (int64_t begin = 0; begin < d; begin += kBlock * W) {
    V part = {};
    for (int64_t k = begin; k < d && k < begin + kBlock * W; k += W) {
      const V rest = d - k < W ? load_part<S>(x + k, d - k) - load_part<S>(y + k, d - k) * factor
                               : load<S>(x + k) - load<S>(y + k) * factor;
      part += rest * rest;
    }
    total += part;
  }
  return sum<A>(total);
}

// finish(i, j, sum) for R rows from i and all m columns.
template <class S, class M, int R, class Finish>
METAFAST_HOST_DEVICE void tile_row(Rows<const S> x, Rows<const S> y, int64_t t, int64_t i, int64_t m, int64_t d,
                                   const Finish& finish) {
  const S* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = x.row(t, i + r);
  int64_t j = 0;
  const auto tile = [&](auto width) {
    constexpr int C = decltype(width)::value;
    const S* columns[C];
    for (int c = 0; c < C; ++c) columns[c] = y.row(t, j + c);
    accumulate_t<S> sums[R][C];
    tile_sums<S, M, R, C>(rows, columns, d, sums);
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) finish(i + r, j + c, sums[r][c]);
    }
    j += C;
  };
  // Five columns, as 5-way data have, are one tile: a lone column costs as much as four.
  while (m - j >= 4 && m - j != 5) tile(std::integral_constant<int, 4>{});
  if (m - j == 5) tile(std::integral_constant<int, 5>{});
  while (j < m) tile(std::integral_constant<int, 1>{});
}

// finish(i, j, sum) for the rows begin..end and all m columns.
template <class S, class M, class Finish>
METAFAST_HOST_DEVICE void for_each_sum(Rows<const S> x, Rows<const S> y, int64_t t, int64_t begin, int64_t end,
                                       int64_t m, int64_t d, const Finish& finish) {
  constexpr int R = METAFAST_VECTOR_BYTES == 64 ? 4 : 2;
  int64_t i = begin;
  for (; i + R <= end; i += R) tile_row<S, M, R>(x, y, t, i, m, d, finish);
  for (; i < end; ++i) tile_row<S, M, 1>(x, y, t, i, m, d, finish);
}

// squares_i = |x_i|^2, summed in the order of tile_sums, so that equal rows have x.x = x.y.
template <class S>
void row_squares(Rows<const S> x, int64_t t, int64_t n, int64_t d, accumulate_t<S>* squares) {
  for (int64_t i = 0; i < n; ++i) {
    const S* const row[1] = {x.row(t, i)};
    accumulate_t<S> sums[1][1];
    tile_sums<S, Cosine, 1, 1>(row, row, d, sums);
    squares[i] = sums[0][0];
  }
}

// finish(i, j, pair) for the rows begin..end and all m columns; the squared norms are null unless M::kRows.
template <class S, class M, class Finish>
METAFAST_HOST_DEVICE void for_each_pair(Rows<const S> x, Rows<const S> y, const accumulate_t<S>* x_squares,
                                        const accumulate_t<S>* y_squares, int64_t t, int64_t begin, int64_t end,
                                        int64_t m, int64_t d, const Finish& finish) {
  using A = accumulate_t<S>;
  for_each_sum<S, M>(x, y, t, begin, end, m, d, [&](int64_t i, int64_t j, A sum) {
    if constexpr (M::kRows) {
      finish(i, j, Pair<A>{sum, x_squares[i], y_squares[j]});
    } else {
      finish(i, j, Pair<A>{sum, A(0), A(0)});
    }
  });
}

// The distance of one pair.
template <class S, class M>
METAFAST_HOST_DEVICE accumulate_t<S> pair_value(Rows<const S> x, Rows<const S> y, int64_t t, int64_t i, int64_t j,
                                                int64_t d, Pair<accumulate_t<S>> pair) {
  if constexpr (M::kRows) {
    if (M::close(pair)) {
      return M::close_value(pair, residual_square<S>(x.row(t, i), y.row(t, j), pair.sum / pair.y_square, d));
    }
  }
  return M::value(pair);
}

template <class S, class M>
void distance_value(Rows<const S> x, Rows<const S> y, const accumulate_t<S>* x_squares,
                    const accumulate_t<S>* y_squares, Rows<S> out, int64_t t, int64_t begin, int64_t end, int64_t m,
                    int64_t d) {
  for_each_pair<S, M>(x, y, x_squares, y_squares, t, begin, end, m, d,
                      [&](int64_t i, int64_t j, Pair<accumulate_t<S>> pair) {
                        out.row(t, i)[j] = static_cast<S>(pair_value<S, M>(x, y, t, i, j, d, pair));
                      });
}

// weight [m, stride], a column for each row of y, = grad * w of each pair's slope; x_part [n] and y_part [m] are what the
// slopes add of the rows themselves. grad may be weight: the entries of its rows are grad_step apart.
template <class S, class M>
void distance_slopes(Rows<const S> grad, int64_t grad_step, Rows<const S> x, Rows<const S> y,
                     const accumulate_t<S>* x_squares, const accumulate_t<S>* y_squares, int64_t t, int64_t n,
                     int64_t m, int64_t d, accumulate_t<S>* weight, int64_t stride, accumulate_t<S>* x_part,
                     accumulate_t<S>* y_part) {
  using A = accumulate_t<S>;
  for (int64_t i = 0; i < n; ++i) x_part[i] = A(0);
  for (int64_t j = 0; j < m; ++j) y_part[j] = A(0);
  if constexpr (M::kSlopeOfSum) {
    for_each_pair<S, M>(x, y, x_squares, y_squares, t, 0, n, m, d, [&](int64_t i, int64_t j, Pair<A> pair) {
      const A g = static_cast<A>(grad.row(t, i)[j * grad_step]);
      const Slope<A> slope = M::slope(pair);
      weight[j * stride + i] = g * slope.w;
      x_part[i] += g * slope.x_part;
      y_part[j] += g * slope.y_part;
    });
  } else {
    const A w = M::slope(Pair<A>{}).w;
    // Blocks of rows, for the cache's sake: one of the two is read or written across its rows.
    for (int64_t block = 0; block < n; block += kBlock) {
      const int64_t last = block + kBlock < n ? block + kBlock : n;
      for (int64_t j = 0; j < m; ++j) {
        const S* from = grad.row(t, 0) + j * grad_step;
        for (int64_t i = block; i < last; ++i) {
          weight[j * stride + i] = static_cast<A>(from[i * grad.row_stride]) * w;
        }
      }
    }
  }
}

// For R rows from i, over the features begin..end:
//   grad_x_i = x_part_i x_i + sum_j weight_ij step_x(x_i, y_j),    grad_y_j += sum_i weight_ij step_y(x_i, y_j)
// y and grad_y [m, chunk] stay in the first-level cache, so each row of x is read once.
template <class S, class M, int R>
METAFAST_HOST_DEVICE void spread_rows(const accumulate_t<S>* weight, int64_t stride, const accumulate_t<S>* x_part,
                                      Rows<const S> x, const accumulate_t<S>* y, Rows<S> grad_x,
                                      accumulate_t<S>* grad_y, int64_t t, int64_t i, int64_t m, int64_t begin,
                                      int64_t end, int64_t chunk) {
  using A = accumulate_t<S>;
  using V = vector_t<A>;
  constexpr int64_t W = kWidth<A>;
  for (int64_t k = begin; k < end; k += W) {
    const int64_t count = end - k < W ? end - k : W;
    V rows[R], total[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      rows[r] = count == W ? load<S>(x.row(t, i + r) + k) : load_part<S>(x.row(t, i + r) + k, count);
      total[r] = M::kRows ? rows[r] * x_part[i + r] : V{};
    }
    const A* column = y + (k - begin);
    A* grad_column = grad_y + (k - begin);
    for (int64_t block = 0; block < m; block += kBlock) {
      V part[R] = {};
      for (int64_t j = block; j < m && j < block + kBlock; ++j, column += chunk, grad_column += chunk) {
        const V other = load<A>(column);
        V opposite = load<A>(grad_column);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const A w = weight[j * stride + i + r];
          const V step = M::step_x(rows[r], other);
          part[r] += step * w;
          // The other slope of a difference is its negative.
          if constexpr (M::kRows) {
            opposite += M::step_y(rows[r], other) * w;
          } else {
            opposite -= step * w;
          }
        }
        store<A>(grad_column, opposite);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total[r] += part[r];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      S* to = grad_x.row(t, i + r) + k;
      if (count == W) {
        store<S>(to, total[r]);
      } else {
        store_part<S>(to, total[r], count);
      }
    }
  }
}

// The features begin..end of both gradients of one task. scratch holds 3 m chunk numbers: the rows of y, the gradient of
// y, and the part of it that the current block of rows adds. chunk is end - begin rounded up to whole vectors.
template <class S, class M>
void distance_spread(const accumulate_t<S>* weight, int64_t stride, const accumulate_t<S>* x_part,
                     const accumulate_t<S>* y_part, Rows<const S> x, Rows<const S> y, Rows<S> grad_x, Rows<S> grad_y,
                     int64_t t, int64_t n, int64_t m, int64_t begin, int64_t end, int64_t chunk,
                     accumulate_t<S>* scratch) {
  using A = accumulate_t<S>;
  constexpr int64_t W = kWidth<A>;
  // As many rows as there are registers for, and 5 because 5-way data come in multiples of it.
  constexpr int R = METAFAST_VECTOR_BYTES == 64 ? 5 : 4;
  constexpr int64_t kRows = 16 * R;
  A *columns = scratch, *total = columns + m * chunk, *part = total + m * chunk;
  for (int64_t j = 0; j < m; ++j) {
    for (int64_t k = begin; k < end; k += W) {
      const auto row = end - k < W ? load_part<S>(y.row(t, j) + k, end - k) : load<S>(y.row(t, j) + k);
      const int64_t at = j * chunk + (k - begin);
      store<A>(columns + at, row);
      store<A>(total + at, M::kRows ? row * y_part[j] : vector_t<A>{});
    }
  }
  for (int64_t block = 0; block < n; block += kRows) {
    const int64_t last = block + kRows < n ? block + kRows : n;
    for (int64_t k = 0; k < m * chunk; ++k) part[k] = A(0);
    int64_t i = block;
    for (; i + R <= last; i += R) {
      spread_rows<S, M, R>(weight, stride, x_part, x, columns, grad_x, part, t, i, m, begin, end, chunk);
    }
    for (; i < last; ++i) {
      spread_rows<S, M, 1>(weight, stride, x_part, x, columns, grad_x, part, t, i, m, begin, end, chunk);
    }
    for (int64_t k = 0; k < m * chunk; ++k) total[k] += part[k];
  }
  for (int64_t j = 0; j < m; ++j) {
    S* to = grad_y.row(t, j);
    for (int64_t k = begin; k < end; ++k) to[k] = static_cast<S>(total[j * chunk + (k - begin)]);
  }
}

// One row of the forward-mode derivative: <slope, tangents> of every pair.
template <class S, class M>
void distance_tangent(Rows<const S> x, Rows<const S> y, const accumulate_t<S>* x_squares,
                      const accumulate_t<S>* y_squares, Rows<const S> tangent_x, Rows<const S> tangent_y, Rows<S> out,
                      int64_t t, int64_t i, int64_t m, int64_t d) {
  using A = accumulate_t<S>;
  using V = vector_t<A>;
  constexpr int64_t W = kWidth<A>;
  const S *row = x.row(t, i), *row_tangent = tangent_x.row(t, i);
  for (int64_t j = 0; j < m; ++j) {
    const S *column = y.row(t, j), *column_tangent = tangent_y.row(t, j);
    V total[4] = {};
    for (int64_t begin = 0; begin < d; begin += kBlock * W) {
      V part[4] = {};
      for (int64_t k = begin; k < d && k < begin + kBlock * W; k += W) {
        const int64_t count = d - k < W ? d - k : W;
        const auto read = [&](const S* from) { return count == W ? load<S>(from) : load_part<S>(from, count); };
        const V a = read(row + k), b = read(column + k), u = read(row_tangent + k), v = read(column_tangent + k);
        M::add(part[0], a, b);
        // Not step_x u + step_y v: equal tangents of a difference must cancel before they are multiplied.
        part[1] += M::kRows ? M::step_x(a, b) * u + M::step_y(a, b) * v : M::step_x(a, b) * (u - v);
        part[2] += a * u;
        part[3] += b * v;
      }
      for (int s = 0; s < 4; ++s) total[s] += part[s];
    }
    A totals[4];
    sums<A, 4>(total, totals);
    const Slope<A> slope = M::slope(Pair<A>{totals[0], M::kRows ? x_squares[i] : A(0), M::kRows ? y_squares[j] : A(0)});
    A value = slope.w * totals[1];
    if constexpr (M::kRows) value += slope.x_part * totals[2] + slope.y_part * totals[3];
    out.row(t, i)[j] = static_cast<S>(value);
  }
}
