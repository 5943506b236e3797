// Batch normalisation, ReLU and max-pooling on a GPU. The images of a channel are cut into cells, which are 2 x 2 windows
// (those at an odd edge have fewer pixels and no result) or, without pooling, pixels; a block takes a slice of the cells.
// With the channels last a warp holds 32 channels of one cell, else all threads hold cells of one channel: both read
// neighbours in memory. Sums of slices are added up by the kernels that make use of them, in one order always.
#pragma once

#include "cuda/features.cuh"
#include "cuda/reduce.cuh"
#include "math/norm.h"
#include "math/pooling.h"

namespace metafast::cuda {

// From one image, channel, row and pixel to the next.
struct MapStrides {
  int64_t task, image, channel, row, pixel;
};

struct NormMaps {
  bool last;
  int64_t tasks, images, channels, height, width;
  int64_t rows, columns;  // of cells
  int64_t slices, cells_per_slice;
  double share;  // one over the pixels of a channel
  MapStrides x, y;

  METAFAST_HOST_DEVICE int64_t cells() const { return images * rows * columns; }
  METAFAST_HOST_DEVICE int64_t channel_blocks() const { return last ? (channels + kWarp - 1) / kWarp : channels; }
  // Numbers of one kind for every channel, and for every slice of it.
  METAFAST_HOST_DEVICE int64_t all_channels() const { return tasks * channels; }
  METAFAST_HOST_DEVICE int64_t all_slices() const { return slices * all_channels(); }
};

// What a thread does of its block's slice.
struct NormShare {
  int64_t task, channel, slice;
  unsigned begin, end;  // cells
  int first, step;
  bool active;

  __device__ __forceinline__ explicit NormShare(const NormMaps& maps) {
    BlockNumber number;
    slice = number.part(maps.slices);
    const int64_t block = number.part(maps.channel_blocks());
    task = number.rest();
    channel = maps.last ? block * kWarp + lane_index() : block;
    active = channel < maps.channels;
    first = maps.last ? warp_index() : static_cast<int>(threadIdx.x);
    step = maps.last ? kWarps : kThreads;
    begin = static_cast<unsigned>(slice * maps.cells_per_slice);
    const int64_t last_cell = (slice + 1) * maps.cells_per_slice;
    end = static_cast<unsigned>(last_cell < maps.cells() ? last_cell : maps.cells());
  }
  __device__ __forceinline__ int64_t number(const NormMaps& maps) const { return task * maps.channels + channel; }
};

// One cell: where its pixels stand in x, if they do, and its result in y, if it has one.
template <bool Pool>
struct NormCell {
  static constexpr int kPixels = Pool ? 4 : 1;
  int64_t x[kPixels];
  bool there[kPixels];
  int64_t y;
  bool whole;

  // Not x[p], which would put the array into local memory.
  __device__ __forceinline__ int64_t pixel(const NormMaps& maps, int p) const {
    return x[0] + (p / 2 * maps.x.row + p % 2 * maps.x.pixel);
  }
};

// body(cell) for the thread's cells.
template <bool Pool, class Body>
__device__ __forceinline__ void for_cells(const NormMaps& maps, const NormShare& share, const Body& body) {
  if (!share.active) return;
  const unsigned columns = static_cast<unsigned>(maps.columns), rows = static_cast<unsigned>(maps.rows);
  const int64_t x = share.task * maps.x.task + share.channel * maps.x.channel;
  const int64_t y = share.task * maps.y.task + share.channel * maps.y.channel;
  for (unsigned number = share.begin + share.first; number < share.end; number += share.step) {
    const unsigned line = number / columns, column = number % columns, image = line / rows, row = line % rows;
    NormCell<Pool> cell;
    cell.y = y + image * maps.y.image + row * maps.y.row + column * maps.y.pixel;
    const int64_t by = Pool ? 2 : 1,
                  corner = x + image * maps.x.image + by * (row * maps.x.row + column * maps.x.pixel);
#pragma unroll
    for (int p = 0; p < NormCell<Pool>::kPixels; ++p) {
      cell.x[p] = corner + p / 2 * maps.x.row + p % 2 * maps.x.pixel;
      cell.there[p] = !Pool || (2 * row + p / 2 < maps.height && 2 * column + p % 2 < maps.width);
    }
    cell.whole = cell.there[NormCell<Pool>::kPixels - 1];
    body(cell);
  }
}

// The sum over all threads of the block that share a channel, in each of them. Begins with a barrier.
template <class A>
__device__ __forceinline__ A channel_sum(bool last, A value) {
  METAFAST_SHARED(A, sums, [kWarps][kWarp]);
  if (!last) value = warp_sum(value);
  __syncthreads();
  sums[warp_index()][lane_index()] = value;
  __syncthreads();
  A total = A(0);
  for (int w = 0; w < kWarps; ++w) total += sums[w][lane_index()];
  return total;
}

// z = (x - mean) scale + shift, rounded alike wherever it is computed.
template <class A>
struct Normal {
  A mean, scale, shift;

  __device__ __forceinline__ A operator()(A x) const { return std::fma(x - mean, scale, shift); }
};

// Numbers of channels [T, C].
template <class A>
struct NormParameters {
  const A *weight, *bias, *mean;
  const A* scale;      // weight rstd
  const double* rstd;  // 1 / sqrt(var + eps)

  __device__ __forceinline__ Normal<A> normal(int64_t k) const { return {mean[k], scale[k], bias[k]}; }
};

// A thread is a channel. The other kernels have no room for what a square root in float64 takes.
template <class A>
__global__ void __launch_bounds__(kThreads)
    norm_scale_kernel(const A* __restrict__ weight, const A* __restrict__ var, double eps, A* __restrict__ scale,
                      double* __restrict__ rstd, int64_t channels) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= channels) return;
  rstd[k] = norm_rstd(static_cast<double>(var[k]), eps);
  scale[k] = static_cast<A>(static_cast<double>(weight[k]) * rstd[k]);
}

// y, its gradient and which pixels it consists of. Values up to `floor`, which may be NaN for none, become it.
template <class S>
struct NormUpstream {
  const S* grad;
  const uint8_t* choice;
  accumulate_t<S> floor;

  // The gradient of z in a cell, and to which pixel it belongs: to none from kPixels on.
  template <bool Pool>
  __device__ __forceinline__ accumulate_t<S> operator()(const NormCell<Pool>& cell, const accumulate_t<S>* x,
                                                        const Normal<accumulate_t<S>>& normal, int& which) const {
    which = kDead;
    if (!cell.whole) return 0;
    which = Pool ? choice[cell.y] : (normal(x[0]) <= floor ? kDead : 0);
    return which == kDead ? accumulate_t<S>(0) : static_cast<accumulate_t<S>>(grad[cell.y]);
  }
};

// partial [2][slices][T, C]: the mean of each slice and the sum of squared differences to it.
template <class S, bool Pool>
__global__ void __launch_bounds__(kThreads)
    norm_statistics_kernel(NormMaps maps, const S* __restrict__ x, accumulate_t<S>* __restrict__ partial) {
  using A = accumulate_t<S>;
  const NormShare share(maps);
  // Cell by cell: the mean so far, and the sum of squared differences to it.
  A own = 0, square = 0, count = 0;
  for_cells<Pool>(maps, share, [&](const NormCell<Pool>& cell) {
    constexpr int P = NormCell<Pool>::kPixels;
    A values[P], there = 0, near = 0;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      if (!cell.there[p]) continue;
      values[p] = static_cast<A>(x[cell.x[p]]);
      near += values[p];
      there += 1;
    }
    near /= there;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      if (cell.there[p]) square = std::fma(values[p] - near, values[p] - near, square);
    }
    const A apart = near - own, part = there / (count + there);
    own = std::fma(apart, part, own);
    square = std::fma(apart * apart, count * part, square);
    count += there;
  });
  METAFAST_SHARED(A, reference, [kWarp]);
  if (warp_index() == 0) reference[lane_index()] = own;
  __syncthreads();
  const A origin = reference[maps.last ? lane_index() : 0];
  const A all = channel_sum(maps.last, count);
  const A mean = origin + channel_sum(maps.last, count > A(0) ? count * (own - origin) : A(0)) / all;
  const A apart = own - mean;
  const A total = channel_sum(maps.last, count > A(0) ? std::fma(count * apart, apart, square) : A(0));
  if (!share.active || (maps.last ? warp_index() : static_cast<int>(threadIdx.x)) != 0) return;
  A* to = partial + share.slice * maps.all_channels() + share.number(maps);
  to[0] = mean;
  to[maps.all_slices()] = total;
}

// mean and var [T, C]. A warp is a channel.
template <class A>
__global__ void __launch_bounds__(kThreads)
    norm_combine_kernel(NormMaps maps, const A* __restrict__ partial, A* __restrict__ mean, A* __restrict__ var) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kWarps + warp_index(), channels = maps.all_channels();
  if (k >= channels) return;
  const auto pixels_before = [&](int64_t cell) -> double {
    if (maps.columns == maps.width) return static_cast<double>(cell);
    const int64_t line = cell / maps.columns, row = line % maps.rows, image = line / maps.rows;
    const int64_t tall = 2 * row + 1 < maps.height ? 2 : 1, column = cell % maps.columns;
    return static_cast<double>((image * maps.height + 2 * row) * maps.width + tall * 2 * column);
  };
  const auto count = [&](int64_t slice) {
    const int64_t end = (slice + 1) * maps.cells_per_slice, cells = maps.cells();
    const double total = static_cast<double>(maps.images * maps.height * maps.width);
    return (end < cells ? pixels_before(end) : total) - pixels_before(slice * maps.cells_per_slice);
  };
  double centre = 0, square = 0;
  for (int64_t s = lane_index(); s < maps.slices; s += kWarp) {
    centre += count(s) * maps.share * static_cast<double>(partial[s * channels + k]);
  }
  centre = warp_sum(centre);
  for (int64_t s = lane_index(); s < maps.slices; s += kWarp) {
    const double apart = static_cast<double>(partial[s * channels + k]) - centre;
    square += static_cast<double>(partial[maps.all_slices() + s * channels + k]) + count(s) * apart * apart;
  }
  square = warp_sum(square);
  if (lane_index() != 0) return;
  mean[k] = static_cast<A>(centre);
  var[k] = static_cast<A>(square * maps.share);
}

template <class S, bool Pool>
__global__ void __launch_bounds__(kThreads)
    norm_value_kernel(NormMaps maps, const S* __restrict__ x, NormParameters<accumulate_t<S>> parameters,
                      accumulate_t<S> floor, S* __restrict__ y, uint8_t* __restrict__ choice) {
  using A = accumulate_t<S>;
  const NormShare share(maps);
  const Normal<A> normal = share.active ? parameters.normal(share.number(maps)) : Normal<A>{};
  for_cells<Pool>(maps, share, [&](const NormCell<Pool>& cell) {
    if (!cell.whole) return;
    A best = normal(static_cast<A>(x[cell.x[0]]));
    if constexpr (Pool) {
      int which = 0;
#pragma unroll
      for (int p = 1; p < 4; ++p) {
        const A z = normal(static_cast<A>(x[cell.x[p]]));
        if (z > best || z != z) best = z, which = p;
      }
      choice[cell.y] = static_cast<uint8_t>(best <= floor ? kDead : which);
    }
    y[cell.y] = static_cast<S>(best <= floor ? floor : best);
  });
}

// partial [2][slices][T, C]: sums of the gradient g of z, and of g (x - mean).
template <class S, bool Pool>
__global__ void __launch_bounds__(kThreads)
    norm_vjp_sums_kernel(NormMaps maps, const S* __restrict__ x, NormParameters<accumulate_t<S>> parameters,
                         NormUpstream<S> upstream, accumulate_t<S>* __restrict__ partial) {
  using A = accumulate_t<S>;
  const NormShare share(maps);
  const Normal<A> normal = share.active ? parameters.normal(share.number(maps)) : Normal<A>{};
  A grad = 0, centred = 0;
  for_cells<Pool>(maps, share, [&](const NormCell<Pool>& cell) {
    int which = kDead;
    const A own = Pool ? A(0) : static_cast<A>(x[cell.x[0]]);
    const A g = upstream.template operator()<Pool>(cell, &own, normal, which);
    if (which == kDead) return;
    grad += g;
    const A value = Pool ? static_cast<A>(x[cell.pixel(maps, which)]) : own;
    centred = std::fma(g, value - normal.mean, centred);
  });
  grad = channel_sum(maps.last, grad);
  centred = channel_sum(maps.last, centred);
  if (!share.active || (maps.last ? warp_index() : static_cast<int>(threadIdx.x)) != 0) return;
  A* to = partial + share.slice * maps.all_channels() + share.number(maps);
  to[0] = grad;
  to[maps.all_slices()] = centred;
}

// The sum over the slices of one kind of partial sums of channel k, in every lane.
template <class A>
__device__ __forceinline__ double sum_of_slices(const NormMaps& maps, const A* partial, int64_t kind, int64_t k) {
  double total = 0;
  for (int64_t s = lane_index(); s < maps.slices; s += kWarp) {
    total += static_cast<double>(partial[kind * maps.all_slices() + s * maps.all_channels() + k]);
  }
  return warp_sum(total);
}

template <class A>
struct NormStatisticsGradients {
  const A *mean, *var;  // null: none

  __device__ __forceinline__ double of_mean(int64_t k) const { return mean ? static_cast<double>(mean[k]) : 0.0; }
  __device__ __forceinline__ double of_var(int64_t k) const { return var ? static_cast<double>(var[k]) : 0.0; }
};

// The gradients of numbers of channels, and constant and slope [2][T, C]. A warp is a channel.
template <class A>
struct NormVjpResults {
  A *weight, *bias, *mean, *var;  // null for mean and var: these are not given
  A* coefficients;
};

template <class A>
__global__ void __launch_bounds__(kThreads)
    norm_vjp_combine_kernel(NormMaps maps, const A* __restrict__ partial, NormParameters<A> parameters,
                            NormStatisticsGradients<A> extra, NormVjpResults<A> to) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kWarps + warp_index(), channels = maps.all_channels();
  if (k >= channels) return;
  const double grad = sum_of_slices(maps, partial, 0, k), centred = sum_of_slices(maps, partial, 1, k);
  if (lane_index() != 0) return;
  const NormGradients own = norm_gradients(static_cast<double>(parameters.weight[k]), parameters.rstd[k], grad, centred,
                                           extra.of_mean(k), extra.of_var(k), maps.share);
  to.weight[k] = static_cast<A>(own.weight);
  to.bias[k] = static_cast<A>(own.bias);
  if (to.mean != nullptr) {
    to.mean[k] = static_cast<A>(own.mean);
    to.var[k] = static_cast<A>(own.var);
  } else {
    to.coefficients[k] = static_cast<A>(own.constant);
    to.coefficients[channels + k] = static_cast<A>(own.slope);
  }
}

// dx = g scale + constant + (x - mean) slope, g scale alone where the statistics are given (coefficients are null).
template <class S, bool Pool>
__global__ void __launch_bounds__(kThreads)
    norm_vjp_kernel(NormMaps maps, const S* __restrict__ x, NormParameters<accumulate_t<S>> parameters,
                    NormUpstream<S> upstream, const accumulate_t<S>* __restrict__ coefficients, S* __restrict__ dx) {
  using A = accumulate_t<S>;
  constexpr int P = NormCell<Pool>::kPixels;
  const NormShare share(maps);
  if (!share.active) return;
  const int64_t k = share.number(maps);
  const Normal<A> normal = parameters.normal(k);
  const A constant = coefficients ? coefficients[k] : A(0),
          slope = coefficients ? coefficients[maps.all_channels() + k] : A(0);
  for_cells<Pool>(maps, share, [&](const NormCell<Pool>& cell) {
    A values[P];
#pragma unroll
    for (int p = 0; p < P; ++p) values[p] = cell.there[p] ? static_cast<A>(x[cell.x[p]]) : A(0);
    int which;
    const A g = upstream.template operator()<Pool>(cell, values, normal, which);
#pragma unroll
    for (int p = 0; p < P; ++p) {
      if (!cell.there[p]) continue;
      A own = which == p ? g * normal.scale : A(0);
      if (coefficients != nullptr) own += std::fma(values[p] - normal.mean, slope, constant);
      dx[cell.x[p]] = static_cast<S>(own);
    }
  });
}

// partial [5][slices][T, C]: sums of g, g (x - mean), u, u (x - mean) and g u for directions u.
template <class A, bool Pool>
__global__ void __launch_bounds__(kThreads, 4)
    norm_vjp_vjp_sums_kernel(NormMaps maps, const A* __restrict__ x, const A* __restrict__ u,
                             NormParameters<A> parameters, NormUpstream<A> upstream, A* __restrict__ partial) {
  constexpr int P = NormCell<Pool>::kPixels;
  const NormShare share(maps);
  const Normal<A> normal = share.active ? parameters.normal(share.number(maps)) : Normal<A>{};
  A sums[5] = {};
  for_cells<Pool>(maps, share, [&](const NormCell<Pool>& cell) {
    A values[P], along[P];
#pragma unroll
    for (int p = 0; p < P; ++p) {
      values[p] = cell.there[p] ? x[cell.x[p]] : normal.mean;
      along[p] = cell.there[p] ? u[cell.x[p]] : A(0);
      sums[2] += along[p];
      sums[3] = std::fma(along[p], values[p] - normal.mean, sums[3]);
    }
    int which;
    const A g = upstream.template operator()<Pool>(cell, values, normal, which);
#pragma unroll
    for (int p = 0; p < P; ++p) {
      if (which != p) continue;
      sums[0] += g;
      sums[1] = std::fma(g, values[p] - normal.mean, sums[1]);
      sums[4] = std::fma(g, along[p], sums[4]);
    }
  });
  A* to = partial + share.slice * maps.all_channels() + share.number(maps);
  for (int n = 0; n < 5; ++n) {
    const A total = channel_sum(maps.last, sums[n]);
    if (share.active && (maps.last ? warp_index() : static_cast<int>(threadIdx.x)) == 0)
      to[n * maps.all_slices()] = total;
  }
}

template <class A>
struct NormVjpVjpArguments {
  const A *u_weight, *u_bias, *u_mean, *u_var;  // null for mean and var: these are not given
  const A* grad_var;                            // null: none
};

// Of the statistics where these are given, else of the gradients for them; and turn, offset, constant, bend and slope
// [5][T, C].
template <class A>
struct NormVjpVjpResults {
  A *weight, *mean, *var;
  A* coefficients;
};

template <class A>
__global__ void __launch_bounds__(kThreads, 4)
    norm_vjp_vjp_combine_kernel(NormMaps maps, const A* __restrict__ partial, NormParameters<A> parameters,
                                NormVjpVjpArguments<A> from, NormVjpVjpResults<A> to) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kWarps + warp_index(), channels = maps.all_channels();
  if (k >= channels) return;
  double sums[5];
  for (int n = 0; n < 5; ++n) sums[n] = sum_of_slices(maps, partial, n, k);
  if (lane_index() != 0) return;
  const bool given = from.u_mean != nullptr;
  const NormDirections u{static_cast<double>(from.u_weight[k]), static_cast<double>(from.u_bias[k]),
                         given ? static_cast<double>(from.u_mean[k]) : sums[2] * maps.share,
                         given ? static_cast<double>(from.u_var[k]) : 2 * sums[3] * maps.share};
  const double grad_var = from.grad_var != nullptr ? static_cast<double>(from.grad_var[k]) : 0.0;
  const NormSecond own = norm_second(static_cast<double>(parameters.weight[k]), parameters.rstd[k], sums[0], sums[1],
                                     sums[4], u, grad_var, maps.share);
  to.weight[k] = static_cast<A>(own.weight);
  to.mean[k] = static_cast<A>(given ? own.mean : u.mean);
  to.var[k] = static_cast<A>(given ? own.var : u.var);
  to.coefficients[k] = static_cast<A>(own.turn);
  to.coefficients[channels + k] = static_cast<A>(own.offset);
  to.coefficients[2 * channels + k] = static_cast<A>(own.constant);
  to.coefficients[3 * channels + k] = static_cast<A>(own.bend);
  to.coefficients[4 * channels + k] = static_cast<A>(own.slope);
}

// dy = pool(u scale + (x - mean) turn + offset), dx = g turn + constant + (x - mean) bend + u slope; g turn alone where the
// statistics are given.
template <class A, bool Pool>
__global__ void __launch_bounds__(kThreads)
    norm_vjp_vjp_kernel(NormMaps maps, const A* __restrict__ x, const A* __restrict__ u, NormParameters<A> parameters,
                        NormUpstream<A> upstream, const A* __restrict__ coefficients, bool given, A* __restrict__ dy,
                        A* __restrict__ dx) {
  constexpr int P = NormCell<Pool>::kPixels;
  const NormShare share(maps);
  if (!share.active) return;
  const int64_t k = share.number(maps), channels = maps.all_channels();
  const Normal<A> normal = parameters.normal(k);
  const A turn = coefficients[k], offset = coefficients[channels + k], constant = coefficients[2 * channels + k];
  const A bend = coefficients[3 * channels + k], slope = coefficients[4 * channels + k];
  for_cells<Pool>(maps, share, [&](const NormCell<Pool>& cell) {
    A values[P], along[P];
#pragma unroll
    for (int p = 0; p < P; ++p) {
      values[p] = cell.there[p] ? x[cell.x[p]] : A(0);
      along[p] = cell.there[p] ? u[cell.x[p]] : A(0);
    }
    int which;
    const A g = upstream.template operator()<Pool>(cell, values, normal, which);
    A moved = 0;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const A apart = values[p] - normal.mean;
      if (which == p) moved = std::fma(along[p], normal.scale, std::fma(apart, turn, offset));
      if (!cell.there[p]) continue;
      A own = which == p ? g * turn : A(0);
      if (!given) own += std::fma(apart, bend, std::fma(along[p], slope, constant));
      dx[cell.x[p]] = own;
    }
    if (cell.whole) dy[cell.y] = moved;
  });
}

}  // namespace metafast::cuda
