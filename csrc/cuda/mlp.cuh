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
//
// `factored`: the first weight and bias are W + D^T X in every step for the support rows X, which end with 1, and their
// adjoint is L + R^T X. Only D and R, [n, out], are kept beside what they do to rows, and the packed parameters of a step
// begin with the second layer; the products of the rows and the query rows with the rows, and D, end the tape.
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
  bool factored;
  int64_t skipped;  // of the packed parameters in each step
  A* tape;
  int64_t tape_size;
  A* global;  // working memory of all blocks, null where it is shared memory
  int64_t memory;

  // Numbers of working memory that a block needs.
  int64_t memory_of(bool backward) const {
    const int64_t rows_of_activations = row_limit * columns;
    const int64_t first =
        factored ? (backward ? 2 : 1) * rows * first_stride() + (backward ? row_limit + rows : 0) * rows : 0;
    return (backward ? 3 : 1) * parameters + row_limit * odd_stride(in + 1) + (backward ? 5 : 2) * rows_of_activations +
           first;
  }

  METAFAST_HOST_DEVICE int64_t width(int64_t l) const { return l == 0 ? in : layer[l - 1].out; }
  METAFAST_HOST_DEVICE int64_t stepped() const { return packed - skipped; }
  METAFAST_HOST_DEVICE int64_t tape_step() const { return 2 * rows * tape_columns + stepped(); }
  METAFAST_HOST_DEVICE int64_t first_stride() const { return odd_stride(layer[0].out); }
  // The first layer that is explicit in each step.
  METAFAST_HOST_DEVICE int64_t lowest() const { return factored ? 1 : 0; }

  __device__ __forceinline__ A* tape_of(int64_t t, int64_t step) const {
    return tape + t * tape_size + step * tape_step();
  }
  // Factored: [n + m, n] products of rows, D [n, out], the initial weight of the group and the support rows.
  __device__ __forceinline__ A* products_of(int64_t t) const { return tape_of(t, steps) + query_rows * tape_columns; }
  __device__ __forceinline__ A* change_of(int64_t t) const { return products_of(t) + (rows + query_rows) * rows; }
  __device__ __forceinline__ Matrix<A> first_weight(int64_t t) const {
    const Strided<A>& all = layer[0].weight;
    return {all.data + t / group_tasks * all.batch, all.row, all.column};
  }
  __device__ __forceinline__ Matrix<A> inputs_of(int64_t t) const {
    return {inputs.data + t * inputs.batch, inputs.row, inputs.column};
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
  for (int64_t l = p.lowest(); l < p.layers; ++l) {
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

// What becomes of a sum of layer l: the activation, also given to store(l, i, j, h); the last layer has no function.
template <class A, class Store>
__device__ __forceinline__ void activate(const MlpProblem<A>& p, A* h, int64_t l, int64_t i, int64_t j, A sum,
                                         const Store& store) {
  const A value = l + 1 < p.layers ? activated(p.activation, sum) : sum;
  p.outputs(h, l).at(i, j) = value;
  store(l, i, j, value);
}

// The activations of `rows` rows x; where the first layer is factored, those of the others.
template <class A, class Store>
__device__ __forceinline__ void forward_pass(const MlpProblem<A>& p, A* parameters, A* x, A* h, int64_t rows,
                                             const Store& store) {
  for (int64_t l = p.lowest(); l < p.layers; ++l) {
    const Factors<A> terms[1] = {{p.below(x, h, l), transposed<A>(p.weight(parameters, l)), p.width(l) + 1}};
    block_product(terms, rows, p.layer[l].out,
                  [&](int64_t i, int64_t j, A sum) { activate(p, h, l, i, j, sum, store); });
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
  const Table<A> sums{delta + p.row_limit * p.columns, p.first_stride()};  // of the first layer, where it is factored
  const int64_t first_out = p.layer[0].out;
  const Table<A> products{p.products_of(t), n}, change{p.change_of(t), first_out};
  const bool bad = __syncthreads_or(sees_bad_label(p.labels, t, C)) != 0;
  const A start = bad ? not_a_number<A>() : A(0);
  const auto first_bias = [&](int64_t j) { return start + p.layer[0].bias.at(t / p.group_tasks, j, 0); };
  load_parameters(p, t, 0, start, theta);
  load_inputs(p, p.inputs, t, 0, n, x);
  for (int64_t i = threadIdx.x; i < p.row_limit; i += kThreads) p.below(x, h, 0).at(i, p.in) = A(1);
  fill_last_column(p, h, A(1));
  __syncthreads();
  if (p.factored) {
    const Matrix<A> rows = p.below(x, h, 0);
    const Factors<A> squares[1] = {{rows, transposed(rows), p.in + 1}};
    block_product(squares, n, n, [&](int64_t i, int64_t j, A sum) { products.at(i, j) = sum; });
    const Factors<A> terms[1] = {{rows, transposed(p.first_weight(t)), p.in}};
    block_product(terms, n, first_out, [&](int64_t i, int64_t j, A sum) {
      sums.at(i, j) = first_bias(j) + sum;
      change.at(i, j) = A(0);
    });
    __syncthreads();
  }
  for (int64_t step = 0; step < p.steps; ++step) {
    A* const tape = p.tape_of(t, step);
    A* const delta_tape = tape + n * p.tape_columns;
    A* const next = delta_tape + n * p.tape_columns;
    const auto store_to = [&](A* to) {
      return [&p, to, n](int64_t l, int64_t i, int64_t j, A value) {
        to[n * p.layer[l].tape_columns + i * p.layer[l].out + j] = value;
      };
    };
    if (p.factored) {
      for_each_element(n, first_out,
                       [&](int64_t i, int64_t j) { activate(p, h, 0, i, j, sums.at(i, j), store_to(tape)); });
      __syncthreads();
    }
    forward_pass(p, theta, x, h, n, store_to(tape));
    loss_delta(p, t, h, delta, delta_tape + n * p.layer[last].tape_columns);
    __syncthreads();
    backward_pass(p, theta, h, delta, n, store_to(delta_tape));
    if (p.factored) {
      const Table<A> own = p.outputs(delta, 0);
      const A rate = p.rate_of(g, step, 0);
      const Factors<A> terms[1] = {{products, own, n}};
      block_product(terms, n, first_out, [&](int64_t i, int64_t j, A sum) {
        sums.at(i, j) = std::fma(-rate, sum, sums.at(i, j));
        change.at(i, j) = std::fma(-rate, own.at(i, j), change.at(i, j));
      });
    }
    for (int64_t l = p.lowest(); l < p.layers; ++l) {
      const Table<A> own = p.weight(theta, l);
      const A rate = p.rate_of(g, step, l);
      const Factors<A> terms[1] = {outer_product(p, x, h, delta, l, n)};
      block_product(terms, p.layer[l].out, p.width(l) + 1, [&](int64_t i, int64_t j, A sum) {
        const A alpha = p.rates == StepRates::parameters ? p.rate_of_parameter(g, l, i, j) : rate;
        const A value = std::fma(-alpha, sum, own.at(i, j));
        own.at(i, j) = value;
        next[p.packed_at(l, i, j) - p.skipped] = value;
      });
    }
    __syncthreads();
  }
  A* const tape = p.tape_of(t, p.steps);
  for (int64_t first = 0; first < m; first += p.row_limit) {
    const int64_t rows = first + p.row_limit < m ? p.row_limit : m - first;
    load_inputs(p, p.query, t, first, rows, x);
    __syncthreads();
    const auto store = [&](int64_t l, int64_t i, int64_t j, A value) {
      if (l == last) {
        outputs[(t * m + first + i) * C + j] = value;
      } else {
        tape[m * p.layer[l].tape_columns + (first + i) * p.layer[l].out + j] = value;
      }
    };
    if (p.factored) {
      const Matrix<A> own = p.below(x, h, 0);
      const Table<A> of_query{&products.at(n + first, 0), n};
      const Factors<A> with_rows[1] = {{own, transposed(p.inputs_of(t)), p.in}};
      block_product(with_rows, rows, n, [&](int64_t i, int64_t j, A sum) { of_query.at(i, j) = sum + A(1); });
      __syncthreads();
      const Factors<A> terms[2] = {{own, transposed(p.first_weight(t)), p.in}, {of_query, change, n}};
      block_product(terms, rows, first_out,
                    [&](int64_t i, int64_t j, A sum) { activate(p, h, 0, i, j, first_bias(j) + sum, store); });
      __syncthreads();
    }
    forward_pass(p, theta, x, h, rows, store);
  }
  if (parameters == nullptr) return;
  if (p.factored) {
    const Matrix<A> weight = p.first_weight(t);
    const Factors<A> terms[1] = {{transposed<A>(change), p.below(x, h, 0), n}};
    block_product(terms, first_out, p.in + 1, [&](int64_t i, int64_t j, A sum) {
      parameters[t * p.packed + p.packed_at(0, i, j)] = sum + (j < p.in ? start + weight.at(i, j) : first_bias(i));
    });
  }
  for (int64_t l = p.lowest(); l < p.layers; ++l) {
    const Table<A> own = p.weight(theta, l);
    for_each_element(p.layer[l].out, p.width(l) + 1,
                     [&](int64_t i, int64_t j) { parameters[t * p.packed + p.packed_at(l, i, j)] = own.at(i, j); });
  }
}

// A sum over the threads of their parts of lam o g, in the gradient of layer l's rate.
template <class A>
__device__ __forceinline__ void add_rate_gradient(const MlpProblem<A>& p, const MlpGradients<A>& grads, int64_t t,
                                                  int64_t step, int64_t l, A part) {
  part = block_sum(part);
  const int64_t at = t * grads.rate_numbers + p.layer[l].rate_at + step * p.layer[l].rate_step;
  if (threadIdx.x == 0) grads.rates[at] -= part;
  __syncthreads();
}

// Minus lam o g in the rates' gradient, g = the gradient that a step has followed.
template <class A>
__device__ __forceinline__ void rate_gradients(const MlpProblem<A>& p, const MlpGradients<A>& grads, int64_t t,
                                               int64_t step, A* x, A* h, A* delta, A* lam) {
  A* const to = grads.rates + t * grads.rate_numbers;
  for (int64_t l = p.lowest(); l < p.layers; ++l) {
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
    add_rate_gradient(p, grads, t, step, l, part);
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
  // Where the first layer is factored: R, X lam^T, and in X's gradient S X.
  const int64_t first_out = p.layer[0].out;
  const Table<A> R{rdelta + block, p.first_stride()}, moved_sums{R.data + n * R.stride, R.stride};
  const Table<A> S{moved_sums.data + n * R.stride, n}, of_query{S.data + n * n, n};
  const Table<A> products{p.products_of(t), n}, change{p.change_of(t), first_out};
  A* const packed = grads.packed + t * p.packed;
  const Matrix<A> first_lam{packed, in, 1};
  const bool bad = __syncthreads_or(sees_bad_label(p.labels, t, C)) != 0;
  const A start = bad ? not_a_number<A>() : A(0);
  const auto ignore = [](int64_t, int64_t, int64_t, A) {};
  const auto lam_at = [&](int64_t l, int64_t i, int64_t j) -> A& {
    return l == 0 && p.factored ? packed[p.packed_at(0, i, j)] : p.weight(lam, l).at(i, j);
  };

  for (int64_t l = 0; l < p.layers; ++l) {
    for_each_element(p.layer[l].out, p.width(l) + 1, [&](int64_t i, int64_t j) {
      const bool given = grads.parameters.data != nullptr;
      lam_at(l, i, j) = given ? start + grads.parameters.at(t, 0, p.packed_at(l, i, j)) : start;
    });
  }
  // What becomes of the change of a sum of layer l.
  const auto to_moved = [&](int64_t l, int64_t i, int64_t j, A sum) {
    p.outputs(ra, l).at(i, j) = sum;
    if (l < last) p.outputs(rh, l).at(i, j) = sloped(p.activation, p.outputs(h, l).at(i, j), sum);
  };
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
        const Factors<A> terms[1] = {outer_product(p, x, h, delta, l, rows)};
        block_product(terms, p.layer[l].out, p.width(l) + 1,
                      [&](int64_t i, int64_t j, A sum) { lam_at(l, i, j) += sum; });
      }
      if (grads.query != nullptr) {
        const Matrix<A> own = p.outputs(delta, 0);
        if (p.factored) {
          const Factors<A> terms[1] = {{own, transposed<A>(change), first_out}};
          block_product(terms, rows, n, [&](int64_t i, int64_t j, A sum) { of_query.at(i, j) = sum; });
          __syncthreads();
        }
        const Matrix<A> weight = p.factored ? p.first_weight(t) : Matrix<A>(p.weight(theta, 0));
        const Factors<A> terms[2] = {{own, weight, first_out}, {of_query, p.inputs_of(t), p.factored ? n : 0}};
        block_product(terms, rows, in,
                      [&](int64_t i, int64_t j, A sum) { grads.query[(t * m + first + i) * in + j] = start + sum; });
      }
      __syncthreads();
    }
  }

  load_inputs(p, p.inputs, t, 0, n, x);
  if (p.factored) {
    __syncthreads();
    const Factors<A> terms[1] = {{p.below(x, h, 0), transposed(first_lam), in}};
    block_product(terms, n, first_out, [&](int64_t i, int64_t j, A sum) {
      moved_sums.at(i, j) = lam_at(0, j, in) + sum;
      R.at(i, j) = A(0);
    });
    for_each_element(n, n, [&](int64_t i, int64_t j) { S.at(i, j) = A(0); });
  }
  const bool nothing = p.first_order && grads.rates == nullptr;
  for (int64_t step = nothing ? -1 : p.steps - 1; step >= 0; --step) {
    const A* const tape = p.tape_of(t, step);
    load_activations(p, tape, n, p.layers, 0, n, h);
    load_activations(p, tape + n * p.tape_columns, n, p.layers, 0, n, delta);
    if (!p.first_order) {
      load_parameters(p, t, step, A(0), theta);
      for (int64_t l = p.lowest(); l < p.layers; ++l) {
        const Table<A> from = p.weight(lam, l), to = p.weight(along, l);
        const A rate = p.rate_of(g, step, l);
        for_each_element(p.layer[l].out, p.width(l) + 1, [&](int64_t i, int64_t j) {
          to.at(i, j) = (p.rates == StepRates::parameters ? p.rate_of_parameter(g, l, i, j) : rate) * from.at(i, j);
        });
      }
    }
    await_tape();
    __syncthreads();
    const Table<A> first_delta = p.outputs(delta, 0), first_moved = p.outputs(rdelta, 0);
    if (grads.rates != nullptr) {
      rate_gradients(p, grads, t, step, x, h, delta, lam);
      if (p.factored) {
        A part = A(0);
        for_each_element(n, first_out, [&](int64_t i, int64_t j) {
          part = std::fma(first_delta.at(i, j), moved_sums.at(i, j), part);
        });
        add_rate_gradient(p, grads, t, step, 0, part);
      }
    }
    if (p.first_order) {
      __syncthreads();
      continue;
    }
    // R of every activation and delta along rate o lam.
    const A first_rate = p.rate_of(g, step, 0);
    if (p.factored) {
      for_each_element(n, first_out,
                       [&](int64_t i, int64_t j) { to_moved(0, i, j, first_rate * moved_sums.at(i, j)); });
      __syncthreads();
    }
    for (int64_t l = p.lowest(); l < p.layers; ++l) {
      const Factors<A> terms[2] = {{p.below(x, h, l), transposed<A>(p.weight(along, l)), p.width(l) + 1},
                                   {p.below(x, rh, l), transposed<A>(p.weight(theta, l)), l == 0 ? 0 : p.width(l)}};
      block_product(terms, n, p.layer[l].out, [&](int64_t i, int64_t j, A sum) { to_moved(l, i, j, sum); });
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
    if (p.factored) {
      if (grads.inputs != nullptr) {
        const Factors<A> terms[2] = {{first_delta, transposed<A>(R), first_out},
                                     {R, transposed<A>(first_delta), first_out}};
        block_product(terms, n, n, [&](int64_t i, int64_t j, A sum) { S.at(i, j) -= first_rate * sum; });
        __syncthreads();
      }
      const Factors<A> terms[1] = {{products, first_moved, n}};
      block_product(terms, n, first_out, [&](int64_t i, int64_t j, A sum) {
        moved_sums.at(i, j) -= sum;
        R.at(i, j) -= first_moved.at(i, j);
      });
    } else if (grads.inputs != nullptr) {
      const Factors<A> terms[2] = {{first_delta, p.weight(along, 0), first_out},
                                   {first_moved, p.weight(theta, 0), first_out}};
      block_product(terms, n, in, [&](int64_t i, int64_t j, A sum) { grads.inputs[(t * n + i) * in + j] -= sum; });
    }
    for (int64_t l = p.lowest(); l < p.layers; ++l) {
      const Table<A> to = p.weight(lam, l);
      const Factors<A> terms[2] = {outer_product(p, x, h, rdelta, l, n),
                                   outer_product(p, x, rh, delta, l, l == 0 ? 0 : n)};
      block_product(terms, p.layer[l].out, p.width(l) + 1, [&](int64_t i, int64_t j, A sum) { to.at(i, j) -= sum; });
    }
    __syncthreads();
  }
  if (p.factored && !p.first_order) {
    __syncthreads();
    if (grads.inputs != nullptr) {
      const Factors<A> terms[3] = {
          {R, p.first_weight(t), first_out}, {S, p.below(x, h, 0), n}, {change, first_lam, first_out}};
      block_product(terms, n, in,
                    [&](int64_t i, int64_t j, A sum) { grads.inputs[(t * n + i) * in + j] = start + sum; });
      __syncthreads();
    }
    const Factors<A> terms[1] = {{transposed<A>(R), p.below(x, h, 0), n}};
    block_product(terms, first_out, in + 1, [&](int64_t i, int64_t j, A sum) { lam_at(0, i, j) += sum; });
  }
  for (int64_t l = p.lowest(); l < p.layers; ++l) {
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
