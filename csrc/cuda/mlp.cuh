// The inner loop of an MLP on a GPU, and its reverse sweep by the R operator. A block owns one task: every stage is a
// product of matrices in its working memory, and a barrier parts it from the next. A bias is the last column of its
// weight, and every row of activations ends with the 1 that meets it. A class number outside 0..C-1 makes all results of
// its task NaN; it is never used as an index.
#pragma once

#include "cuda/block_products.cuh"
#include "cuda/groups.cuh"
#include "cuda/labels.cuh"
#include "math/activation.h"
#include "math/inner_loss.h"

namespace metafast::cuda {

constexpr int kMostLayers = kMostParts / 2;  // whose pointers and strides fit into the arguments of a kernel
constexpr int64_t kQueryRows = 16;           // that a block works on at a time, or as many as there are support rows
enum class StepRates { number, steps, parameters };  // one for all, one for each layer and step, one for each parameter

// A batch of matrices with any strides.
template <class A>
struct Strided {
  const A* data;
  int64_t batch;
  int64_t row;
  int64_t column;

  __device__ __forceinline__ A at(int64_t b, int64_t i, int64_t j) const {
    return data[b * batch + i * row + j * column];
  }
};

// Rows in working memory.
template <class A>
struct Table {
  A* data;
  int64_t stride;

  __device__ __forceinline__ A& at(int64_t i, int64_t j) const { return data[i * stride + j]; }
  __device__ __forceinline__ operator Matrix<A>() const { return {data, stride, 1}; }
};

// Threads that read a column meet different banks of shared memory.
METAFAST_HOST_DEVICE int64_t odd_stride(int64_t columns) { return columns | 1; }

template <class A>
struct MlpLayer {
  Strided<A> weight;        // of a group of tasks: [out, in]
  Strided<A> bias;          // [out]
  Strided<A> weight_rates;  // like weight; for a rate for each step, its rows are the steps
  Strided<A> bias_rates;
  int64_t out;
  int64_t parameters;    // numbers before this layer in a block of parameters,
  int64_t packed;        // and among the packed ones
  int64_t columns;       // of a block of activations before it,
  int64_t tape_columns;  // and on the tape
  int64_t rate_at;       // of its first rate among those of the task
  int64_t rate_step;     // 1 if each step has a rate of its own, otherwise 0
};

// What both kernels are given. A block of parameters in working memory holds each layer as [out, in + 1], a block of
// activations as [row_limit, out + 1], both with odd strides. The tape holds for each step the activations and deltas,
// layer by layer [n, out], and the packed parameters after it, then the query's hidden activations [m, out].
template <class A>
struct MlpProblem {
  MlpLayer<A> layer[kMostLayers];
  Strided<A> inputs;
  Strided<A> targets;  // null where there are labels
  Strided<A> query;
  Labels labels;
  int64_t layers;
  int64_t in;
  int64_t rows;
  int64_t query_rows;
  int64_t row_limit;  // of a block of activations
  int64_t steps;
  int64_t group_tasks;
  int64_t rate_group_tasks;
  int64_t parameters;
  int64_t packed;
  int64_t columns;
  int64_t tape_columns;
  A rate;
  StepRates rates;
  Activation activation;
  InnerLoss loss;
  bool first_order;
  A* tape;
  int64_t tape_size;
  A* global;  // working memory of all blocks, null where it is shared memory
  int64_t memory;

  // Numbers of working memory that a block needs.
  int64_t memory_of(bool backward) const {
    const int64_t rows_of_activations = row_limit * columns;
    return (backward ? 3 : 1) * parameters + row_limit * odd_stride(in + 1) + (backward ? 5 : 2) * rows_of_activations;
  }

  METAFAST_HOST_DEVICE int64_t width(int64_t l) const { return l == 0 ? in : layer[l - 1].out; }
  METAFAST_HOST_DEVICE int64_t tape_step() const { return 2 * rows * tape_columns + packed; }

  __device__ __forceinline__ A* tape_of(int64_t t, int64_t step) const {
    return tape + t * tape_size + step * tape_step();
  }
  // Layer l of a block of parameters, of one of activations, and the rows that it is fed with.
  __device__ __forceinline__ Table<A> weight(A* block, int64_t l) const {
    return {block + layer[l].parameters, odd_stride(width(l) + 1)};
  }
  __device__ __forceinline__ Table<A> outputs(A* block, int64_t l) const {
    return {block + row_limit * layer[l].columns, odd_stride(layer[l].out + 1)};
  }
  __device__ __forceinline__ Table<A> below(A* x, A* h, int64_t l) const {
    return l == 0 ? Table<A>{x, odd_stride(in + 1)} : outputs(h, l - 1);
  }
  // Where element (i, j) of layer l stands among the packed parameters.
  __device__ __forceinline__ int64_t packed_at(int64_t l, int64_t i, int64_t j) const {
    const int64_t columns = width(l);
    return layer[l].packed + (j < columns ? i * columns + j : layer[l].out * columns + i);
  }
  // The rates of group g.
  __device__ __forceinline__ A rate_of(int64_t g, int64_t step, int64_t l) const {
    return rates == StepRates::steps ? layer[l].weight_rates.at(g, step, 0) : rate;
  }
  __device__ __forceinline__ A rate_of_parameter(int64_t g, int64_t l, int64_t i, int64_t j) const {
    return j < width(l) ? layer[l].weight_rates.at(g, i, j) : layer[l].bias_rates.at(g, i, 0);
  }
  __device__ __forceinline__ A target(int64_t t, int64_t i, int64_t c) const {
    if (labels.data != nullptr) return labels.of(t)[i] == c ? A(1) : A(0);
    return targets.at(t, i, c);
  }
};

// Beside it, the kernel of the reverse sweep; null where there is no upstream gradient or none is wanted.
template <class A>
struct MlpGradients {
  Strided<A> outputs;     // upstream, [T, m, C]
  Strided<A> parameters;  // upstream, packed in rows
  A* inputs;
  A* targets;
  A* query;
  A* packed;  // [T, packed]
  A* rates;   // [T, rate_numbers]
  int64_t rate_numbers;
};

template <class A>
__device__ __forceinline__ A activated(Activation activation, A a) {
  if (activation == Activation::tanh) return std::tanh(a);
  return a <= A(0) ? A(0) : a;
}

// As torch has it, the slope of ReLU is 0 at 0 and 1 at NaN.
template <class A>
__device__ __forceinline__ A sloped(Activation activation, A h, A along) {
  if (activation == Activation::tanh) return (A(1) - h * h) * along;
  return h <= A(0) ? A(0) : along;
}

// From the tape to working memory; in shared memory it arrives at await_tape().
template <class A>
__device__ __forceinline__ void fetch(const MlpProblem<A>& p, A* to, const A* from) {
  if (p.global == nullptr) {
    copy_async<sizeof(A)>(to, from);
  } else {
    *to = *from;
  }
}

__device__ __forceinline__ void await_tape() {
  commit_async();
  wait_async<0>();
}

// The parameters after `step` steps; `start`, 0 or NaN, is added to the first ones.
template <class A>
__device__ __forceinline__ void load_parameters(const MlpProblem<A>& p, int64_t t, int64_t step, A start, A* block) {
  const int64_t g = t / p.group_tasks;
  const A* packed = step == 0 ? nullptr : p.tape_of(t, step) - p.packed;
  for (int64_t l = 0; l < p.layers; ++l) {
    const Table<A> to = p.weight(block, l);
    const int64_t in = p.width(l);
    for_each_element(p.layer[l].out, in + 1, [&](int64_t i, int64_t j) {
      if (packed != nullptr) {
        fetch(p, &to.at(i, j), packed + p.packed_at(l, i, j));
      } else {
        to.at(i, j) = start + (j < in ? p.layer[l].weight.at(g, i, j) : p.layer[l].bias.at(g, i, 0));
      }
    });
  }
}

template <class A>
__device__ __forceinline__ void load_inputs(const MlpProblem<A>& p, const Strided<A>& from, int64_t t, int64_t first,
                                            int64_t rows, A* x) {
  const Table<A> to = p.below(x, nullptr, 0);
  for_each_element(rows, p.in, [&](int64_t i, int64_t j) { to.at(i, j) = from.at(t, first + i, j); });
}

// Rows first, first + 1, ... of the activations of the layers before `layers`, of which the tape has `all`.
template <class A>
__device__ __forceinline__ void load_activations(const MlpProblem<A>& p, const A* tape, int64_t all, int64_t layers,
                                                 int64_t first, int64_t rows, A* block) {
  for (int64_t l = 0; l < layers; ++l) {
    const Table<A> to = p.outputs(block, l);
    const int64_t out = p.layer[l].out;
    const A* from = tape + all * p.layer[l].tape_columns + first * out;
    for_each_element(rows, out, [&](int64_t i, int64_t j) { fetch(p, &to.at(i, j), from + i * out + j); });
  }
}

// The column behind each row of the hidden activations.
template <class A>
__device__ __forceinline__ void fill_last_column(const MlpProblem<A>& p, A* block, A value) {
  for (int64_t l = 0; l + 1 < p.layers; ++l) {
    const Table<A> to = p.outputs(block, l);
    for (int64_t i = threadIdx.x; i < p.row_limit; i += kThreads) to.at(i, p.layer[l].out) = value;
  }
}

// The activations of `rows` rows x, also given to store(l, i, j, h); the last layer has no function.
template <class A, class Store>
__device__ __forceinline__ void forward_pass(const MlpProblem<A>& p, A* parameters, A* x, A* h, int64_t rows,
                                             const Store& store) {
  for (int64_t l = 0; l < p.layers; ++l) {
    const Table<A> to = p.outputs(h, l);
    const Factors<A> terms[1] = {{p.below(x, h, l), transposed<A>(p.weight(parameters, l)), p.width(l) + 1}};
    block_product(terms, rows, p.layer[l].out, [&](int64_t i, int64_t j, A sum) {
      const A value = l + 1 < p.layers ? activated(p.activation, sum) : sum;
      to.at(i, j) = value;
      store(l, i, j, value);
    });
    __syncthreads();
  }
}

// The deltas of all layers from that of the last one, also given to store(l, i, j, delta).
template <class A, class Store>
__device__ __forceinline__ void backward_pass(const MlpProblem<A>& p, A* parameters, A* h, A* delta, int64_t rows,
                                              const Store& store) {
  for (int64_t l = p.layers - 1; l > 0; --l) {
    const Table<A> to = p.outputs(delta, l - 1), own = p.outputs(h, l - 1);
    const Factors<A> terms[1] = {{p.outputs(delta, l), p.weight(parameters, l), p.layer[l].out}};
    block_product(terms, rows, p.width(l), [&](int64_t i, int64_t j, A sum) {
      const A value = sloped(p.activation, own.at(i, j), sum);
      to.at(i, j) = value;
      store(l - 1, i, j, value);
    });
    __syncthreads();
  }
}

// The gradient of layer l, as terms: delta^T h.
template <class A>
__device__ __forceinline__ Factors<A> outer_product(const MlpProblem<A>& p, A* x, A* h, A* delta, int64_t l,
                                                    int64_t rows) {
  return {transposed<A>(p.outputs(delta, l)), p.below(x, h, l), rows};
}

// The softmax of a row by a warp; a lane finds in `to` what it has written itself.
template <class A>
__device__ __forceinline__ void softmax_row(const A* from, int64_t width, A* to) {
  A largest = -A(INFINITY);
  for (int64_t c = lane_index(); c < width; c += kWarp) largest = from[c] > largest ? from[c] : largest;
  largest = warp_max(largest);
  A total = A(0);
  for (int64_t c = lane_index(); c < width; c += kWarp) {
    to[c] = std::exp(from[c] - largest);
    total += to[c];
  }
  const A inverse = A(1) / warp_sum(total);
  for (int64_t c = lane_index(); c < width; c += kWarp) to[c] *= inverse;
}

// The sum of the targets of a row, in every lane.
template <class A>
__device__ __forceinline__ A mass_of_row(const MlpProblem<A>& p, int64_t t, int64_t i, int64_t width) {
  if (p.labels.data != nullptr) return A(1);
  A mass = A(0);
  for (int64_t c = lane_index(); c < width; c += kWarp) mass += p.target(t, i, c);
  return warp_sum(mass);
}

// The derivative of the loss for the outputs: 2 (a - y) / (n C), or (sum(y) softmax(a) - y) / n. A warp a row.
template <class A>
__device__ __forceinline__ void loss_delta(const MlpProblem<A>& p, int64_t t, A* h, A* delta, A* to_tape) {
  const int64_t last = p.layers - 1, C = p.layer[last].out;
  const Table<A> a = p.outputs(h, last), to = p.outputs(delta, last);
  const bool mse = p.loss == InnerLoss::mse;
  for (int64_t i = warp_index(); i < p.rows; i += kWarps) {
    A* row = &to.at(i, 0);
    A mass = A(0);
    if (!mse) {
      softmax_row(&a.at(i, 0), C, row);
      mass = mass_of_row(p, t, i, C);
    }
    for (int64_t c = lane_index(); c < C; c += kWarp) {
      const A y = p.target(t, i, c);
      row[c] =
          mse ? A(2) / static_cast<A>(p.rows * C) * (a.at(i, c) - y) : (mass * row[c] - y) / static_cast<A>(p.rows);
      to_tape[i * C + c] = row[c];
    }
  }
}

// The change of that derivative along the change of the outputs; the targets' gradient is its mixed derivative.
template <class A>
__device__ __forceinline__ void loss_delta_tangent(const MlpProblem<A>& p, int64_t t, A* h, A* changes, A* rdelta,
                                                   A* to_targets) {
  const int64_t last = p.layers - 1, C = p.layer[last].out;
  const Table<A> a = p.outputs(h, last), along = p.outputs(changes, last), to = p.outputs(rdelta, last);
  const bool mse = p.loss == InnerLoss::mse;
  for (int64_t i = warp_index(); i < p.rows; i += kWarps) {
    A* row = &to.at(i, 0);
    A mass = A(0), mean = A(0);
    if (!mse) {
      softmax_row(&a.at(i, 0), C, row);
      mass = mass_of_row(p, t, i, C);
      for (int64_t c = lane_index(); c < C; c += kWarp) mean = std::fma(row[c], along.at(i, c), mean);
      mean = warp_sum(mean);
    }
    const A scale = mse ? A(2) / static_cast<A>(p.rows * C) : A(1) / static_cast<A>(p.rows);
    for (int64_t c = lane_index(); c < C; c += kWarp) {
      const A change = scale * (along.at(i, c) - mean);
      row[c] = mse ? change : mass * row[c] * change;
      if (to_targets != nullptr) to_targets[(t * p.rows + i) * C + c] += change;
    }
  }
}

// K steps, then outputs [T, m, C] of the query rows, or the packed parameters where there is no query.
template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    mlp_adapt_kernel(const __grid_constant__ MlpProblem<A> p, A* __restrict__ outputs, A* __restrict__ parameters) {
  const int64_t t = blockIdx.x, n = p.rows, m = p.query_rows, last = p.layers - 1, C = p.layer[last].out;
  const int64_t g = t / p.rate_group_tasks;
  A* const theta = working_memory<A>(p.global, p.memory);
  A* const x = theta + p.parameters;
  A* const h = x + p.row_limit * odd_stride(p.in + 1);
  A* const delta = h + p.row_limit * p.columns;
  const bool bad = __syncthreads_or(sees_bad_label(p.labels, t, C)) != 0;
  load_parameters(p, t, 0, bad ? not_a_number<A>() : A(0), theta);
  load_inputs(p, p.inputs, t, 0, n, x);
  for (int64_t i = threadIdx.x; i < p.row_limit; i += kThreads) p.below(x, h, 0).at(i, p.in) = A(1);
  fill_last_column(p, h, A(1));
  __syncthreads();
  for (int64_t step = 0; step < p.steps; ++step) {
    A* const tape = p.tape_of(t, step);
    A* const delta_tape = tape + n * p.tape_columns;
    A* const next = delta_tape + n * p.tape_columns;
    const auto store_to = [&](A* to) {
      return [&p, to, n](int64_t l, int64_t i, int64_t j, A value) {
        to[n * p.layer[l].tape_columns + i * p.layer[l].out + j] = value;
      };
    };
    forward_pass(p, theta, x, h, n, store_to(tape));
    loss_delta(p, t, h, delta, delta_tape + n * p.layer[last].tape_columns);
    __syncthreads();
    backward_pass(p, theta, h, delta, n, store_to(delta_tape));
    for (int64_t l = 0; l < p.layers; ++l) {
      const Table<A> own = p.weight(theta, l);
      const A rate = p.rate_of(g, step, l);
      const Factors<A> terms[1] = {outer_product(p, x, h, delta, l, n)};
      block_product(terms, p.layer[l].out, p.width(l) + 1, [&](int64_t i, int64_t j, A sum) {
        const A alpha = p.rates == StepRates::parameters ? p.rate_of_parameter(g, l, i, j) : rate;
        const A value = std::fma(-alpha, sum, own.at(i, j));
        own.at(i, j) = value;
        next[p.packed_at(l, i, j)] = value;
      });
    }
    __syncthreads();
  }
  A* const tape = p.tape_of(t, p.steps);
  for (int64_t first = 0; first < m; first += p.row_limit) {
    const int64_t rows = first + p.row_limit < m ? p.row_limit : m - first;
    load_inputs(p, p.query, t, first, rows, x);
    __syncthreads();
    forward_pass(p, theta, x, h, rows, [&](int64_t l, int64_t i, int64_t j, A value) {
      if (l == last) {
        outputs[(t * m + first + i) * C + j] = value;
      } else {
        tape[m * p.layer[l].tape_columns + (first + i) * p.layer[l].out + j] = value;
      }
    });
  }
  if (parameters == nullptr) return;
  for (int64_t l = 0; l < p.layers; ++l) {
    const Table<A> own = p.weight(theta, l);
    for_each_element(p.layer[l].out, p.width(l) + 1,
                     [&](int64_t i, int64_t j) { parameters[t * p.packed + p.packed_at(l, i, j)] = own.at(i, j); });
  }
}

// Minus lam o g in the rates' gradient, g = the gradient that a step has followed.
template <class A>
__device__ __forceinline__ void rate_gradients(const MlpProblem<A>& p, const MlpGradients<A>& grads, int64_t t,
                                               int64_t step, A* x, A* h, A* delta, A* lam) {
  A* const to = grads.rates + t * grads.rate_numbers;
  for (int64_t l = 0; l < p.layers; ++l) {
    const Table<A> own = p.weight(lam, l);
    const Factors<A> terms[1] = {outer_product(p, x, h, delta, l, p.rows)};
    A part = A(0);
    block_product(terms, p.layer[l].out, p.width(l) + 1, [&](int64_t i, int64_t j, A sum) {
      if (p.rates == StepRates::parameters) {
        to[p.packed_at(l, i, j)] -= own.at(i, j) * sum;
      } else {
        part = std::fma(own.at(i, j), sum, part);
      }
    });
    if (p.rates == StepRates::parameters) continue;
    part = block_sum(part);
    if (threadIdx.x == 0) to[p.layer[l].rate_at + step * p.layer[l].rate_step] -= part;
    __syncthreads();
  }
}

// The gradients of <upstream, outputs>: back through the query rows, then step by step through the inner loop.
template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    mlp_adapt_vjp_kernel(const __grid_constant__ MlpProblem<A> p, const __grid_constant__ MlpGradients<A> grads) {
  const int64_t t = blockIdx.x, n = p.rows, m = p.query_rows, in = p.in, last = p.layers - 1, C = p.layer[last].out;
  const int64_t block = p.row_limit * p.columns, g = t / p.rate_group_tasks;
  A* const theta = working_memory<A>(p.global, p.memory);
  A* const along = theta + p.parameters;
  A* const lam = along + p.parameters;
  A* const x = lam + p.parameters;
  A* const h = x + p.row_limit * odd_stride(in + 1);
  A* const delta = h + block;
  A* const ra = delta + block;
  A* const rh = ra + block;
  A* const rdelta = rh + block;
  const bool bad = __syncthreads_or(sees_bad_label(p.labels, t, C)) != 0;
  const A start = bad ? not_a_number<A>() : A(0);
  const auto ignore = [](int64_t, int64_t, int64_t, A) {};

  for (int64_t l = 0; l < p.layers; ++l) {
    const Table<A> to = p.weight(lam, l);
    for_each_element(p.layer[l].out, p.width(l) + 1, [&](int64_t i, int64_t j) {
      const bool given = grads.parameters.data != nullptr;
      to.at(i, j) = given ? start + grads.parameters.at(t, 0, p.packed_at(l, i, j)) : start;
    });
  }
  const auto fill = [&](A* to, int64_t count) {
    if (to == nullptr) return;
    for (int64_t k = threadIdx.x; k < count; k += kThreads) to[t * count + k] = start;
  };
  fill(grads.inputs, n * in);
  fill(grads.targets, n * C);
  fill(grads.rates, grads.rate_numbers);
  if (grads.outputs.data == nullptr) fill(grads.query, m * in);
  for (int64_t i = threadIdx.x; i < p.row_limit; i += kThreads) p.below(x, h, 0).at(i, in) = A(1);
  fill_last_column(p, h, A(1));
  fill_last_column(p, rh, A(0));

  if (grads.outputs.data != nullptr) {
    load_parameters(p, t, p.steps, A(0), theta);
    for (int64_t first = 0; first < m; first += p.row_limit) {
      const int64_t rows = first + p.row_limit < m ? p.row_limit : m - first;
      load_inputs(p, p.query, t, first, rows, x);
      load_activations(p, p.tape_of(t, p.steps), m, last, first, rows, h);
      const Table<A> top = p.outputs(delta, last);
      for_each_element(rows, C, [&](int64_t i, int64_t j) { top.at(i, j) = grads.outputs.at(t, first + i, j); });
      await_tape();
      __syncthreads();
      backward_pass(p, theta, h, delta, rows, ignore);
      for (int64_t l = 0; l < p.layers; ++l) {
        const Table<A> to = p.weight(lam, l);
        const Factors<A> terms[1] = {outer_product(p, x, h, delta, l, rows)};
        block_product(terms, p.layer[l].out, p.width(l) + 1, [&](int64_t i, int64_t j, A sum) { to.at(i, j) += sum; });
      }
      if (grads.query != nullptr) {
        const Factors<A> terms[1] = {{p.outputs(delta, 0), p.weight(theta, 0), p.layer[0].out}};
        block_product(terms, rows, in,
                      [&](int64_t i, int64_t j, A sum) { grads.query[(t * m + first + i) * in + j] = start + sum; });
      }
      __syncthreads();
    }
  }

  load_inputs(p, p.inputs, t, 0, n, x);
  const bool nothing = p.first_order && grads.rates == nullptr;
  for (int64_t step = nothing ? -1 : p.steps - 1; step >= 0; --step) {
    const A* const tape = p.tape_of(t, step);
    load_activations(p, tape, n, p.layers, 0, n, h);
    load_activations(p, tape + n * p.tape_columns, n, p.layers, 0, n, delta);
    if (!p.first_order) {
      load_parameters(p, t, step, A(0), theta);
      for (int64_t l = 0; l < p.layers; ++l) {
        const Table<A> from = p.weight(lam, l), to = p.weight(along, l);
        const A rate = p.rate_of(g, step, l);
        for_each_element(p.layer[l].out, p.width(l) + 1, [&](int64_t i, int64_t j) {
          to.at(i, j) = (p.rates == StepRates::parameters ? p.rate_of_parameter(g, l, i, j) : rate) * from.at(i, j);
        });
      }
    }
    await_tape();
    __syncthreads();
    if (grads.rates != nullptr) rate_gradients(p, grads, t, step, x, h, delta, lam);
    if (p.first_order) {
      __syncthreads();
      continue;
    }
    // R of every activation and delta along rate o lam.
    for (int64_t l = 0; l < p.layers; ++l) {
      const Table<A> to = p.outputs(ra, l), moved = p.outputs(rh, l), own = p.outputs(h, l);
      const Factors<A> terms[2] = {{p.below(x, h, l), transposed<A>(p.weight(along, l)), p.width(l) + 1},
                                   {p.below(x, rh, l), transposed<A>(p.weight(theta, l)), l == 0 ? 0 : p.width(l)}};
      block_product(terms, n, p.layer[l].out, [&](int64_t i, int64_t j, A sum) {
        to.at(i, j) = sum;
        if (l < last) moved.at(i, j) = sloped(p.activation, own.at(i, j), sum);
      });
      __syncthreads();
    }
    loss_delta_tangent(p, t, h, ra, rdelta, grads.targets);
    __syncthreads();
    for (int64_t l = last; l > 0; --l) {
      const Table<A> to = p.outputs(rdelta, l - 1), own = p.outputs(h, l - 1);
      const Table<A> own_delta = p.outputs(delta, l - 1), change = p.outputs(ra, l - 1);
      const Factors<A> terms[2] = {{p.outputs(delta, l), p.weight(along, l), p.layer[l].out},
                                   {p.outputs(rdelta, l), p.weight(theta, l), p.layer[l].out}};
      block_product(terms, n, p.width(l), [&](int64_t i, int64_t j, A sum) {
        A value = sloped(p.activation, own.at(i, j), sum);
        // phi'' u = -2 h (1 - h^2) u = -2 h delta
        if (p.activation == Activation::tanh) value -= A(2) * own.at(i, j) * own_delta.at(i, j) * change.at(i, j);
        to.at(i, j) = value;
      });
      __syncthreads();
    }
    if (grads.inputs != nullptr) {
      const Factors<A> terms[2] = {{p.outputs(delta, 0), p.weight(along, 0), p.layer[0].out},
                                   {p.outputs(rdelta, 0), p.weight(theta, 0), p.layer[0].out}};
      block_product(terms, n, in, [&](int64_t i, int64_t j, A sum) { grads.inputs[(t * n + i) * in + j] -= sum; });
    }
    for (int64_t l = 0; l < p.layers; ++l) {
      const Table<A> to = p.weight(lam, l);
      const Factors<A> terms[2] = {outer_product(p, x, h, rdelta, l, n),
                                   outer_product(p, x, rh, delta, l, l == 0 ? 0 : n)};
      block_product(terms, p.layer[l].out, p.width(l) + 1, [&](int64_t i, int64_t j, A sum) { to.at(i, j) -= sum; });
    }
    __syncthreads();
  }
  for (int64_t l = 0; l < p.layers; ++l) {
    const Table<A> own = p.weight(lam, l);
    for_each_element(p.layer[l].out, p.width(l) + 1,
                     [&](int64_t i, int64_t j) { grads.packed[t * p.packed + p.packed_at(l, i, j)] = own.at(i, j); });
  }
}

template <class A>
void launch_mlp_adapt(const MlpProblem<A>& problem, A* outputs, A* parameters, int64_t tasks, unsigned shared_bytes,
                      Stream stream) {
  static_assert(sizeof(problem) + sizeof(MlpGradients<A>) <= 4096, "what the arguments of a kernel may take");
  METAFAST_LAUNCH((mlp_adapt_kernel<A>), grid_size(tasks), kThreads, shared_bytes, stream, problem, outputs,
                  parameters);
}

template <class A>
void launch_mlp_adapt_vjp(const MlpProblem<A>& problem, const MlpGradients<A>& gradients, int64_t tasks,
                          unsigned shared_bytes, Stream stream) {
  METAFAST_LAUNCH((mlp_adapt_vjp_kernel<A>), grid_size(tasks), kThreads, shared_bytes, stream, problem, gradients);
}

}  // namespace metafast::cuda
