// The inner loop of a linear head, in two forms. Read once for each instruction set: no guard.
//
// On the Gram matrix of the support rows: the weight of step t is c_t W_0 + N_t^T X, so the loop is one over N [n, C] and c [C]:
//   Z_t = c_t Z_0 + (X X^T + 1) N_t,   E_t = dL/dZ_t,   U_t = momentum U_{t-1} + E_t + decay N_t,
//   v_t = momentum v_{t-1} + decay c_t,   N_{t+1} = N_t - rate U_t,   c_{t+1} = c_t - rate v_t

#include "cpu/row_kernels.h"

// The sum of a class's rows.
template <class A>
METAFAST_HOST_DEVICE A sum_of_rows(const A* rows, int64_t stride) {
  vector_t<A> total = {};
  for (int64_t i = 0; i < stride; i += kWidth<A>) total += load<A>(rows + i);
  return sum<A>(total);
}

// error [C, stride] = dL/dlogits; logits become what the reverse sweep needs: their softmax, or they stay.
template <class A>
METAFAST_HOST_DEVICE void loss_gradient(const InnerLoop<A>& loop, A* logits, A* error, A* scratch) {
  const A* targets = loop.targets;
  if (loop.loss == InnerLoss::mse) {
    const A share = A(2) / static_cast<A>(loop.n * loop.C);
    for (int64_t k = 0; k < loop.size(); k += kWidth<A>) {
      store<A>(error + k, (load<A>(logits + k) - load<A>(targets + k)) * share);
    }
    return;
  }
  A *maxima = scratch, *sums = scratch + loop.stride;
  if (loop.C > 0) softmax_columns(logits, loop.stride, loop.C, maxima, sums);
  const A share = A(1) / static_cast<A>(loop.n);
  for (int64_t i = 0; i < loop.stride; i += kWidth<A>) {
    const vector_t<A> inverse = A(1) / load<A>(sums + i), total = load<A>(loop.totals + i);
    for (int64_t k = i; k < loop.size(); k += loop.stride) {
      const vector_t<A> probability = load<A>(logits + k) * inverse;
      store<A>(logits + k, probability);
      store<A>(error + k, (total * probability - load<A>(targets + k)) * share);
    }
  }
}

// What the gradient `error` for dL/dlogits gives the logits, in place of it, and the targets, added to theirs.
template <class A>
METAFAST_HOST_DEVICE void loss_curvature(const InnerLoop<A>& loop, const A* probability, A* error, A* targets_grad) {
  if (loop.loss == InnerLoss::mse) {
    const A share = A(2) / static_cast<A>(loop.n * loop.C);
    for (int64_t k = 0; k < loop.size(); k += kWidth<A>) {
      const vector_t<A> value = load<A>(error + k) * share;
      store<A>(error + k, value);
      store<A>(targets_grad + k, load<A>(targets_grad + k) - value);
    }
    return;
  }
  const A share = A(1) / static_cast<A>(loop.n);
  for (int64_t i = 0; i < loop.stride; i += kWidth<A>) {
    vector_t<A> inner = {};
    for (int64_t k = i; k < loop.size(); k += loop.stride) inner += load<A>(probability + k) * load<A>(error + k);
    const vector_t<A> total = load<A>(loop.totals + i) * share;
    for (int64_t k = i; k < loop.size(); k += loop.stride) {
      const vector_t<A> rest = load<A>(error + k) - inner;
      store<A>(error + k, total * load<A>(probability + k) * rest);
      store<A>(targets_grad + k, load<A>(targets_grad + k) - rest * share);
    }
  }
}

// The steps: N_K and c_K at the end of the tape. first_logits is Z_0; gram [n, stride]. scratch holds (C + 2) stride numbers.
template <class A>
void head_steps(const InnerLoop<A>& loop, const A* gram, const A* first_logits, Rates<A> rates, SpanTape<A> tape,
                A* scratch) {
  const int64_t size = loop.size(), C = loop.C;
  for (int64_t k = 0; k < size; ++k) tape.span[k] = A(0);
  for (int64_t c = 0; c < C; ++c) tape.scale[c] = A(1);
  for (int64_t t = 0; t < loop.steps; ++t) {
    const int64_t now = t * tape.kept, before = (t - 1) * tape.kept;
    A *span = tape.span + now * size, *next_span = span + tape.kept * size;
    A *scale = tape.scale + now * C, *next_scale = scale + tape.kept * C, *logits = tape.probability + now * size;
    A *error = scratch, *direction = tape.direction + now * size, *momentum = tape.momentum + now * C;
    const A *last_direction = tape.direction + before * size, *last_momentum = tape.momentum + before * C;
    if (t == 0) {
      for (int64_t k = 0; k < size; ++k) logits[k] = first_logits[k];
    } else {
      const Terms<A> terms[1] = {{span, loop.stride, 1, gram, loop.stride, loop.n}};
      combine_rows<A, 1>(terms, A(1), first_logits, loop.stride, scale, logits, loop.stride, C, 0, loop.stride);
    }
    loss_gradient(loop, logits, error, scratch + size);
    for (int64_t c = 0; c < C; ++c) {
      momentum[c] = (t > 0 ? loop.momentum * last_momentum[c] : A(0)) + loop.decay * scale[c];
      const A rate = rates.at(t, c);
      for (int64_t k = c * loop.stride; k < (c + 1) * loop.stride; k += kWidth<A>) {
        vector_t<A> value = load<A>(error + k) + load<A>(span + k) * loop.decay;
        if (t > 0) value += load<A>(last_direction + k) * loop.momentum;
        store<A>(direction + k, value);
        store<A>(next_span + k, load<A>(span + k) - value * rate);
      }
      next_scale[c] = scale[c] - rate * momentum[c];
    }
  }
}

// The reverse sweep. span_grad [C, stride] = dL/dN_K and scale_grad [C] = dL/dc_K become those of step 0 (of no use);
// logits_grad [C, stride] receives dL/dZ_0, gram_grad [n, stride] dL/dGram plus its transpose, rates_grad [K, C] and
// targets_grad [C, stride] theirs. scratch holds (2 stride + 1) C numbers.
template <class A>
void head_reverse(const InnerLoop<A>& loop, const A* gram, const A* first_logits, Rates<A> rates, SpanTape<A> tape,
                  A* span_grad, A* scale_grad, A* logits_grad, A* gram_grad, A* rates_grad, A* targets_grad,
                  A* scratch) {
  const int64_t size = loop.size(), C = loop.C, stride = loop.stride;
  A *direction_grad = scratch, *curved = scratch + size, *momentum_grad = curved + size;
  for (int64_t k = 0; k < size; ++k) direction_grad[k] = logits_grad[k] = targets_grad[k] = A(0);
  for (int64_t c = 0; c < C; ++c) momentum_grad[c] = A(0);
  for (int64_t t = loop.steps - 1; t >= 0; --t) {
    const A* direction = tape.direction + t * size;
    const A *scale = tape.scale + t * C, *momentum = tape.momentum + t * C;
    A* error = tape.probability + t * size;
    for (int64_t c = 0; c < C; ++c) {
      const int64_t begin = c * stride, end = begin + stride;
      vector_t<A> along = {};
      for (int64_t k = begin; k < end; k += kWidth<A>) along += load<A>(span_grad + k) * load<A>(direction + k);
      rates_grad[t * C + c] = -sum<A>(along) - scale_grad[c] * momentum[c];
      if (loop.first_order) continue;
      const A rate = rates.at(t, c);
      momentum_grad[c] = loop.momentum * momentum_grad[c] - rate * scale_grad[c];
      scale_grad[c] += loop.decay * momentum_grad[c];
      for (int64_t k = begin; k < end; k += kWidth<A>) {
        const vector_t<A> value = load<A>(direction_grad + k) * loop.momentum - load<A>(span_grad + k) * rate;
        store<A>(direction_grad + k, value);
        store<A>(span_grad + k, load<A>(span_grad + k) + value * loop.decay);
      }
    }
    if (loop.first_order) continue;
    for (int64_t k = 0; k < size; ++k) curved[k] = direction_grad[k];
    loss_curvature(loop, error, curved, targets_grad);
    for (int64_t c = 0; c < C; ++c) {
      vector_t<A> along = {};
      for (int64_t k = c * stride; k < (c + 1) * stride; k += kWidth<A>) {
        const vector_t<A> value = load<A>(curved + k);
        along += value * load<A>(first_logits + k);
        store<A>(logits_grad + k, load<A>(logits_grad + k) + value * scale[c]);
        store<A>(error + k, value);
      }
      if (loop.decay != A(0)) scale_grad[c] += sum<A>(along);
    }
    if (t > 0) {
      const Terms<A> terms[1] = {{error, stride, 1, gram, stride, loop.n}};
      combine_rows<A, 1>(terms, A(1), span_grad, stride, nullptr, span_grad, stride, C, 0, stride);
    }
  }
  if (loop.first_order) {
    for (int64_t k = 0; k < loop.n * stride; ++k) gram_grad[k] = A(0);
    return;
  }
  const A *to_logits = tape.probability, *spans = tape.span;
  const Terms<A> terms[2] = {{to_logits, 1, stride, spans, stride, loop.steps * C},
                             {spans, 1, stride, to_logits, stride, loop.steps * C}};
  combine_rows<A, 2>(terms, A(1), nullptr, 0, nullptr, gram_grad, stride, loop.n, 0, stride);
}

// On the weights: W_K and b_K at the end of the tape, W_0 and b_0 at its beginning (bias null: none). x holds the support
// rows of one task. scratch holds 2 stride + C numbers.
template <class A>
void weight_steps(const InnerLoop<A>& loop, Rows<const A> x, int64_t d, Rates<A> rates, Rates<A> bias_rates,
                  WeightTape<A> tape, A* scratch) {
  const int64_t size = loop.size(), C = loop.C;
  A* momentum = scratch + 2 * loop.stride;
  for (int64_t c = 0; c < C; ++c) momentum[c] = loop.momentum;
  for (int64_t t = 0; t < loop.steps; ++t) {
    const int64_t now = t * tape.kept, before = (t - 1) * tape.kept;
    A *logits = tape.probability + now * size, *error = tape.error + now * size;
    A *weight = tape.weight + now * C * d, *direction = tape.direction + now * C * d;
    for (int64_t k = 0; k < size; ++k) logits[k] = A(0);
    row_products<A>(x, {weight, 0, d}, 0, 0, 0, loop.n, C, d, A(1), A(0),
                    tape.bias == nullptr ? nullptr : tape.bias + now * C, logits, 1, loop.stride);
    loss_gradient(loop, logits, error, scratch);
    const Terms<A> terms[1] = {{error, loop.stride, 1, x.data, x.row_stride, loop.n}};
    combine_rows<A, 1>(terms, A(1), t > 0 ? tape.direction + before * C * d : nullptr, d, momentum, direction, d, C, 0,
                       d);
    for (int64_t c = 0; c < C; ++c) {
      A *from = weight + c * d, *along = direction + c * d, *to = from + tape.kept * C * d;
      for (int64_t k = 0; k < d; ++k) {
        along[k] += loop.decay * from[k];
        to[k] = from[k] - rates.at(t, c, k) * along[k];
      }
      if (tape.bias == nullptr) continue;
      A value = sum_of_rows(error + c * loop.stride, loop.stride);
      if (t > 0) value += loop.momentum * tape.bias_direction[before * C + c];
      A* bias = tape.bias + now * C + c;
      value += loop.decay * *bias;
      tape.bias_direction[now * C + c] = value;
      bias[tape.kept * C] = *bias - bias_rates.at(t, c) * value;
    }
  }
}

// The reverse sweep. weight_grad [C, d] and bias_grad [C] come as dL/dW_K and dL/db_K and leave as those of step 0;
// features_grad [n, d] and targets_grad [C, stride] are set; the gradients of the rates, laid out as these are, are added
// up. Null: no bias, no gradient wanted. scratch holds C (d + 1 + stride) numbers.
template <class A>
void weight_reverse(const InnerLoop<A>& loop, Rows<const A> x, int64_t d, Rates<A> rates, Rates<A> bias_rates,
                    WeightTape<A> tape, A* weight_grad, A* bias_grad, Rows<A> features_grad, A* rates_grad,
                    A* bias_rates_grad, A* targets_grad, A* scratch) {
  const int64_t size = loop.size(), C = loop.C, stride = loop.stride;
  A *curved = scratch, *along = curved + size, *bias_along = along + C * d;
  for (int64_t k = 0; k < size; ++k) targets_grad[k] = A(0);
  for (int64_t k = 0; k < C * (d + 1); ++k) along[k] = A(0);
  for (int64_t i = 0; i < loop.n; ++i) {
    for (int64_t k = 0; k < d; ++k) features_grad.row(0, i)[k] = A(0);
  }
  for (int64_t t = loop.steps - 1; t >= 0; --t) {
    const A *weight = tape.weight + t * C * d, *error = tape.error + t * size;
    for (int64_t c = 0; c < C; ++c) {
      const A* direction = tape.direction + (t * C + c) * d;
      A* grad = weight_grad + c * d;
      if (rates_grad != nullptr) {
        A* to = rates_grad + t * rates.step_stride + c * rates.class_stride;
        A total = A(0);
        for (int64_t k = 0; k < d; ++k) {
          const A part = -grad[k] * direction[k];
          if (rates.feature_stride == 0) {
            total += part;
          } else {
            to[k * rates.feature_stride] += part;
          }
        }
        if (rates.feature_stride == 0) *to += total;
      }
      if (bias_rates_grad != nullptr && bias_grad != nullptr) {
        bias_rates_grad[t * bias_rates.step_stride + c * bias_rates.class_stride] -=
            bias_grad[c] * tape.bias_direction[t * C + c];
      }
      if (loop.first_order) continue;
      for (int64_t k = 0; k < d; ++k) {
        along[c * d + k] = loop.momentum * along[c * d + k] - rates.at(t, c, k) * grad[k];
        grad[k] += loop.decay * along[c * d + k];
      }
      if (bias_grad == nullptr) continue;
      bias_along[c] = loop.momentum * bias_along[c] - bias_rates.at(t, c) * bias_grad[c];
      bias_grad[c] += loop.decay * bias_along[c];
    }
    if (loop.first_order) continue;
    for (int64_t k = 0; k < size; ++k) curved[k] = A(0);
    row_products<A>(x, {along, 0, d}, 0, 0, 0, loop.n, C, d, A(1), A(0), bias_grad == nullptr ? nullptr : bias_along,
                    curved, 1, stride);
    loss_curvature(loop, tape.probability + t * size, curved, targets_grad);
    const Terms<A> to_features[2] = {{error, 1, stride, along, d, C}, {curved, 1, stride, weight, d, C}};
    combine_rows<A, 2>(to_features, A(1), features_grad.data, features_grad.row_stride, nullptr, features_grad.data,
                       features_grad.row_stride, loop.n, 0, d);
    const Terms<A> to_weight[1] = {{curved, stride, 1, x.data, x.row_stride, loop.n}};
    combine_rows<A, 1>(to_weight, A(1), weight_grad, d, nullptr, weight_grad, d, C, 0, d);
    if (bias_grad == nullptr) continue;
    for (int64_t c = 0; c < C; ++c) bias_grad[c] += sum_of_rows(curved + c * stride, stride);
  }
}
