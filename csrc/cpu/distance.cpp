// Pairwise distances on the CPU: threads over tasks and rows (value, jvp) or over tasks and features (vjp).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <tuple>
#include <type_traits>

#define METAFAST_KERNELS "cpu/distance_kernels.h"
#include "cpu/for_each_isa.h"
#include "cpu/parallel.h"

namespace metafast {
namespace {

using torch::stable::new_empty;

template <class Body>
void dispatch_metric(int64_t metric, const Body& body) {
  switch (static_cast<Metric>(metric)) {
    case Metric::sqeuclidean:
      return body(Tag<SqEuclidean>{});
    case Metric::euclidean:
      return body(Tag<Euclidean>{});
    case Metric::cityblock:
      return body(Tag<Cityblock>{});
    case Metric::cosine:
      return body(Tag<Cosine>{});
  }
  fail("metric: expected 0 to 3, got ", metric);
}

void check_pair(const Tensor& x, const Tensor& y) {
  if (x.dim() != 3) fail("x: expected [T, n, d], got ", shape_text(x));
  check_shape(y, "y", {x.size(0), y.dim() > 1 ? y.size(1) : 0, x.size(2)});
  check_dtype(y, "y", x.scalar_type());
}

constexpr int64_t kRowBlock = 16;

Tensor pairwise_distance(const Tensor& x_any, const Tensor& y_any, int64_t metric) {
  check_pair(x_any, y_any);
  const Tensor x = contiguous_rows(x_any), y = contiguous_rows(y_any);
  const int64_t T = x.size(0), n = x.size(1), m = y.size(1), d = x.size(2);
  Tensor out = new_empty(x, {T, n, m});
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    dispatch_metric(metric, [&](auto functor) {
      using M = typename decltype(functor)::type;
      auto* kernel = METAFAST_KERNEL(distance_value<S, S, M>);
      const auto rows_x = input_rows<S>(x), rows_y = input_rows<S>(y);
      const auto rows_out = output_rows<S>(out);
      const int64_t blocks = (n + kRowBlock - 1) / kRowBlock;
      parallel(T * blocks, kRowBlock * m * d, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t first = item % blocks * kRowBlock;
          kernel(rows_x, rows_y, rows_out, item / blocks, first, std::min(first + kRowBlock, n), m, d);
        }
      });
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> pairwise_distance_vjp(const Tensor& grad_any, const Tensor& x_any, const Tensor& y_any,
                                                 int64_t metric) {
  check_pair(x_any, y_any);
  const Tensor grad = contiguous_rows(grad_any), x = contiguous_rows(x_any), y = contiguous_rows(y_any);
  const int64_t T = x.size(0), n = x.size(1), m = y.size(1), d = x.size(2);
  check_shape(grad, "grad", {T, n, m});
  check_dtype(grad, "grad", x.scalar_type());
  Tensor grad_x = new_empty(x, {T, n, d}), grad_y = new_empty(y, {T, m, d});
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    using A = accumulate_t<S>;
    dispatch_metric(metric, [&](auto functor) {
      using M = typename decltype(functor)::type;
      using D = std::integral_constant<bool, std::is_same_v<M, Cityblock>>;
      auto* slopes = METAFAST_KERNEL(distance_slopes<S, M>);
      auto* spread = D::value ? METAFAST_KERNEL(distance_spread<S, S, Sign>)
                              : METAFAST_KERNEL(distance_spread<S, S, Difference>);
      const auto rows_grad = input_rows<S>(grad), rows_x = input_rows<S>(x), rows_y = input_rows<S>(y);
      const auto rows_grad_x = output_rows<S>(grad_x), rows_grad_y = output_rows<S>(grad_y);
      // Per task: weight [n, m], x_part [n], y_part [m].
      const int64_t size = n * m + n + m;
      const std::unique_ptr<A[]> weights(new A[T * size]);
      parallel(T, n * m * (M::kNeedsSums ? d : 1), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          A* weight = weights.get() + t * size;
          slopes(rows_grad, rows_x, rows_y, t, n, m, d, weight, weight + n * m, weight + n * m + n);
        }
      });
      const Chunks chunks(T, d, 2 * m);
      parallel(T * chunks.count, 3 * n * m * chunks.size, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<A[]> scratch(new A[2 * m * chunks.size]);
        for (int64_t item = begin; item < end; ++item) {
          const int64_t t = item / chunks.count, first = item % chunks.count * chunks.size;
          const A* weight = weights.get() + t * size;
          spread(weight, weight + n * m, weight + n * m + n, rows_x, rows_y, rows_grad_x, rows_grad_y, t, n, m, first,
                 std::min(first + chunks.size, d), chunks.size, scratch.get());
        }
      });
    });
  });
  return {grad_x, grad_y};
}

Tensor pairwise_distance_jvp(const Tensor& x_any, const Tensor& y_any, const Tensor& tangent_x_any,
                             const Tensor& tangent_y_any, int64_t metric) {
  check_pair(x_any, y_any);
  const Tensor x = contiguous_rows(x_any), y = contiguous_rows(y_any);
  const Tensor tangent_x = contiguous_rows(tangent_x_any), tangent_y = contiguous_rows(tangent_y_any);
  const int64_t T = x.size(0), n = x.size(1), m = y.size(1), d = x.size(2);
  check_shape(tangent_x, "tangent_x", {T, n, d});
  check_shape(tangent_y, "tangent_y", {T, m, d});
  check_dtype(tangent_x, "tangent_x", x.scalar_type());
  check_dtype(tangent_y, "tangent_y", x.scalar_type());
  Tensor out = new_empty(x, {T, n, m});
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    dispatch_metric(metric, [&](auto functor) {
      using M = typename decltype(functor)::type;
      auto* kernel = METAFAST_KERNEL(distance_tangent<S, M>);
      const auto rows_x = input_rows<S>(x), rows_y = input_rows<S>(y);
      const auto rows_u = input_rows<S>(tangent_x), rows_v = input_rows<S>(tangent_y);
      const auto rows_out = output_rows<S>(out);
      parallel(T * n, 4 * m * d, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          kernel(rows_x, rows_y, rows_u, rows_v, rows_out, item / n, item % n, m, d);
        }
      });
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
