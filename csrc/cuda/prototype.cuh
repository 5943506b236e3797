// Class means and the prototypical loss on a GPU. A block owns one slab of features of one task, so that the class means
// of the slab are made from the support rows and used on the query rows without leaving the multiprocessor. A label
// outside 0..C-1 makes all results of its task NaN; it is never used as an index.
#pragma once

#include "cuda/distance.cuh"
#include "cuda/labels.cuh"

namespace metafast::cuda {

constexpr int kTileRows = kWarp;    // feature rows in shared memory at a time
constexpr int kClassesPerWarp = 3;  // whose means a warp accumulates in registers
constexpr int kBlockClasses = kWarps * kClassesPerWarp;
constexpr int kFusedClasses = 20;  // up to here one block holds the means of all classes

// How often a label occurs in a task; every lane of the warp asks for the same one.
__device__ __forceinline__ int64_t count_label(const Labels& labels, int64_t t, int64_t label) {
  int64_t count = 0;
  for (int64_t first = 0; first < labels.rows; first += kWarp) {
    const int64_t i = first + lane_index();
    count += __popc(__ballot_sync(kAllLanes, i < labels.rows && labels.of(t)[i] == label));
  }
  return count;
}

// The means of the classes first_class + warp, + kWarps, ... over the features from k, and one over their rows.
template <class S>
struct ClassMeans {
  Features<S> means[kClassesPerWarp];
  accumulate_t<S> inverse[kClassesPerWarp];  // 0 for a class without rows
};

// The rows go through shared memory, kTileRows at a time; every warp then picks those of its classes, in their order.
template <class S>
__device__ __forceinline__ ClassMeans<S> class_means_of_slab(const WideRows<const S>& features, const Labels& labels,
                                                             int64_t t, int64_t first_class, int64_t k, int64_t d) {
  using A = accumulate_t<S>;
  METAFAST_SHARED(Packed<S>, tile, [kTileRows][kWarp]);
  METAFAST_SHARED(int64_t, tile_labels, [kTileRows]);
  ClassMeans<S> result;
  int64_t counts[kClassesPerWarp] = {};
#pragma unroll
  for (int c = 0; c < kClassesPerWarp; ++c) {
#pragma unroll
    for (int v = 0; v < kVector<S>; ++v) result.means[c].values[v] = A(0);
  }
  for (int64_t first = 0; first < labels.rows; first += kTileRows) {
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kTileRows / kWarps; ++r) {
      const int row = warp_index() + r * kWarps;
      const int64_t i = first + row;
      if (i >= labels.rows) continue;
      const int64_t label = labels.of(t)[i];
      if (lane_index() == 0) tile_labels[row] = label;
      if (label < first_class || label >= first_class + kBlockClasses) continue;
      const Features<S> read = load_features(features.row(t, i), features.wide, k, d);
      Packed<S> packed;
#pragma unroll
      for (int v = 0; v < kVector<S>; ++v) packed.values[v] = static_cast<S>(read.values[v]);
      tile[row][lane_index()] = packed;
    }
    __syncthreads();
    const bool there = first + lane_index() < labels.rows;
    const int64_t label = there ? tile_labels[lane_index()] : -1;
#pragma unroll
    for (int c = 0; c < kClassesPerWarp; ++c) {
      unsigned rows = __ballot_sync(kAllLanes, label == first_class + warp_index() + c * kWarps);
      counts[c] += __popc(rows);
      while (rows != 0) {
        const Packed<S> row = tile[__ffs(static_cast<int>(rows)) - 1][lane_index()];
        rows &= rows - 1;
#pragma unroll
        for (int v = 0; v < kVector<S>; ++v) result.means[c].values[v] += static_cast<A>(row.values[v]);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kClassesPerWarp; ++c) {
    result.inverse[c] = counts[c] > 0 ? A(1) / static_cast<A>(counts[c]) : A(0);
#pragma unroll
    for (int v = 0; v < kVector<S>; ++v) result.means[c].values[v] *= result.inverse[c];
  }
  return result;
}

template <class S>
__device__ __forceinline__ void fill(Features<S>& features, accumulate_t<S> value) {
#pragma unroll
  for (int v = 0; v < kVector<S>; ++v) features.values[v] = value;
}

// out [T, C, d] = class means. A block: kBlockClasses classes, one slab. `others` are labels that must be good too.
template <class S>
__global__ void __launch_bounds__(kThreads)
    class_means_kernel(WideRows<const S> features, Labels labels, Labels others, WideRows<S> out, int64_t num_classes,
                       int64_t d, int64_t class_blocks, int64_t slabs) {
  BlockNumber block;
  const int64_t k = block.part(slabs) * kSlab<S> + lane_index() * kVector<S>;
  const int64_t first_class = block.part(class_blocks) * kBlockClasses, t = block.rest();
  const bool bad =
      __syncthreads_or(sees_bad_label(labels, t, num_classes) || sees_bad_label(others, t, num_classes)) != 0;
  ClassMeans<S> result = class_means_of_slab(features, labels, t, first_class, k, d);
#pragma unroll
  for (int c = 0; c < kClassesPerWarp; ++c) {
    const int64_t number = first_class + warp_index() + c * kWarps;
    if (number >= num_classes) continue;
    if (bad) fill(result.means[c], not_a_number<accumulate_t<S>>());
    store_features(out.row(t, number), out.wide, k, d, result.means[c]);
  }
}

constexpr int kSpreadRows = 4;  // of a warp

// out_i = grad_{label_i} / count_{label_i}; `more` [T, C, d], where given, is added to grad. A block: kWarps kSpreadRows
// rows, one slab.
template <class S>
__global__ void __launch_bounds__(kThreads)
    spread_means_kernel(WideRows<const S> grad, WideRows<const S> more, Labels labels, Labels others, WideRows<S> out,
                        int64_t num_classes, int64_t d, int64_t row_blocks, int64_t slabs) {
  using A = accumulate_t<S>;
  BlockNumber block;
  const int64_t k = block.part(slabs) * kSlab<S> + lane_index() * kVector<S>;
  const int64_t first_row = (block.part(row_blocks) * kWarps + warp_index()) * kSpreadRows, t = block.rest();
  const bool bad =
      __syncthreads_or(sees_bad_label(labels, t, num_classes) || sees_bad_label(others, t, num_classes)) != 0;
  for (int64_t i = first_row; i < first_row + kSpreadRows && i < labels.rows; ++i) {
    Features<S> row;
    if (bad) {
      fill(row, not_a_number<A>());
    } else {
      const int64_t label = labels.of(t)[i];
      const A inverse = A(1) / static_cast<A>(count_label(labels, t, label));
      row = load_features(grad.row(t, label), grad.wide, k, d);
      if (more.data != nullptr) {
        const Features<S> extra = load_features(more.row(t, label), more.wide, k, d);
#pragma unroll
        for (int v = 0; v < kVector<S>; ++v) row.values[v] += extra.values[v];
      }
#pragma unroll
      for (int v = 0; v < kVector<S>; ++v) row.values[v] *= inverse;
    }
    store_features(out.row(t, i), out.wide, k, d, row);
  }
}

// inverse [T, C] = one over the number of support rows of each class, 0 for none, NaN in a task with a bad label.
template <class A>
__global__ void __launch_bounds__(kThreads)
    inverse_counts_kernel(Labels labels, Labels others, A* __restrict__ inverse, int64_t num_classes) {
  const int64_t t = blockIdx.x;
  const bool bad =
      __syncthreads_or(sees_bad_label(labels, t, num_classes) || sees_bad_label(others, t, num_classes)) != 0;
  for (int64_t c = warp_index(); c < num_classes; c += kWarps) {
    const int64_t count = count_label(labels, t, c);
    if (lane_index() == 0) {
      inverse[t * num_classes + c] = bad ? not_a_number<A>() : (count > 0 ? A(1) / static_cast<A>(count) : A(0));
    }
  }
}

// The scale of each task's distances.
template <class A>
struct Temperature {
  const A* data;  // null: 1
  int64_t stride;
  A scale;

  __device__ __forceinline__ A of(int64_t t) const { return data == nullptr ? scale : scale * data[t * stride]; }
};

// What the logits of a loss are made from.
template <class A>
struct LossInputs {
  const A* sums;  // [chunks, T, m, C] of all pairs, or null
  int64_t chunks;
  const A* distances;  // [T, m, C], where sums is null
  const A* inverse;    // [T, C] of inverse_counts_kernel
  Labels targets;
  Temperature<A> temperature;
  int64_t tasks;
  int64_t num_classes;
};

// The logits and the loss of one task, by one block: first a thread a pair, then a thread a query row.
template <class A, class M>
__device__ __forceinline__ void loss_of_task(const LossInputs<A>& inputs, A* logits, A* loss, int64_t t) {
  const int64_t C = inputs.num_classes, m = inputs.targets.rows, pairs = m * C;
  const A* inverse = inputs.inverse + t * C;
  const A tau = inputs.temperature.of(t);
  A* task_logits = logits + t * pairs;
  for (int64_t pair = threadIdx.x; pair < pairs; pair += kThreads) {
    A distance = A(0);
    if (inputs.sums != nullptr) {
      A sum = A(0);
      for (int64_t chunk = 0; chunk < inputs.chunks; ++chunk)
        sum += inputs.sums[(chunk * inputs.tasks + t) * pairs + pair];
      distance = M::value(Pair<A>{sum, A(0), A(0)});
    } else {
      distance = inputs.distances[t * pairs + pair];
    }
    const A share = inverse[pair % C];
    const A absent = share == A(0) ? -A(INFINITY) : not_a_number<A>();
    task_logits[pair] = share > A(0) ? -tau * distance : absent;
  }
  __syncthreads();
  double total = 0;
  for (int64_t i = threadIdx.x; i < m; i += kThreads) {
    const A* row = task_logits + i * C;
    A largest = -A(INFINITY);
    for (int64_t c = 0; c < C; ++c) largest = row[c] > largest || row[c] != row[c] ? row[c] : largest;
    A sum = A(0);
    for (int64_t c = 0; c < C; ++c) sum += std::exp(row[c] - largest);
    const int64_t label = inputs.targets.of(t)[i];
    const A own = label >= 0 && label < C ? row[label] : not_a_number<A>();
    total += largest + std::log(sum) - own;
  }
  total = block_sum(total);
  if (threadIdx.x == 0) loss[t] = static_cast<A>(total / static_cast<double>(m));
}

// A block is one task.
template <class A, class M>
__global__ void __launch_bounds__(kThreads)
    prototypical_loss_kernel(LossInputs<A> inputs, A* __restrict__ logits, A* __restrict__ loss) {
  loss_of_task<A, M>(inputs, logits, loss, blockIdx.x);
}

// Up to kFusedClasses classes: means [T, C, d] and sums [slabs, T, m, C] of one slab a block; with one slab the block
// goes on to the loss. R rows of a warp against C classes at a time.
template <class A, class M, int R, int C>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 4 ? 2 : 1)
    prototypical_sums_kernel(WideRows<const A> support, Labels support_labels, WideRows<const A> query,
                             WideRows<A> means, A* __restrict__ sums, A* __restrict__ inverse, LossInputs<A> inputs,
                             A* __restrict__ logits, A* __restrict__ loss, int64_t d, int64_t slabs) {
  constexpr int kRounded = (kFusedClasses + C - 1) / C * C;
  METAFAST_SHARED(Features<A>, columns, [kRounded][kWarp]);
  BlockNumber block;
  const int64_t slab = block.part(slabs), t = block.rest();
  const int64_t k = slab * kSlab<A> + lane_index() * kVector<A>;
  const int64_t num_classes = inputs.num_classes, m = inputs.targets.rows;
  const bool bad = __syncthreads_or(sees_bad_label(support_labels, t, num_classes) ||
                                    sees_bad_label(inputs.targets, t, num_classes)) != 0;
  ClassMeans<A> result = class_means_of_slab(support, support_labels, t, 0, k, d);
#pragma unroll
  for (int c = 0; c < kClassesPerWarp; ++c) {
    const int number = warp_index() + c * kWarps;
    if (bad) fill(result.means[c], not_a_number<A>());
    if (number < kRounded) columns[number][lane_index()] = result.means[c];
    if (number >= num_classes) continue;
    store_features(means.row(t, number), means.wide, k, d, result.means[c]);
    if (slab == 0 && lane_index() == 0) {
      inverse[t * num_classes + number] = bad ? not_a_number<A>() : result.inverse[c];
    }
  }
  __syncthreads();
  for (int64_t first = warp_index() * R; first < m; first += kWarps * R) {
    Features<A> rows[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      rows[r] = load_features(query.row(t, first + r < m ? first + r : m - 1), query.wide, k, d);
    }
    for (int first_class = 0; first_class < num_classes; first_class += C) {
      A totals[R * C] = {};
      add_slab<A, M, R, C>(rows, columns + first_class, totals);
      store_warp_sums(totals, [&](int number, A sum) {
        const int64_t i = first + number / C, c = first_class + number % C;
        if (i < m && c < num_classes) sums[((slab * inputs.tasks + t) * m + i) * num_classes + c] = sum;
      });
    }
  }
  if (loss == nullptr) return;
  __syncthreads();
  loss_of_task<A, M>(inputs, logits, loss, t);
}

// The upstream gradients of a prototypical loss; null where an output was not used.
template <class A>
struct LossGradients {
  const A* loss;  // [T]
  int64_t loss_stride;
  const A* logits;  // [T, m, C]
  int64_t logits_strides[3];
};

// What the gradients of one query row are made from.
template <class A>
struct RowInputs {
  LossGradients<A> upstream;
  const A* logits;     // [T, m, C]
  const A* distances;  // [T, m, C], or null if no gradient of the temperature is wanted
  Labels targets;
  Temperature<A> temperature;
  int64_t num_classes;
};

// write(c, dL/dD_ic) for the classes of query row i, by one thread; returns dL/dtemperature's part of the row.
// A class is absent if its entry of `inverse` is 0: its logit is a constant.
template <class A, class Write>
__device__ __forceinline__ double row_gradient(const RowInputs<A>& inputs, const A* inverse, int64_t t, int64_t i,
                                               const Write& write) {
  const int64_t C = inputs.num_classes, m = inputs.targets.rows;
  const A* row = inputs.logits + (t * m + i) * C;
  const A tau = inputs.temperature.of(t);
  A largest = -A(INFINITY);
  for (int64_t c = 0; c < C; ++c) largest = row[c] > largest || row[c] != row[c] ? row[c] : largest;
  A sum = A(0);
  for (int64_t c = 0; c < C; ++c) sum += std::exp(row[c] - largest);
  const A upstream = inputs.upstream.loss == nullptr ? A(0) : inputs.upstream.loss[t * inputs.upstream.loss_stride];
  const A share = upstream / static_cast<A>(m), scaled = share / sum;
  const int64_t label = inputs.targets.of(t)[i];
  double temperature_part = 0;
  for (int64_t c = 0; c < C; ++c) {
    A gradient = std::exp(row[c] - largest) * scaled - (c == label ? share : A(0));
    if (inputs.upstream.logits != nullptr) {
      const int64_t* strides = inputs.upstream.logits_strides;
      gradient += inputs.upstream.logits[t * strides[0] + i * strides[1] + c * strides[2]];
    }
    if (inverse[c] == A(0)) gradient = A(0);
    if (inputs.distances != nullptr && inverse[c] != A(0)) {
      temperature_part -= static_cast<double>(gradient) * static_cast<double>(inputs.distances[(t * m + i) * C + c]);
    }
    write(c, -tau * gradient);
  }
  return temperature_part;
}

// weights [T, m, C] = dL/dD and temperature_grad [T], where wanted. A block is one task.
template <class A>
__global__ void __launch_bounds__(kThreads)
    prototypical_weights_kernel(RowInputs<A> inputs, const A* __restrict__ inverse, A* __restrict__ weights,
                                A* __restrict__ temperature_grad) {
  const int64_t t = blockIdx.x, C = inputs.num_classes, m = inputs.targets.rows;
  const A* task_inverse = inverse + t * C;
  const bool bad = C > 0 && task_inverse[0] != task_inverse[0];
  double total = 0;
  for (int64_t i = threadIdx.x; i < m; i += kThreads) {
    A* to = weights + (t * m + i) * C;
    total += row_gradient(inputs, task_inverse, t, i,
                          [&](int64_t c, A weight) { to[c] = bad ? not_a_number<A>() : weight; });
  }
  if (temperature_grad == nullptr) return;
  total = block_sum(total);
  if (threadIdx.x == 0)
    temperature_grad[t] = bad ? not_a_number<A>() : static_cast<A>(total * inputs.temperature.scale);
}

constexpr int kGradientRows = 4;  // query rows of a warp at a time

// Up to kMaxClasses classes: all gradients of one slab of one task by one block. Query rows are read once; the gradient
// of the means is summed in registers on the way, then over the warps, and handed to the support rows.
template <class A, class M, int kMaxClasses>
__global__ void __launch_bounds__(kThreads, kMaxClasses < kFusedClasses ? 2 : 1)
    prototypical_gradients_kernel(RowInputs<A> inputs, const A* __restrict__ totals,
                                  const A* __restrict__ query_squares, const A* __restrict__ mean_squares,
                                  WideRows<const A> grad_means, Labels support_labels, WideRows<const A> query,
                                  WideRows<const A> means, WideRows<A> grad_support, WideRows<A> grad_query,
                                  A* __restrict__ temperature_grad, int64_t d, int64_t slabs) {
  constexpr int kRows = kWarps * kGradientRows;
  constexpr int kSummed = 5;  // classes whose sums over the warps are made at a time
  METAFAST_SHARED(Features<A>, columns, [kMaxClasses][kWarp]);
  METAFAST_SHARED(Features<A>, partial, [kWarps][kSummed][kWarp]);
  METAFAST_SHARED(A, weights, [kRows][kMaxClasses]);
  METAFAST_SHARED(A, row_parts, [kRows][kMaxClasses]);
  METAFAST_SHARED(A, mean_parts, [kRows][kMaxClasses]);
  METAFAST_SHARED(A, inverse, [kMaxClasses]);
  BlockNumber block;
  const int64_t slab = block.part(slabs), t = block.rest();
  const int64_t k = slab * kSlab<A> + lane_index() * kVector<A>;
  const int64_t m = inputs.targets.rows;
  const int C = static_cast<int>(inputs.num_classes);
  const bool bad = __syncthreads_or(sees_bad_label(support_labels, t, C) || sees_bad_label(inputs.targets, t, C)) != 0;
  for (int c = warp_index(); c < C; c += kWarps) {
    const int64_t count = count_label(support_labels, t, c);
    if (lane_index() == 0) inverse[c] = count > 0 ? A(1) / static_cast<A>(count) : A(0);
    columns[c][lane_index()] = load_features(means.row(t, c), means.wide, k, d);
  }

  Features<A> mean_gradient[kMaxClasses];
#pragma unroll
  for (int c = 0; c < kMaxClasses; ++c) fill(mean_gradient[c], A(0));
  double temperature_total = 0;
  for (int64_t first = 0; first < m; first += kRows) {
    __syncthreads();
    if (threadIdx.x < kRows && first + threadIdx.x < m) {
      const int row = static_cast<int>(threadIdx.x);
      const int64_t i = first + row;
      temperature_total += row_gradient(inputs, inverse, t, i, [&](int64_t c, A gradient) {
        Pair<A> pair{};
        if constexpr (M::kSlopeOfSum) pair.sum = totals[(t * m + i) * C + c];
        if constexpr (M::kRows) {
          pair.x_square = query_squares[t * m + i];
          pair.y_square = mean_squares[t * C + c];
        }
        const Slope<A> slope = M::slope(pair);
        weights[row][c] = gradient * slope.w;
        if constexpr (M::kRows) {
          row_parts[row][c] = gradient * slope.x_part;
          mean_parts[row][c] = gradient * slope.y_part;
        }
      });
    }
    __syncthreads();
    const int warp_row = warp_index() * kGradientRows;
#pragma unroll
    for (int r = 0; r < kGradientRows; ++r) {
      const int64_t i = first + warp_row + r;
      if (i >= m) continue;
      const Features<A> row = load_features(query.row(t, i), query.wide, k, d);
      Features<A> result;
      fill(result, A(0));
#pragma unroll
      for (int c = 0; c < kMaxClasses; ++c) {
        if (c >= C) continue;
        const Features<A> column = columns[c][lane_index()];
        const A w = weights[warp_row + r][c];
#pragma unroll
        for (int v = 0; v < kVector<A>; ++v) {
          const A a = row.values[v], b = column.values[v];
          result.values[v] += w * M::step_x(a, b);
          mean_gradient[c].values[v] += w * M::step_y(a, b);
          if constexpr (M::kRows) {
            result.values[v] += row_parts[warp_row + r][c] * a;
            mean_gradient[c].values[v] += mean_parts[warp_row + r][c] * b;
          }
        }
      }
      if (bad) fill(result, not_a_number<A>());
      store_features(grad_query.row(t, i), grad_query.wide, k, d, result);
    }
  }
#pragma unroll
  for (int begin = 0; begin < kMaxClasses; begin += kSummed) {
#pragma unroll
    for (int c = 0; c < kSummed; ++c) partial[warp_index()][c][lane_index()] = mean_gradient[begin + c];
    __syncthreads();
    const int c = begin + warp_index();
    if (warp_index() < kSummed && c < C) {
      Features<A> sum;
      fill(sum, A(0));
      if (grad_means.data != nullptr) sum = load_features(grad_means.row(t, c), grad_means.wide, k, d);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
#pragma unroll
        for (int v = 0; v < kVector<A>; ++v) sum.values[v] += partial[w][warp_index()][lane_index()].values[v];
      }
#pragma unroll
      for (int v = 0; v < kVector<A>; ++v) sum.values[v] *= inverse[c];
      columns[c][lane_index()] = sum;
    }
    __syncthreads();
  }
  for (int64_t i = warp_index(); i < support_labels.rows; i += kWarps) {
    Features<A> row;
    fill(row, not_a_number<A>());
    if (!bad) row = columns[support_labels.of(t)[i]][lane_index()];
    store_features(grad_support.row(t, i), grad_support.wide, k, d, row);
  }
  if (temperature_grad == nullptr || slab != 0) return;
  temperature_total = block_sum(temperature_total);
  if (threadIdx.x == 0) {
    temperature_grad[t] =
        bad ? not_a_number<A>() : static_cast<A>(temperature_total * static_cast<double>(inputs.temperature.scale));
  }
}

template <class S>
void launch_class_means(WideRows<const S> features, Labels labels, Labels others, WideRows<S> out, int64_t tasks,
                        int64_t num_classes, int64_t d, Stream stream) {
  const int64_t class_blocks = ceil_div(num_classes, kBlockClasses), slabs = slabs_of<S>(d);
  const unsigned grid = grid_size(tasks * class_blocks * slabs);
  if (grid == 0) return;
  METAFAST_LAUNCH((class_means_kernel<S>), grid, kThreads, 0, stream, features, labels, others, out, num_classes, d,
                  class_blocks, slabs);
}

template <class S>
void launch_spread_means(WideRows<const S> grad, WideRows<const S> more, Labels labels, Labels others, WideRows<S> out,
                         int64_t tasks, int64_t num_classes, int64_t d, Stream stream) {
  const int64_t row_blocks = ceil_div(labels.rows, kWarps * kSpreadRows), slabs = slabs_of<S>(d);
  const unsigned grid = grid_size(tasks * row_blocks * slabs);
  if (grid == 0) return;
  METAFAST_LAUNCH((spread_means_kernel<S>), grid, kThreads, 0, stream, grad, more, labels, others, out, num_classes, d,
                  row_blocks, slabs);
}

template <class A>
void launch_inverse_counts(Labels labels, Labels others, A* inverse, int64_t tasks, int64_t num_classes,
                           Stream stream) {
  METAFAST_LAUNCH((inverse_counts_kernel<A>), grid_size(tasks), kThreads, 0, stream, labels, others, inverse,
                  num_classes);
}

template <class A, class M>
void launch_prototypical_loss(const LossInputs<A>& inputs, A* logits, A* loss, Stream stream) {
  METAFAST_LAUNCH((prototypical_loss_kernel<A, M>), grid_size(inputs.tasks), kThreads, 0, stream, inputs, logits, loss);
}

// Of at most kFusedClasses classes; loss is null where another kernel has to make it.
template <class A, class M>
void launch_prototypical_sums(WideRows<const A> support, Labels support_labels, WideRows<const A> query,
                              WideRows<A> means, A* sums, A* inverse, const LossInputs<A>& inputs, A* logits, A* loss,
                              int64_t d, Stream stream) {
  const int64_t slabs = slabs_of<A>(d);
  const unsigned grid = grid_size(inputs.tasks * slabs);
  if (inputs.num_classes <= kFewColumns) {
    METAFAST_LAUNCH((prototypical_sums_kernel<A, M, kRowsOfFew, kFewColumns>), grid, kThreads, 0, stream, support,
                    support_labels, query, means, sums, inverse, inputs, logits, loss, d, slabs);
  } else {
    METAFAST_LAUNCH((prototypical_sums_kernel<A, M, kRowsOfMany, kManyColumns>), grid, kThreads, 0, stream, support,
                    support_labels, query, means, sums, inverse, inputs, logits, loss, d, slabs);
  }
}

template <class A>
void launch_prototypical_weights(const RowInputs<A>& inputs, const A* inverse, A* weights, A* temperature_grad,
                                 int64_t tasks, Stream stream) {
  METAFAST_LAUNCH((prototypical_weights_kernel<A>), grid_size(tasks), kThreads, 0, stream, inputs, inverse, weights,
                  temperature_grad);
}

// Of at most kFusedClasses classes.
template <class A, class M>
void launch_prototypical_gradients(const RowInputs<A>& inputs, const A* totals, const A* query_squares,
                                   const A* mean_squares, WideRows<const A> grad_means, Labels support_labels,
                                   WideRows<const A> query, WideRows<const A> means, WideRows<A> grad_support,
                                   WideRows<A> grad_query, A* temperature_grad, int64_t tasks, int64_t d,
                                   Stream stream) {
  const int64_t slabs = slabs_of<A>(d);
  const unsigned grid = grid_size(tasks * slabs);
  if (inputs.num_classes <= kFewColumns) {
    METAFAST_LAUNCH((prototypical_gradients_kernel<A, M, kFewColumns>), grid, kThreads, 0, stream, inputs, totals,
                    query_squares, mean_squares, grad_means, support_labels, query, means, grad_support, grad_query,
                    temperature_grad, d, slabs);
  } else {
    METAFAST_LAUNCH((prototypical_gradients_kernel<A, M, kFusedClasses>), grid, kThreads, 0, stream, inputs, totals,
                    query_squares, mean_squares, grad_means, support_labels, query, means, grad_support, grad_query,
                    temperature_grad, d, slabs);
  }
}

}  // namespace metafast::cuda
