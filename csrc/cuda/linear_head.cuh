// The inner loop of a linear head on a GPU, in the two forms of cpu/linear_head_kernels.h. A block is one task; what is
// long, products and combinations of rows of features, goes to the kernels of rows.cuh. A label outside 0..C-1 makes all
// results of its task NaN; it is never used as an index.
#pragma once

#include "cuda/block_products.cuh"
#include "cuda/labels.cuh"
#include "cuda/rows.cuh"
#include "math/inner_loss.h"

namespace metafast::cuda {

// The rate of step t, class c and feature k of a task.
template <class A>
struct Rates {
  const A* data;  // null: the constant
  int64_t task_stride;
  int64_t step_stride;
  int64_t class_stride;
  int64_t feature_stride;
  A constant;

  __device__ __forceinline__ A at(int64_t task, int64_t t, int64_t c, int64_t k = 0) const {
    if (data == nullptr) return constant;
    return data[task * task_stride + t * step_stride + c * class_stride + k * feature_stride];
  }
};

// What both directions of both forms are told. Arrays of a task's rows are class-major, [C, n].
template <class A>
struct HeadLoop {
  int64_t n;
  int64_t C;
  int64_t steps;
  InnerLoss loss;
  bool first_order;
  A momentum;
  A decay;
  Labels labels;  // null: the targets
  const A* soft;  // [T, n, C]
  const A* bias;  // of a task, or null
  int64_t bias_stride;
  Rates<A> rates;

  METAFAST_HOST_DEVICE int64_t size() const { return C * n; }
};

// A part of working memory.
template <class A>
__device__ __forceinline__ A* take(A*& memory, int64_t count) {
  A* part = memory;
  memory += count;
  return part;
}

// targets [C, n] and totals [n], the sums of each row's targets.
template <class A>
__device__ __forceinline__ void load_targets(const HeadLoop<A>& loop, int64_t task, A* targets, A* totals) {
  for (int64_t i = threadIdx.x; i < loop.n; i += kThreads) {
    A total = A(0);
    const int64_t label = loop.soft == nullptr ? loop.labels.of(task)[i] : -1;
    for (int64_t c = 0; c < loop.C; ++c) {
      const A target = loop.soft == nullptr ? A(c == label) : loop.soft[(task * loop.n + i) * loop.C + c];
      targets[c * loop.n + i] = target;
      total += target;
    }
    totals[i] = total;
  }
}

// error [C, n] = dL/dlogits; logits become what the reverse sweep needs: their softmax, or they stay. A thread a row.
template <class A>
__device__ __forceinline__ void loss_gradient(const HeadLoop<A>& loop, const A* targets, const A* totals, A* logits,
                                              A* error) {
  const int64_t n = loop.n, C = loop.C;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    if (loop.loss == InnerLoss::mse) {
      const A share = A(2) / static_cast<A>(n * C);
      for (int64_t k = i; k < C * n; k += n) error[k] = (logits[k] - targets[k]) * share;
      continue;
    }
    A largest = -A(INFINITY), sum = A(0);
    for (int64_t k = i; k < C * n; k += n)
      largest = logits[k] > largest || logits[k] != logits[k] ? logits[k] : largest;
    for (int64_t k = i; k < C * n; k += n) {
      logits[k] = std::exp(logits[k] - largest);
      sum += logits[k];
    }
    const A inverse = A(1) / sum, share = A(1) / static_cast<A>(n);
    for (int64_t k = i; k < C * n; k += n) {
      logits[k] *= inverse;
      error[k] = (totals[i] * logits[k] - targets[k]) * share;
    }
  }
}

// What the gradient `error` for dL/dlogits gives the logits, in place of it, and the targets, added to theirs.
template <class A>
__device__ __forceinline__ void loss_curvature(const HeadLoop<A>& loop, const A* totals, const A* probability, A* error,
                                               A* targets_grad) {
  const int64_t n = loop.n, C = loop.C;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    if (loop.loss == InnerLoss::mse) {
      const A share = A(2) / static_cast<A>(n * C);
      for (int64_t k = i; k < C * n; k += n) {
        error[k] *= share;
        targets_grad[k] -= error[k];
      }
      continue;
    }
    A inner = A(0);
    for (int64_t k = i; k < C * n; k += n) inner = std::fma(probability[k], error[k], inner);
    const A share = A(1) / static_cast<A>(n), total = totals[i] * share;
    for (int64_t k = i; k < C * n; k += n) {
      const A rest = error[k] - inner;
      error[k] = total * probability[k] * rest;
      targets_grad[k] -= rest * share;
    }
  }
}

// What the steps on the Gram matrix leave; each step overwrites the last where nothing is kept.
template <class A>
struct SpanTape {
  A* probability;  // [K, C, n]: the softmax, or the logits of the squared error
  A* direction;    // [K, C, n]: U of the step's direction v W_0 + U^T X
  A* span;         // [K + 1, C, n]: N of the weight c W_0 + N^T X
  A* scale;        // [K + 1, C]: c
  A* momentum;     // [K, C]: v
  int64_t kept;    // 1, or 0 where nothing is
};

// Numbers of working memory for the forward steps, and for them with the reverse sweep.
METAFAST_HOST_DEVICE int64_t span_memory(int64_t n, int64_t C) { return n * n + 6 * C * n + n + 2 * C; }
METAFAST_HOST_DEVICE int64_t sweep_memory(int64_t n, int64_t C, int64_t steps) {
  return n * n + (3 * steps + 8) * C * n + n + (2 * steps + 3) * C;
}

// The steps: N_K and c_K at the end of the tape. Ends with a barrier.
template <class A>
__device__ __forceinline__ void head_steps(const HeadLoop<A>& loop, int64_t task, const A* gram, const A* first_logits,
                                           const A* targets, const A* totals, const SpanTape<A>& tape, A* error) {
  const int64_t size = loop.size(), n = loop.n, C = loop.C;
  for (int64_t k = threadIdx.x; k < size; k += kThreads) tape.span[k] = A(0);
  for (int64_t c = threadIdx.x; c < C; c += kThreads) tape.scale[c] = A(1);
  __syncthreads();
  for (int64_t t = 0; t < loop.steps; ++t) {
    const int64_t now = t * tape.kept, before = (t - 1) * tape.kept;
    A *span = tape.span + now * size, *next_span = span + tape.kept * size;
    A *scale = tape.scale + now * C, *next_scale = scale + tape.kept * C, *logits = tape.probability + now * size;
    A *direction = tape.direction + now * size, *momentum = tape.momentum + now * C;
    const A *last_direction = tape.direction + before * size, *last_momentum = tape.momentum + before * C;
    const Factors<A> of_span[1] = {{{span, n, 1}, {gram, n, 1}, t > 0 ? n : 0}};
    block_product(of_span, C, n, [&](int64_t c, int64_t i, A sum) {
      logits[c * n + i] = std::fma(scale[c], first_logits[c * n + i], sum);
    });
    __syncthreads();
    loss_gradient(loop, targets, totals, logits, error);
    __syncthreads();
    for_each_element(C, n, [&](int64_t c, int64_t i) {
      const int64_t k = c * n + i;
      const A rate = loop.rates.at(task, t, c), from = span[k];
      const A value = error[k] + loop.decay * from + (t > 0 ? loop.momentum * last_direction[k] : A(0));
      direction[k] = value;
      next_span[k] = from - rate * value;
    });
    for (int64_t c = threadIdx.x; c < C; c += kThreads) {
      const A from = scale[c], along = loop.decay * from + (t > 0 ? loop.momentum * last_momentum[c] : A(0));
      momentum[c] = along;
      next_scale[c] = from - loop.rates.at(task, t, c) * along;
    }
    __syncthreads();
  }
}

// What the tape holds between the directions [T, n + C, stride]: the Gram matrix, and below it Z_0 by classes.
template <class A>
struct HeadTape {
  A* data;
  int64_t stride;

  __device__ __forceinline__ A* of(int64_t task, int64_t n, int64_t C) const { return data + task * (n + C) * stride; }
};

// The loop on the Gram matrix: spans [T, C, n] = N_K, scales [T, C] = c_K, biases [T, C] where there is one.
template <class A>
__global__ void __launch_bounds__(kThreads)
    head_steps_kernel(HeadLoop<A> loop, Products<A> gram, Products<A> first_logits, HeadTape<A> tape,
                      A* __restrict__ spans, A* __restrict__ scales, A* __restrict__ biases, A* memory) {
  const int64_t task = blockIdx.x, n = loop.n, C = loop.C, size = loop.size();
  A* own = working_memory(memory, span_memory(n, C));
  A *own_gram = take(own, n * n), *own_logits = take(own, size), *targets = take(own, size), *totals = take(own, n);
  A* error = take(own, size);
  A *probability = take(own, size), *direction = take(own, size), *span = take(own, size);
  const SpanTape<A> last{probability, direction, span, take(own, C), take(own, C), 0};
  const bool bad = __syncthreads_or(loop.soft == nullptr && sees_bad_label(loop.labels, task, C)) != 0;
  A* saved = tape.of(task, n, C);
  for_each_element(n + C, tape.stride, [&](int64_t r, int64_t i) {
    A value = A(0);
    if (i < n && r < n) {
      value = gram.at(task, r, i) + (loop.bias == nullptr ? A(0) : A(1));
      own_gram[r * n + i] = value;
    } else if (i < n) {
      value = first_logits.at(task, i, r - n);
      if (loop.bias != nullptr) value += loop.bias[task * loop.bias_stride + r - n];
      own_logits[(r - n) * n + i] = value;
    }
    saved[r * tape.stride + i] = value;
  });
  load_targets(loop, task, targets, totals);
  __syncthreads();
  head_steps(loop, task, own_gram, own_logits, targets, totals, last, error);
  for (int64_t k = threadIdx.x; k < size; k += kThreads) spans[task * size + k] = bad ? not_a_number<A>() : span[k];
  for (int64_t c = warp_index(); c < C; c += kWarps) {
    A sum = A(0);
    for (int64_t i = lane_index(); i < n; i += kWarp) sum += span[c * n + i];
    sum = warp_sum(sum);
    if (lane_index() != 0) continue;
    scales[task * C + c] = bad ? not_a_number<A>() : last.scale[c];
    if (loop.bias == nullptr) continue;
    const A bias = std::fma(last.scale[c], loop.bias[task * loop.bias_stride + c], sum);
    biases[task * C + c] = bad ? not_a_number<A>() : bias;
  }
}

// Where a task's gradient of its rates [T, K or 1, C or 1] goes.
template <class A>
struct RateGradient {
  A* data;  // null: not wanted
  int64_t steps;
  int64_t classes;
};

// Of the gradients [K, C] of each step's and class's rate: the sums over what shares a rate, in a fixed order.
template <class A>
__device__ __forceinline__ void store_rate_gradient(const RateGradient<A>& to, const A* parts, int64_t task,
                                                    int64_t steps, int64_t C, bool bad) {
  for_each_element(to.steps, to.classes, [&](int64_t t, int64_t c) {
    A sum = A(0);
    for (int64_t step = to.steps == 1 ? 0 : t; step < (to.steps == 1 ? steps : t + 1); ++step) {
      for (int64_t k = to.classes == 1 ? 0 : c; k < (to.classes == 1 ? C : c + 1); ++k) sum += parts[step * C + k];
    }
    to.data[(task * to.steps + t) * to.classes + c] = bad ? not_a_number<A>() : sum;
  });
}

// What the reverse sweep gives of one task, by tasks: [T, C, n] but for the Gram matrix [T, n, n], the scales and biases
// [T, C], and the labels [T, n, C]. Null: not wanted.
template <class A>
struct SweepResults {
  A* spans;
  A* scales;
  A* logits_grad;
  A* gram_grad;
  A* bias_grad;
  RateGradient<A> rates_grad;
  A* labels_grad;
};

// The gradient for the last weight of a task and what it is multiplied with.
template <class A>
struct LastGradient {
  const A* logits;  // [T, m, C], or null
  int64_t m;
  const A* bias;            // [T, C], or null
  const A* weight;          // [T, C, d], made from the logits already
  WideRows<const A> first;  // the initial weight
  int64_t d;
};

// The gradient for the last bias of class c, by one warp.
template <class A>
__device__ __forceinline__ A last_bias_gradient(const LastGradient<A>& last, int64_t task, int64_t c, int64_t C) {
  A sum = A(0);
  for (int64_t i = lane_index(); last.logits != nullptr && i < last.m; i += kWarp) {
    sum += last.logits[(task * last.m + i) * C + c];
  }
  sum = warp_sum(sum);
  return last.bias == nullptr ? sum : sum + last.bias[task * C + c];
}

// The steps again, with everything kept, and their reverse sweep. span_products [T, n, C] = support . last.weight.
template <class A>
__global__ void __launch_bounds__(kThreads)
    head_sweep_kernel(HeadLoop<A> loop, Products<A> span_products, HeadTape<const A> tape, LastGradient<A> last,
                      SweepResults<A> to, A* memory) {
  const int64_t task = blockIdx.x, n = loop.n, C = loop.C, size = loop.size(), steps = loop.steps;
  A* own = working_memory(memory, sweep_memory(n, C, steps));
  A *gram = take(own, n * n), *first_logits = take(own, size), *targets = take(own, size), *totals = take(own, n);
  A *span_grad = take(own, size), *direction_grad = take(own, size), *curved = take(own, size);
  A *logits_grad = take(own, size), *targets_grad = take(own, size);
  A *scale_grad = take(own, C), *momentum_grad = take(own, C);
  A *probability = take(own, steps * size), *directions = take(own, steps * size);
  A *spans = take(own, (steps + 1) * size), *scales = take(own, (steps + 1) * C), *momenta = take(own, steps * C);
  const bool bad = __syncthreads_or(loop.soft == nullptr && sees_bad_label(loop.labels, task, C)) != 0;
  const A* saved = tape.of(task, n, C);
  for_each_element(n + C, n, [&](int64_t r, int64_t i) {
    const A value = saved[r * tape.stride + i];
    if (r < n) {
      gram[r * n + i] = value;
      return;
    }
    const int64_t k = (r - n) * n + i;
    first_logits[k] = value;
    direction_grad[k] = logits_grad[k] = targets_grad[k] = A(0);
  });
  load_targets(loop, task, targets, totals);
  // Here, each class belongs to a warp.
  for (int64_t c = warp_index(); c < C; c += kWarps) {
    const A bias = loop.bias == nullptr ? A(0) : last_bias_gradient(last, task, c, C);
    A sum = A(0);
    if (loop.decay != A(0)) {
      const A *a = last.weight + (task * C + c) * last.d, *b = last.first.row(task, c);
      for (int64_t k = lane_index(); k < last.d; k += kWarp) sum = std::fma(a[k], b[k], sum);
      sum = warp_sum(sum);
      if (loop.bias != nullptr) sum += bias * loop.bias[task * loop.bias_stride + c];
    }
    if (lane_index() == 0) scale_grad[c] = sum, momentum_grad[c] = A(0);
    for (int64_t i = lane_index(); i < n; i += kWarp) span_grad[c * n + i] = span_products.at(task, i, c) + bias;
  }
  __syncthreads();
  head_steps(loop, task, gram, first_logits, targets, totals,
             SpanTape<A>{probability, directions, spans, scales, momenta, 1}, curved);
  for (int64_t t = steps - 1; t >= 0; --t) {
    const A *direction = directions + t * size, *scale = scales + t * C, *momentum = momenta + t * C;
    A* error = probability + t * size;
    for (int64_t c = warp_index(); c < C; c += kWarps) {
      const A rate = loop.rates.at(task, t, c);
      A along = A(0);
      for (int64_t i = lane_index(); i < n; i += kWarp) {
        const int64_t k = c * n + i;
        along = std::fma(span_grad[k], direction[k], along);
        if (loop.first_order) continue;
        const A value = loop.momentum * direction_grad[k] - rate * span_grad[k];
        direction_grad[k] = curved[k] = value;
        span_grad[k] += loop.decay * value;
      }
      along = warp_sum(along);
      if (lane_index() != 0) continue;
      momenta[t * C + c] = -along - scale_grad[c] * momentum[c];
      if (loop.first_order) continue;
      momentum_grad[c] = loop.momentum * momentum_grad[c] - rate * scale_grad[c];
      scale_grad[c] += loop.decay * momentum_grad[c];
    }
    if (loop.first_order) continue;
    __syncthreads();
    loss_curvature(loop, totals, error, curved, targets_grad);
    __syncthreads();
    for (int64_t c = warp_index(); c < C; c += kWarps) {
      A along = A(0);
      for (int64_t i = lane_index(); i < n; i += kWarp) {
        const int64_t k = c * n + i;
        along = std::fma(curved[k], first_logits[k], along);
        logits_grad[k] = std::fma(curved[k], scale[c], logits_grad[k]);
        error[k] = curved[k];
      }
      along = warp_sum(along);
      if (lane_index() == 0 && loop.decay != A(0)) scale_grad[c] += along;
    }
    __syncthreads();
    const Factors<A> of_error[1] = {{{error, n, 1}, {gram, n, 1}, t > 0 ? n : 0}};
    block_product(of_error, C, n, [&](int64_t c, int64_t i, A sum) { span_grad[c * n + i] += sum; });
    __syncthreads();
  }
  __syncthreads();
  // Where a step's v stood is the gradient of its rate now.
  if (to.rates_grad.data != nullptr) store_rate_gradient(to.rates_grad, momenta, task, steps, C, bad);
  // Of a first-order loop the adapted weight is W_0 and a constant.
  const int64_t used = loop.first_order ? 0 : steps * C;
  const auto store = [&](A* results, int64_t k, A value) { results[k] = bad ? not_a_number<A>() : value; };
  const Factors<A> of_gram[2] = {{{probability, 1, n}, {spans, n, 1}, used},
                                 {{spans, 1, n}, {probability, n, 1}, used}};
  block_product(of_gram, n, n, [&](int64_t i, int64_t j, A sum) { store(to.gram_grad, (task * n + i) * n + j, sum); });
  for_each_element(C, n, [&](int64_t c, int64_t i) {
    const int64_t k = c * n + i;
    store(to.spans, task * size + k, loop.first_order ? A(0) : spans[steps * size + k]);
    store(to.logits_grad, task * size + k, logits_grad[k]);
    if (to.labels_grad != nullptr) to.labels_grad[(task * n + i) * C + c] = targets_grad[k];
  });
  for (int64_t c = warp_index(); c < C; c += kWarps) {
    const A scale = loop.first_order ? A(1) : scales[steps * C + c];
    A sum = A(0);
    for (int64_t i = lane_index(); i < n; i += kWarp) sum += logits_grad[c * n + i];
    sum = warp_sum(sum);
    const A bias = loop.bias == nullptr ? A(0) : last_bias_gradient(last, task, c, C);
    if (lane_index() != 0) continue;
    store(to.scales, task * C + c, scale);
    if (loop.bias != nullptr) store(to.bias_grad, task * C + c, std::fma(scale, bias, sum));
  }
}

// What the steps on the weights leave of a task.
template <class A>
struct WeightTape {
  A* probability;     // [K, C, n]
  A* error;           // [K, C, n]: dL/dlogits
  A* direction;       // [K, C, d]
  A* weight;          // [K + 1, C, d]
  A* bias_direction;  // [K, C]
  A* bias;            // [K + 1, C], null: none
  int64_t kept;
};

// Beside those of the head, what the loop on the weights is told.
template <class A>
struct WeightLoop {
  HeadLoop<A> head;
  WideRows<const A> support;
  WideRows<const A> first;  // the initial weight
  Rates<A> bias_rates;
  int64_t d;
};

METAFAST_HOST_DEVICE int64_t weight_memory(int64_t n, int64_t C, int64_t d) { return 3 * C * n + n + C * d + C; }
METAFAST_HOST_DEVICE int64_t reverse_memory(int64_t n, int64_t C, int64_t d, int64_t steps) {
  return (2 * steps + 3) * C * n + n + (2 * steps + 2) * C * d + (4 * steps + 3) * C;
}

// The steps from the initial weight to the last on the tape. Ends with a barrier.
template <class A>
__device__ __forceinline__ void weight_steps(const WeightLoop<A>& loop, int64_t task, const A* targets, const A* totals,
                                             const WeightTape<A>& tape, bool bad) {
  const HeadLoop<A>& head = loop.head;
  const int64_t n = head.n, C = head.C, d = loop.d, size = head.size();
  for_each_element(C, d, [&](int64_t c, int64_t k) {
    tape.weight[c * d + k] = bad ? not_a_number<A>() : loop.first.row(task, c)[k];
  });
  for (int64_t c = threadIdx.x; tape.bias != nullptr && c < C; c += kThreads) {
    tape.bias[c] = bad ? not_a_number<A>() : head.bias[task * head.bias_stride + c];
  }
  __syncthreads();
  const Matrix<A> x{loop.support.row(task, 0), loop.support.row_stride, 1};
  for (int64_t t = 0; t < head.steps; ++t) {
    const int64_t now = t * tape.kept, before = (t - 1) * tape.kept;
    A *logits = tape.probability + now * size, *error = tape.error + now * size;
    const A *weight = tape.weight + now * C * d, *bias = tape.bias + now * C;
    A *next = tape.weight + (now + tape.kept) * C * d, *direction = tape.direction + now * C * d;
    const A *last_direction = tape.direction + before * C * d, *last_bias = tape.bias_direction + before * C;
    const Factors<A> of_weight{x, {weight, 1, d}, d};
    warp_products(of_weight, n, C,
                  [&](int64_t i, int64_t c, A sum) { logits[c * n + i] = tape.bias == nullptr ? sum : sum + bias[c]; });
    __syncthreads();
    loss_gradient(head, targets, totals, logits, error);
    __syncthreads();
    const Factors<A> of_error[1] = {{{error, n, 1}, x, n}};
    block_product(of_error, C, d, [&](int64_t c, int64_t k, A sum) {
      const int64_t at = c * d + k;
      const A from = weight[at], value = sum + head.decay * from + (t > 0 ? head.momentum * last_direction[at] : A(0));
      direction[at] = value;
      next[at] = from - head.rates.at(task, t, c, k) * value;
    });
    for (int64_t c = warp_index(); tape.bias != nullptr && c < C; c += kWarps) {
      A sum = A(0);
      for (int64_t i = lane_index(); i < n; i += kWarp) sum += error[c * n + i];
      sum = warp_sum(sum);
      if (lane_index() != 0) continue;
      const A from = bias[c], value = sum + head.decay * from + (t > 0 ? head.momentum * last_bias[c] : A(0));
      tape.bias_direction[now * C + c] = value;
      tape.bias[(now + tape.kept) * C + c] = from - loop.bias_rates.at(task, t, c) * value;
    }
    __syncthreads();
  }
}

// The loop on the weights: weights [T, C, d] = W_K, biases [T, C] = b_K where there is one.
template <class A>
__global__ void __launch_bounds__(kThreads)
    weight_steps_kernel(WeightLoop<A> loop, A* __restrict__ weights, A* __restrict__ biases, A* memory) {
  const HeadLoop<A>& head = loop.head;
  const int64_t task = blockIdx.x, n = head.n, C = head.C, d = loop.d;
  A* own = working_memory(memory, weight_memory(n, C, d));
  A *targets = take(own, C * n), *totals = take(own, n), *logits = take(own, C * n), *error = take(own, C * n);
  A *direction = take(own, C * d), *bias_direction = take(own, C);
  const bool bad = __syncthreads_or(head.soft == nullptr && sees_bad_label(head.labels, task, C)) != 0;
  load_targets(head, task, targets, totals);
  weight_steps(loop, task, targets, totals,
               WeightTape<A>{logits, error, direction, weights + task * C * d, bias_direction,
                             head.bias == nullptr ? nullptr : biases + task * C, 0},
               bad);
}

// What the reverse sweep on the weights gives, by tasks: the gradient of the initial weight in the place of that of the
// last one, and the rates' where the weight or the bias has one for each feature [T, K or 1, C or 1, d].
template <class A>
struct ReverseResults {
  A* features_grad;  // [T, n, d]
  A* weight_grad;    // [T, C, d]
  A* bias_grad;      // [T, C], null: no bias
  RateGradient<A> rates_grad;
  RateGradient<A> feature_rates_grad;
  RateGradient<A> bias_rates_grad;
  A* labels_grad;  // [T, n, C], or null
};

template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    weight_reverse_kernel(WeightLoop<A> loop, LastGradient<A> last, ReverseResults<A> to, A* memory) {
  const HeadLoop<A>& head = loop.head;
  const int64_t task = blockIdx.x, n = head.n, C = head.C, d = loop.d, size = head.size(), steps = head.steps;
  A* own = working_memory(memory, reverse_memory(n, C, d, steps));
  A *targets = take(own, size), *totals = take(own, n), *targets_grad = take(own, size), *curved = take(own, size);
  A *along = take(own, C * d), *bias_along = take(own, C), *bias_grad = take(own, C);
  A *rate_parts = take(own, steps * C), *bias_rate_parts = take(own, steps * C);
  A *probability = take(own, steps * size), *errors = take(own, steps * size);
  A *directions = take(own, steps * C * d), *weights = take(own, (steps + 1) * C * d);
  A *bias_directions = take(own, steps * C), *biases = take(own, (steps + 1) * C);
  A *weight_grad = to.weight_grad + task * C * d, *features_grad = to.features_grad + task * n * d;
  const bool bad = __syncthreads_or(head.soft == nullptr && sees_bad_label(head.labels, task, C)) != 0;
  const bool has_bias = head.bias != nullptr;
  const Matrix<A> x{loop.support.row(task, 0), loop.support.row_stride, 1};
  load_targets(head, task, targets, totals);
  for (int64_t k = threadIdx.x; k < size; k += kThreads) targets_grad[k] = A(0);
  for_each_element(n, d, [&](int64_t i, int64_t k) { features_grad[i * d + k] = bad ? not_a_number<A>() : A(0); });
  const int64_t step_stride = to.feature_rates_grad.steps == 1 ? 0 : to.feature_rates_grad.classes * d;
  const int64_t class_stride = to.feature_rates_grad.classes == 1 ? 0 : d;
  A* feature_rates = to.feature_rates_grad.data;
  if (feature_rates != nullptr) {
    feature_rates += task * to.feature_rates_grad.steps * to.feature_rates_grad.classes * d;
    for_each_element(to.feature_rates_grad.steps * to.feature_rates_grad.classes, d,
                     [&](int64_t r, int64_t k) { feature_rates[r * d + k] = A(0); });
  }
  for (int64_t c = warp_index(); has_bias && c < C; c += kWarps) {
    const A value = last_bias_gradient(last, task, c, C);
    if (lane_index() == 0) bias_grad[c] = value;
  }
  __syncthreads();
  weight_steps(loop, task, targets, totals,
               WeightTape<A>{probability, errors, directions, weights, bias_directions, has_bias ? biases : nullptr, 1},
               bad);
  for (int64_t t = steps - 1; t >= 0; --t) {
    const A *weight = weights + t * C * d, *direction = directions + t * C * d, *error = errors + t * size;
    for (int64_t c = warp_index(); c < C; c += kWarps) {
      A sum = A(0);
      for (int64_t k = lane_index(); k < d; k += kWarp) {
        sum = std::fma(weight_grad[c * d + k], direction[c * d + k], sum);
      }
      sum = warp_sum(sum);
      if (lane_index() != 0) continue;
      const A of_bias = has_bias ? bias_grad[c] * bias_directions[t * C + c] : A(0);
      // A bias without rates of its own shares the weight's.
      rate_parts[t * C + c] = to.bias_rates_grad.data == nullptr ? -sum - of_bias : -sum;
      bias_rate_parts[t * C + c] = -of_bias;
      if (!has_bias || head.first_order) continue;
      bias_along[c] =
          (t + 1 < steps ? head.momentum * bias_along[c] : A(0)) - loop.bias_rates.at(task, t, c) * bias_grad[c];
      bias_grad[c] += head.decay * bias_along[c];
    }
    __syncthreads();
    // A thread has all classes of its features: they may share a rate.
    for (int64_t k = threadIdx.x; k < d; k += kThreads) {
      for (int64_t c = 0; c < C; ++c) {
        const int64_t at = c * d + k;
        const A grad = weight_grad[at];
        if (feature_rates != nullptr) feature_rates[t * step_stride + c * class_stride + k] -= grad * direction[at];
        if (head.first_order) continue;
        const A value = (t + 1 < steps ? head.momentum * along[at] : A(0)) - head.rates.at(task, t, c, k) * grad;
        along[at] = value;
        weight_grad[at] = grad + head.decay * value;
      }
    }
    __syncthreads();
    if (head.first_order) continue;
    const Factors<A> of_along{x, {along, 1, d}, d};
    warp_products(of_along, n, C,
                  [&](int64_t i, int64_t c, A sum) { curved[c * n + i] = has_bias ? sum + bias_along[c] : sum; });
    __syncthreads();
    loss_curvature(head, totals, probability + t * size, curved, targets_grad);
    __syncthreads();
    const Factors<A> to_features[2] = {{{error, 1, n}, {along, d, 1}, C}, {{curved, 1, n}, {weight, d, 1}, C}};
    block_product(to_features, n, d, [&](int64_t i, int64_t k, A sum) { features_grad[i * d + k] += sum; });
    const Factors<A> to_weight[1] = {{{curved, n, 1}, x, n}};
    block_product(to_weight, C, d, [&](int64_t c, int64_t k, A sum) { weight_grad[c * d + k] += sum; });
    for (int64_t c = warp_index(); has_bias && c < C; c += kWarps) {
      A sum = A(0);
      for (int64_t i = lane_index(); i < n; i += kWarp) sum += curved[c * n + i];
      sum = warp_sum(sum);
      if (lane_index() == 0) bias_grad[c] += sum;
    }
    __syncthreads();
  }
  __syncthreads();
  if (to.rates_grad.data != nullptr) store_rate_gradient(to.rates_grad, rate_parts, task, steps, C, bad);
  if (to.bias_rates_grad.data != nullptr) store_rate_gradient(to.bias_rates_grad, bias_rate_parts, task, steps, C, bad);
  for (int64_t c = threadIdx.x; has_bias && c < C; c += kThreads) {
    to.bias_grad[task * C + c] = bad ? not_a_number<A>() : bias_grad[c];
  }
  for (int64_t k = threadIdx.x; bad && k < C * d; k += kThreads) weight_grad[k] = not_a_number<A>();
  if (to.labels_grad == nullptr) return;
  for_each_element(C, n,
                   [&](int64_t c, int64_t i) { to.labels_grad[(task * n + i) * C + c] = targets_grad[c * n + i]; });
}

template <class A>
void launch_head_steps(const HeadLoop<A>& loop, const Products<A>& gram, const Products<A>& first_logits,
                       HeadTape<A> tape, A* spans, A* scales, A* biases, A* memory, unsigned shared_bytes,
                       Stream stream) {
  METAFAST_LAUNCH((head_steps_kernel<A>), grid_size(gram.tasks), kThreads, shared_bytes, stream, loop, gram,
                  first_logits, tape, spans, scales, biases, memory);
}

template <class A>
void launch_head_sweep(const HeadLoop<A>& loop, const Products<A>& span_products, HeadTape<const A> tape,
                       const LastGradient<A>& last, const SweepResults<A>& to, A* memory, unsigned shared_bytes,
                       Stream stream) {
  METAFAST_LAUNCH((head_sweep_kernel<A>), grid_size(span_products.tasks), kThreads, shared_bytes, stream, loop,
                  span_products, tape, last, to, memory);
}

template <class A>
void launch_weight_steps(const WeightLoop<A>& loop, A* weights, A* biases, int64_t tasks, A* memory,
                         unsigned shared_bytes, Stream stream) {
  METAFAST_LAUNCH((weight_steps_kernel<A>), grid_size(tasks), kThreads, shared_bytes, stream, loop, weights, biases,
                  memory);
}

template <class A>
void launch_weight_reverse(const WeightLoop<A>& loop, const LastGradient<A>& last, const ReverseResults<A>& to,
                           int64_t tasks, A* memory, unsigned shared_bytes, Stream stream) {
  METAFAST_LAUNCH((weight_reverse_kernel<A>), grid_size(tasks), kThreads, shared_bytes, stream, loop, last, to, memory);
}

}  // namespace metafast::cuda
