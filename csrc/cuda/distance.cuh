// Pairwise distances on a GPU: always direct differences, so that close points stay accurate. A lane holds 16 bytes of
// a row, a warp several rows, and the columns (rows of y) of a block lie in shared memory.
#pragma once

#include "cuda/features.cuh"
#include "math/distance.h"

namespace metafast::cuda {

// How the sums of all pairs are cut into blocks: by rows, columns and, while there are too few blocks, features.
struct DistancePlan {
  int64_t row_blocks;
  int64_t column_blocks;
  int64_t chunks;       // of features
  int64_t chunk_slabs;  // slabs in a chunk
};

// What a warp of distance_sums_kernel holds: few columns leave registers for more rows.
constexpr int kFewColumns = 5, kRowsOfFew = 6;
constexpr int kManyColumns = 10, kRowsOfMany = 4;

// sums[r][c] += what the metric adds over one slab of R rows and of C columns in shared memory.
template <class S, class M, int R, int C>
__device__ __forceinline__ void add_slab(const Features<S> (&rows)[R], const Features<S> (*columns)[kWarp],
                                         accumulate_t<S> (&sums)[R * C]) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const Features<S> column = columns[c][lane_index()];
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int v = 0; v < kVector<S>; ++v) M::add(sums[r * C + c], rows[r].values[v], column.values[v]);
    }
  }
}

// store(k, sum over the warp of sums[k]) for k < N, each by one lane.
template <int N, class A, class Store>
__device__ __forceinline__ void store_warp_sums(const A (&sums)[N], const Store& store) {
#pragma unroll
  for (int begin = 0; begin < N; begin += kWarp) {
    constexpr int kRest = N % kWarp == 0 ? kWarp : N % kWarp;
    if (begin + kWarp <= N) {
      A part[kWarp];
#pragma unroll
      for (int k = 0; k < kWarp; ++k) part[k] = begin + k < N ? sums[begin + k] : A(0);
      store(begin + lane_index(), warp_sums(part));
    } else {
      A part[kRest];
#pragma unroll
      for (int k = 0; k < kRest; ++k) part[k] = begin + k < N ? sums[begin + k] : A(0);
      const A sum = warp_sums(part);
      constexpr int kShare = kWarp / next_power_of_two(kRest);
      if (lane_index() % kShare == 0 && lane_index() / kShare < kRest) store(begin + lane_index() / kShare, sum);
    }
  }
}

// A block: kWarps R rows of x, C columns, one chunk of features. sums [chunks, T, n, m], or the distances themselves
// where `out` [T, n, m] is given (one chunk, and a metric that needs nothing but the sum).
template <class S, class M, int R, int C>
__global__ void __launch_bounds__(kThreads, kVector<S> == 4 && C == kFewColumns ? 2 : 1)
    distance_sums_kernel(WideRows<const S> x, WideRows<const S> y, accumulate_t<S>* __restrict__ sums,
                         S* __restrict__ out, int64_t tasks, int64_t n, int64_t m, int64_t d, DistancePlan plan) {
  using A = accumulate_t<S>;
  METAFAST_SHARED(Features<S>, columns, [C][kWarp]);
  BlockNumber block;
  const int64_t first_column = block.part(plan.column_blocks) * C;
  const int64_t chunk = block.part(plan.chunks);
  const int64_t first_row = (block.part(plan.row_blocks) * kWarps + warp_index()) * R;
  const int64_t t = block.rest();

  const S* rows[R];
#pragma unroll
  for (int r = 0; r < R; ++r) rows[r] = x.row(t, first_row + r < n ? first_row + r : n - 1);
  A totals[R * C] = {};
  const int64_t end = (chunk + 1) * plan.chunk_slabs * kSlab<S>;
  for (int64_t begin = chunk * plan.chunk_slabs * kSlab<S>; begin < end && begin < d; begin += kSlab<S>) {
    const int64_t k = begin + lane_index() * kVector<S>;
    Features<S> features[R];
#pragma unroll
    for (int r = 0; r < R; ++r) features[r] = load_features(rows[r], x.wide, k, d);
    __syncthreads();
    for (int c = warp_index(); c < C; c += kWarps) {
      const int64_t column = first_column + c < m ? first_column + c : m - 1;
      columns[c][lane_index()] = load_features(y.row(t, column), y.wide, k, d);
    }
    __syncthreads();
    add_slab<S, M, R, C>(features, columns, totals);
  }
  store_warp_sums(totals, [&](int k, A sum) {
    const int64_t i = first_row + k / C, j = first_column + k % C;
    if (i >= n || j >= m) return;
    const int64_t pair = (t * n + i) * m + j;
    if (out != nullptr) {
      out[pair] = static_cast<S>(M::value(Pair<A>{sum, A(0), A(0)}));
    } else {
      sums[chunk * tasks * n * m + pair] = sum;
    }
  });
}

// squares [T, n] = |x_i|^2 by one warp a row, in the order of the sums above: equal rows have x.x = x.y.
template <class S>
__global__ void __launch_bounds__(kThreads)
    row_squares_kernel(WideRows<const S> x, accumulate_t<S>* __restrict__ squares, int64_t tasks, int64_t n, int64_t d,
                       int64_t chunk_slabs) {
  using A = accumulate_t<S>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp_index();
  if (row >= tasks * n) return;
  const S* from = x.row(row / n, row % n);
  A total = A(0);
  for (int64_t chunk = 0; chunk < d; chunk += chunk_slabs * kSlab<S>) {
    A sum = A(0);
    for (int64_t slab = chunk; slab < d && slab < chunk + chunk_slabs * kSlab<S>; slab += kSlab<S>) {
      const Features<S> features = load_features(from, x.wide, slab + lane_index() * kVector<S>, d);
#pragma unroll
      for (int v = 0; v < kVector<S>; ++v) Cosine::add(sum, features.values[v], features.values[v]);
    }
    total += warp_sum(sum);
  }
  if (lane_index() == 0) squares[row] = total;
}

// A pair's number in [T, n, m], taken apart.
struct PairIndex {
  int64_t t, i, j;
};
__device__ __forceinline__ PairIndex pair_index(int64_t pair, int64_t n, int64_t m) {
  return {pair / m / n, pair / m % n, pair % m};
}

template <class S, class M>
__device__ __forceinline__ Pair<accumulate_t<S>> read_pair(accumulate_t<S> sum, const accumulate_t<S>* x_squares,
                                                           const accumulate_t<S>* y_squares, int64_t n, int64_t m,
                                                           PairIndex at) {
  using A = accumulate_t<S>;
  if constexpr (M::kRows) return {sum, x_squares[at.t * n + at.i], y_squares[at.t * m + at.j]};
  return {sum, A(0), A(0)};
}

// One thread a pair: adds up the chunks. totals [T, n, m] receives the sums and out the distances, where given. The
// warp measures close pairs of a metric of rows again, together.
template <class S, class M, class Out>
__global__ void __launch_bounds__(kThreads, 4)
    distance_finish_kernel(WideRows<const S> x, WideRows<const S> y, const accumulate_t<S>* __restrict__ sums,
                           const accumulate_t<S>* __restrict__ x_squares, const accumulate_t<S>* __restrict__ y_squares,
                           accumulate_t<S>* __restrict__ totals, Out* __restrict__ out, int64_t tasks, int64_t n,
                           int64_t m, int64_t d, int64_t chunks) {
  using A = accumulate_t<S>;
  const int64_t pairs = tasks * n * m;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool active = number < pairs;
  const PairIndex at = pair_index(active ? number : pairs - 1, n, m);
  A sum = A(0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk * pairs + (active ? number : pairs - 1)];
  if (totals != nullptr && active) totals[number] = sum;
  if (out == nullptr) return;
  const Pair<A> pair = read_pair<S, M>(sum, x_squares, y_squares, n, m, at);
  A value = M::value(pair);
  if constexpr (M::kRows) {
    const A factor = pair.sum / pair.y_square;
    unsigned close = __ballot_sync(kAllLanes, active && M::close(pair));
    while (close != 0) {
      const int owner = __ffs(static_cast<int>(close)) - 1;
      close &= close - 1;
      const PairIndex one = pair_index(__shfl_sync(kAllLanes, static_cast<long long>(number), owner), n, m);
      const A share = __shfl_sync(kAllLanes, factor, owner);
      const S *row = x.row(one.t, one.i), *column = y.row(one.t, one.j);
      A residual = A(0);
      for (int64_t k = lane_index() * kVector<S>; k < d; k += kSlab<S>) {
        const Features<S> a = load_features(row, x.wide, k, d), b = load_features(column, y.wide, k, d);
#pragma unroll
        for (int v = 0; v < kVector<S>; ++v) {
          // Fused wherever the compiler stands: the difference is far smaller than the product.
          const A rest = std::fma(-share, b.values[v], a.values[v]);
          residual += rest * rest;
        }
      }
      residual = warp_sum(residual);
      if (lane_index() == owner) value = M::close_value(pair, residual);
    }
  }
  if (active) out[number] = static_cast<Out>(value);
}

// Which argument a gradient belongs to.
enum class Side { x, y };

constexpr int kVjpRows = 2;      // of a warp
constexpr int kVjpColumns = 16;  // in shared memory at a time

// The gradient for one argument, `own` [T, n, d], the other being `other` [T, m, d]:
//   out_i = sum_j g_ij (w_ij step(own_i, other_j) + part_ij own_i)
// grad and totals are [T, rows of x, rows of y]. A block: kWarps kVjpRows rows, one slab of features.
template <class S, class M, Side side, class G>
__global__ void __launch_bounds__(kThreads, 2)
    distance_vjp_kernel(const G* __restrict__ grad, int64_t grad_batch_stride, int64_t grad_own_stride,
                        int64_t grad_other_stride, const accumulate_t<S>* __restrict__ totals,
                        const accumulate_t<S>* __restrict__ own_squares,
                        const accumulate_t<S>* __restrict__ other_squares, WideRows<const S> own,
                        WideRows<const S> other, WideRows<S> out, int64_t n, int64_t m, int64_t d, int64_t row_blocks,
                        int64_t slabs) {
  using A = accumulate_t<S>;
  constexpr int kRows = kWarps * kVjpRows;
  METAFAST_SHARED(Features<S>, columns, [kVjpColumns][kWarp]);
  METAFAST_SHARED(A, weights, [kRows][kVjpColumns]);
  METAFAST_SHARED(A, parts, [kRows][kVjpColumns]);
  BlockNumber block;
  const int64_t k = block.part(slabs) * kSlab<S> + lane_index() * kVector<S>;
  const int64_t block_row = block.part(row_blocks) * kRows;
  const int64_t t = block.rest();

  Features<S> rows[kVjpRows], result[kVjpRows];
#pragma unroll
  for (int r = 0; r < kVjpRows; ++r) {
    const int64_t i = block_row + warp_index() * kVjpRows + r;
    rows[r] = load_features(own.row(t, i < n ? i : n - 1), own.wide, k, d);
#pragma unroll
    for (int v = 0; v < kVector<S>; ++v) result[r].values[v] = A(0);
  }
  for (int64_t first = 0; first < m; first += kVjpColumns) {
    __syncthreads();
    for (int c = warp_index(); c < kVjpColumns && first + c < m; c += kWarps) {
      columns[c][lane_index()] = load_features(other.row(t, first + c), other.wide, k, d);
    }
    for (int p = static_cast<int>(threadIdx.x); p < kRows * kVjpColumns; p += kThreads) {
      const int64_t i = block_row + p / kVjpColumns, j = first + p % kVjpColumns;
      if (i >= n || j >= m) continue;
      const A g = static_cast<A>(grad[t * grad_batch_stride + i * grad_own_stride + j * grad_other_stride]);
      Pair<A> pair{};
      if constexpr (M::kSlopeOfSum) {
        pair.sum = totals[side == Side::x ? (t * n + i) * m + j : (t * m + j) * n + i];
      }
      if constexpr (M::kRows) {
        const A own_square = own_squares[t * n + i], other_square = other_squares[t * m + j];
        pair.x_square = side == Side::x ? own_square : other_square;
        pair.y_square = side == Side::x ? other_square : own_square;
      }
      const Slope<A> slope = M::slope(pair);
      weights[p / kVjpColumns][p % kVjpColumns] = g * slope.w;
      if constexpr (M::kRows) {
        parts[p / kVjpColumns][p % kVjpColumns] = g * (side == Side::x ? slope.x_part : slope.y_part);
      }
    }
    __syncthreads();
    // Summed by tiles, which bounds the rounding error of long sums.
    Features<S> tile[kVjpRows] = {};
    for (int c = 0; c < kVjpColumns && first + c < m; ++c) {
      const Features<S> column = columns[c][lane_index()];
#pragma unroll
      for (int r = 0; r < kVjpRows; ++r) {
        const int row = warp_index() * kVjpRows + r;
        if (block_row + row >= n) continue;
        const A w = weights[row][c];
#pragma unroll
        for (int v = 0; v < kVector<S>; ++v) {
          const A a = rows[r].values[v], b = column.values[v];
          tile[r].values[v] += w * (side == Side::x ? M::step_x(a, b) : M::step_y(b, a));
          if constexpr (M::kRows) tile[r].values[v] += parts[row][c] * a;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kVjpRows; ++r) {
#pragma unroll
      for (int v = 0; v < kVector<S>; ++v) result[r].values[v] += tile[r].values[v];
    }
  }
#pragma unroll
  for (int r = 0; r < kVjpRows; ++r) {
    const int64_t i = block_row + warp_index() * kVjpRows + r;
    if (i < n) store_features(out.row(t, i), out.wide, k, d, result[r]);
  }
}

constexpr int kJvpRows = 2;     // of a warp
constexpr int kJvpColumns = 5;  // of a block

// out_ij = <slope of the distance, tangents>. A block: kWarps kJvpRows rows, kJvpColumns columns, all features.
template <class S, class M>
__global__ void __launch_bounds__(kThreads, kVector<S> == 4 ? 2 : 1)
    distance_jvp_kernel(WideRows<const S> x, WideRows<const S> y, WideRows<const S> tangent_x,
                        WideRows<const S> tangent_y, const accumulate_t<S>* __restrict__ x_squares,
                        const accumulate_t<S>* __restrict__ y_squares, S* __restrict__ out, int64_t n, int64_t m,
                        int64_t d, int64_t row_blocks, int64_t column_blocks) {
  using A = accumulate_t<S>;
  constexpr int R = kJvpRows, C = kJvpColumns;
  METAFAST_SHARED(Features<S>, columns, [C][kWarp]);
  METAFAST_SHARED(Features<S>, column_tangents, [C][kWarp]);
  BlockNumber block;
  const int64_t first_column = block.part(column_blocks) * C;
  const int64_t first_row = (block.part(row_blocks) * kWarps + warp_index()) * R;
  const int64_t t = block.rest();

  // The sum of a pair, <step, tangents>, x . tangent_x and y . tangent_y.
  A sums[R * C] = {}, steps[R * C] = {}, row_parts[R * C] = {}, column_parts[R * C] = {};
  for (int64_t begin = 0; begin < d; begin += kSlab<S>) {
    const int64_t k = begin + lane_index() * kVector<S>;
    __syncthreads();
    for (int c = warp_index(); c < C; c += kWarps) {
      const int64_t j = first_column + c < m ? first_column + c : m - 1;
      columns[c][lane_index()] = load_features(y.row(t, j), y.wide, k, d);
      column_tangents[c][lane_index()] = load_features(tangent_y.row(t, j), tangent_y.wide, k, d);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t i = first_row + r < n ? first_row + r : n - 1;
      const Features<S> row = load_features(x.row(t, i), x.wide, k, d);
      const Features<S> row_tangent = load_features(tangent_x.row(t, i), tangent_x.wide, k, d);
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int v = 0; v < kVector<S>; ++v) {
          const A a = row.values[v], u = row_tangent.values[v];
          const A b = columns[c][lane_index()].values[v], w = column_tangents[c][lane_index()].values[v];
          M::add(sums[r * C + c], a, b);
          if constexpr (M::kRows) {
            steps[r * C + c] += M::step_x(a, b) * u + M::step_y(a, b) * w;
            row_parts[r * C + c] += a * u;
            column_parts[r * C + c] += b * w;
          } else {
            // Not step_x u + step_y w: equal tangents of a difference must cancel before they are multiplied.
            steps[r * C + c] += M::step_x(a, b) * (u - w);
          }
        }
      }
    }
  }
  const A sum = warp_sums(sums), step = warp_sums(steps);
  A row_part = A(0), column_part = A(0);
  if constexpr (M::kRows) {
    row_part = warp_sums(row_parts);
    column_part = warp_sums(column_parts);
  }
  const int number = warp_sums_index<R * C>();
  const int64_t i = first_row + number / C, j = first_column + number % C;
  if (number >= R * C || i >= n || j >= m) return;
  const Slope<A> slope = M::slope(read_pair<S, M>(sum, x_squares, y_squares, n, m, {t, i, j}));
  A value = slope.w * step;
  if constexpr (M::kRows) value += slope.x_part * row_part + slope.y_part * column_part;
  if (lane_index() % (kWarp / next_power_of_two(R * C)) == 0) out[(t * n + i) * m + j] = static_cast<S>(value);
}

constexpr int64_t kEnoughBlocks = 512;  // a few for each multiprocessor of a large GPU

template <class S>
DistancePlan distance_plan(int64_t tasks, int64_t n, int64_t m, int64_t d) {
  const bool few = m <= kFewColumns;
  const int64_t row_blocks = ceil_div(n, kWarps * (few ? kRowsOfFew : kRowsOfMany));
  const int64_t column_blocks = ceil_div(m, few ? kFewColumns : kManyColumns);
  const int64_t slabs = slabs_of<S>(d);
  const int64_t blocks = tasks * row_blocks * column_blocks;
  const int64_t wanted = blocks > 0 ? ceil_div(kEnoughBlocks, blocks) : 1;
  const int64_t chunk_slabs = ceil_div(slabs, wanted < slabs ? wanted : slabs);
  return {row_blocks, column_blocks, ceil_div(slabs, chunk_slabs), chunk_slabs};
}

template <class S, class M>
void launch_distance_sums(WideRows<const S> x, WideRows<const S> y, accumulate_t<S>* sums, S* out, int64_t tasks,
                          int64_t n, int64_t m, int64_t d, const DistancePlan& plan, Stream stream) {
  const unsigned grid = grid_size(tasks * plan.row_blocks * plan.column_blocks * plan.chunks);
  if (grid == 0) return;
  if (m <= kFewColumns) {
    METAFAST_LAUNCH((distance_sums_kernel<S, M, kRowsOfFew, kFewColumns>), grid, kThreads, 0, stream, x, y, sums, out,
                    tasks, n, m, d, plan);
  } else {
    METAFAST_LAUNCH((distance_sums_kernel<S, M, kRowsOfMany, kManyColumns>), grid, kThreads, 0, stream, x, y, sums, out,
                    tasks, n, m, d, plan);
  }
}

template <class S>
void launch_row_squares(WideRows<const S> x, accumulate_t<S>* squares, int64_t tasks, int64_t n, int64_t d,
                        int64_t chunk_slabs, Stream stream) {
  const unsigned grid = grid_size(ceil_div(tasks * n, kWarps));
  if (grid == 0) return;
  METAFAST_LAUNCH((row_squares_kernel<S>), grid, kThreads, 0, stream, x, squares, tasks, n, d, chunk_slabs);
}

template <class S, class M, class Out>
void launch_distance_finish(WideRows<const S> x, WideRows<const S> y, const accumulate_t<S>* sums,
                            const accumulate_t<S>* x_squares, const accumulate_t<S>* y_squares, accumulate_t<S>* totals,
                            Out* out, int64_t tasks, int64_t n, int64_t m, int64_t d, int64_t chunks, Stream stream) {
  const unsigned grid = grid_size(ceil_div(tasks * n * m, kThreads));
  if (grid == 0) return;
  METAFAST_LAUNCH((distance_finish_kernel<S, M, Out>), grid, kThreads, 0, stream, x, y, sums, x_squares, y_squares,
                  totals, out, tasks, n, m, d, chunks);
}

// The strides of grad run over tasks, rows of own and rows of other.
template <class S, class M, Side side, class G>
void launch_distance_vjp(const G* grad, int64_t batch_stride, int64_t own_stride, int64_t other_stride,
                         const accumulate_t<S>* totals, const accumulate_t<S>* own_squares,
                         const accumulate_t<S>* other_squares, WideRows<const S> own, WideRows<const S> other,
                         WideRows<S> out, int64_t tasks, int64_t n, int64_t m, int64_t d, Stream stream) {
  const int64_t row_blocks = ceil_div(n, kWarps * kVjpRows), slabs = slabs_of<S>(d);
  const unsigned grid = grid_size(tasks * row_blocks * slabs);
  if (grid == 0) return;
  METAFAST_LAUNCH((distance_vjp_kernel<S, M, side, G>), grid, kThreads, 0, stream, grad, batch_stride, own_stride,
                  other_stride, totals, own_squares, other_squares, own, other, out, n, m, d, row_blocks, slabs);
}

template <class S, class M>
void launch_distance_jvp(WideRows<const S> x, WideRows<const S> y, WideRows<const S> tangent_x,
                         WideRows<const S> tangent_y, const accumulate_t<S>* x_squares,
                         const accumulate_t<S>* y_squares, S* out, int64_t tasks, int64_t n, int64_t m, int64_t d,
                         Stream stream) {
  const int64_t row_blocks = ceil_div(n, kWarps * kJvpRows), column_blocks = ceil_div(m, kJvpColumns);
  const unsigned grid = grid_size(tasks * row_blocks * column_blocks);
  if (grid == 0) return;
  METAFAST_LAUNCH((distance_jvp_kernel<S, M>), grid, kThreads, 0, stream, x, y, tangent_x, tangent_y, x_squares,
                  y_squares, out, n, m, d, row_blocks, column_blocks);
}

// What other families launch too; the kernels are compiled once, with distance.cu.
#define METAFAST_DISTANCE_LAUNCHERS(prefix, A, M)                                                                      \
  prefix template void launch_distance_sums<A, M>(WideRows<const A>, WideRows<const A>, A*, A*, int64_t, int64_t,      \
                                                  int64_t, int64_t, const DistancePlan&, Stream);                      \
  prefix template void launch_distance_finish<A, M, A>(WideRows<const A>, WideRows<const A>, const A*, const A*,       \
                                                       const A*, A*, A*, int64_t, int64_t, int64_t, int64_t, int64_t,  \
                                                       Stream);                                                        \
  prefix template void launch_distance_vjp<A, M, Side::x, A>(const A*, int64_t, int64_t, int64_t, const A*, const A*,  \
                                                             const A*, WideRows<const A>, WideRows<const A>,           \
                                                             WideRows<A>, int64_t, int64_t, int64_t, int64_t, Stream); \
  prefix template void launch_distance_vjp<A, M, Side::y, A>(const A*, int64_t, int64_t, int64_t, const A*, const A*,  \
                                                             const A*, WideRows<const A>, WideRows<const A>,           \
                                                             WideRows<A>, int64_t, int64_t, int64_t, int64_t, Stream);
#define METAFAST_ALL_DISTANCE_LAUNCHERS(prefix)            \
  METAFAST_DISTANCE_LAUNCHERS(prefix, float, SqEuclidean)  \
  METAFAST_DISTANCE_LAUNCHERS(prefix, float, Euclidean)    \
  METAFAST_DISTANCE_LAUNCHERS(prefix, float, Cityblock)    \
  METAFAST_DISTANCE_LAUNCHERS(prefix, float, Cosine)       \
  METAFAST_DISTANCE_LAUNCHERS(prefix, double, SqEuclidean) \
  METAFAST_DISTANCE_LAUNCHERS(prefix, double, Euclidean)   \
  METAFAST_DISTANCE_LAUNCHERS(prefix, double, Cityblock)   \
  METAFAST_DISTANCE_LAUNCHERS(prefix, double, Cosine)

METAFAST_ALL_DISTANCE_LAUNCHERS(extern)

}  // namespace metafast::cuda
