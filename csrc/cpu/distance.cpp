// Pairwise distances on the CPU: threads over tasks and rows (value, jvp) or over tasks and features (vjp).
#include "cpu/distance.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "arguments.h"

#define METAFAST_KERNELS "cpu/distance_kernels.h"
#include "cpu/for_each_isa.h"

namespace metafast {
namespace {

constexpr int64_t kRowBlock = 16;

Tensor pairwise_distance(const Tensor& x_any, const Tensor& y_any, int64_t metric) {
  check_cpu(x_any, "x");
  check_pair(x_any, y_any);
  const Tensor x = contiguous_rows(x_any), y = contiguous_rows(y_any);
  const int64_t T = x.size(0), n = x.size(1), m = y.size(1), d = x.size(2);
  Tensor out = empty(x, {T, n, m});
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    dispatch_metric(metric, [&](auto functor) {
      using M = typename decltype(functor)::type;
      auto* kernel = METAFAST_KERNEL(distance_value<S, M>);
      const auto rows_x = input_rows<S>(x), rows_y = input_rows<S>(y);
      const auto rows_out = output_rows<S>(out);
      const Squares<M, S> x_squares(T, n), y_squares(T, m);
      auto* row_squares = METAFAST_KERNEL(row_squares<S>);
      const auto values = [&](int64_t t, int64_t block) {
        const int64_t first = block * kRowBlock, last = std::min(first + kRowBlock, n);
        kernel(rows_x, rows_y, x_squares.of(t), y_squares.of(t), rows_out, t, first, last, m, d);
      };
      parallel_stages(T, x_squares.stage(rows_x, n, d, row_squares), y_squares.stage(rows_y, m, d, row_squares),
                      Stage{(n + kRowBlock - 1) / kRowBlock, kRowBlock * m * d, values});
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> pairwise_distance_vjp(const Tensor& grad_any, const Tensor& x_any, const Tensor& y_any,
                                                 int64_t metric) {
  check_cpu(x_any, "x");
  check_pair(x_any, y_any);
  check_pair_grad(grad_any, x_any, y_any);
  const Tensor grad = contiguous_rows(grad_any), x = contiguous_rows(x_any), y = contiguous_rows(y_any);
  const int64_t T = x.size(0), n = x.size(1), m = y.size(1), d = x.size(2);
  Tensor grad_x = empty(x, {T, n, d}), grad_y = empty(y, {T, m, d});
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    using A = accumulate_t<S>;
    dispatch_metric(metric, [&](auto functor) {
      using M = typename decltype(functor)::type;
      auto* slopes = METAFAST_KERNEL(distance_slopes<S, M>);
      auto* spread = METAFAST_KERNEL(distance_spread<S, M>);
      const auto rows_grad = input_rows<S>(grad), rows_x = input_rows<S>(x), rows_y = input_rows<S>(y);
      const auto rows_grad_x = output_rows<S>(grad_x), rows_grad_y = output_rows<S>(grad_y);
      const Squares<M, S> x_squares(T, n), y_squares(T, m);
      auto* row_squares = METAFAST_KERNEL(row_squares<S>);
      const PerRow<A> weight(T, n * m), x_part(T, n), y_part(T, m);
      const auto weigh = [&](int64_t t, int64_t) {
        slopes(rows_grad, 1, rows_x, rows_y, x_squares.of(t), y_squares.of(t), t, n, m, d, weight.of(t), n,
               x_part.of(t), y_part.of(t));
      };
      const Chunks chunks(T, d, 3 * m);
      const auto gradients = [&](int64_t t, int64_t chunk) {
        const Scratch<A> scratch(3 * m * chunks.size);
        const int64_t first = chunk * chunks.size, last = std::min(first + chunks.size, d);
        spread(weight.of(t), n, x_part.of(t), y_part.of(t), rows_x, rows_y, rows_grad_x, rows_grad_y, t, n, m, first,
               last, chunks.size, scratch.get());
      };
      parallel_stages(T, x_squares.stage(rows_x, n, d, row_squares), y_squares.stage(rows_y, m, d, row_squares),
                      Stage{1, n * m * (M::kSlopeOfSum ? d : 1), weigh},
                      Stage{chunks.count, 3 * n * m * chunks.size, gradients});
    });
  });
  return {grad_x, grad_y};
}

Tensor pairwise_distance_jvp(const Tensor& x_any, const Tensor& y_any, const Tensor& tangent_x_any,
                             const Tensor& tangent_y_any, int64_t metric) {
  check_cpu(x_any, "x");
  check_pair(x_any, y_any);
  check_pair_tangents(tangent_x_any, tangent_y_any, x_any, y_any);
  const Tensor x = contiguous_rows(x_any), y = contiguous_rows(y_any);
  const Tensor tangent_x = contiguous_rows(tangent_x_any), tangent_y = contiguous_rows(tangent_y_any);
  const int64_t T = x.size(0), n = x.size(1), m = y.size(1), d = x.size(2);
  Tensor out = empty(x, {T, n, m});
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    dispatch_metric(metric, [&](auto functor) {
      using M = typename decltype(functor)::type;
      auto* kernel = METAFAST_KERNEL(distance_tangent<S, M>);
      const auto rows_x = input_rows<S>(x), rows_y = input_rows<S>(y);
      const auto rows_u = input_rows<S>(tangent_x), rows_v = input_rows<S>(tangent_y);
      const auto rows_out = output_rows<S>(out);
      const Squares<M, S> x_squares(T, n), y_squares(T, m);
      auto* row_squares = METAFAST_KERNEL(row_squares<S>);
      const auto tangents = [&](int64_t t, int64_t i) {
        kernel(rows_x, rows_y, x_squares.of(t), y_squares.of(t), rows_u, rows_v, rows_out, t, i, m, d);
      };
      parallel_stages(T, x_squares.stage(rows_x, n, d, row_squares), y_squares.stage(rows_y, m, d, row_squares),
                      Stage{n, 4 * m * d, tangents});
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, m) {
  m.impl("pairwise_distance", TORCH_BOX(&pairwise_distance));
  m.impl("pairwise_distance_vjp", TORCH_BOX(&pairwise_distance_vjp));
  m.impl("pairwise_distance_jvp", TORCH_BOX(&pairwise_distance_jvp));
}

}  // namespace metafast
