// Pairwise distances on a GPU: checks, memory and the order of the launches.
#include "cuda/distance.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "arguments.h"
#include "cuda/pair_sums.cuh"

namespace metafast::cuda {

METAFAST_ALL_DISTANCE_LAUNCHERS()

}  // namespace metafast::cuda

namespace metafast {
namespace {

using torch::stable::new_empty;

Tensor pairwise_distance(const Tensor& x_any, const Tensor& y_any, int64_t metric) {
  cuda::check_device(x_any, "x");
  check_pair(x_any, y_any);
  const auto guard = cuda::device_guard(x_any);
  const Tensor x = contiguous_rows(x_any), y = contiguous_rows(y_any);
  const int64_t T = x.size(0), n = x.size(1), m = y.size(1), d = x.size(2);
  Tensor out = new_empty(x, {T, n, m});
  if (T * n * m == 0) return out;
  const auto stream = cuda::current_stream(x);
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    dispatch_metric(metric, [&](auto functor) {
      using M = typename decltype(functor)::type;
      S* to = out.mutable_data_ptr<S>();
      if constexpr (!M::kRows) {
        const auto plan = cuda::distance_plan<S>(T, n, m, d);
        if (plan.chunks == 1) {
          return cuda::launch_distance_sums<S, M>(cuda::input_wide<S>(x), cuda::input_wide<S>(y), nullptr, to, T, n, m,
                                                  d, plan, stream);
        }
      }
      cuda::PairSums<S, M>(x, y, stream).template finish<S>(nullptr, to);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> pairwise_distance_vjp(const Tensor& grad, const Tensor& x_any, const Tensor& y_any,
                                                 int64_t metric) {
  cuda::check_device(x_any, "x");
  check_pair(x_any, y_any);
  check_pair_grad(grad, x_any, y_any);
  const auto guard = cuda::device_guard(x_any);
  const Tensor x = contiguous_rows(x_any), y = contiguous_rows(y_any);
  const int64_t T = x.size(0), n = x.size(1), m = y.size(1), d = x.size(2);
  Tensor grad_x = new_empty(x, {T, n, d}), grad_y = new_empty(y, {T, m, d});
  const auto stream = cuda::current_stream(x);
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    dispatch_metric(metric, [&](auto functor) {
      using M = typename decltype(functor)::type;
      const auto rows_x = cuda::input_wide<S>(x), rows_y = cuda::input_wide<S>(y);
      const cuda::PairTotals<S, M> pairs(x, y, false, stream);
      const S* g = grad.const_data_ptr<S>();
      const int64_t batch = grad.stride(0), row = grad.stride(1), column = grad.stride(2);
      cuda::launch_distance_vjp<S, M, cuda::Side::x, S>(g, batch, row, column, pairs.totals(), pairs.x_squares(),
                                                        pairs.y_squares(), rows_x, rows_y, cuda::output_wide<S>(grad_x),
                                                        T, n, m, d, stream);
      cuda::launch_distance_vjp<S, M, cuda::Side::y, S>(g, batch, column, row, pairs.totals(), pairs.y_squares(),
                                                        pairs.x_squares(), rows_y, rows_x, cuda::output_wide<S>(grad_y),
                                                        T, m, n, d, stream);
    });
  });
  return {grad_x, grad_y};
}

Tensor pairwise_distance_jvp(const Tensor& x_any, const Tensor& y_any, const Tensor& tangent_x_any,
                             const Tensor& tangent_y_any, int64_t metric) {
  cuda::check_device(x_any, "x");
  check_pair(x_any, y_any);
  check_pair_tangents(tangent_x_any, tangent_y_any, x_any, y_any);
  const auto guard = cuda::device_guard(x_any);
  const Tensor x = contiguous_rows(x_any), y = contiguous_rows(y_any);
  const Tensor tangent_x = contiguous_rows(tangent_x_any), tangent_y = contiguous_rows(tangent_y_any);
  const int64_t T = x.size(0), n = x.size(1), m = y.size(1), d = x.size(2);
  Tensor out = new_empty(x, {T, n, m});
  if (T * n * m == 0) return out;
  const auto stream = cuda::current_stream(x);
  dispatch_floating(x.scalar_type(), "x", [&](auto dtype) {
    using S = typename decltype(dtype)::type;
    using A = accumulate_t<S>;
    dispatch_metric(metric, [&](auto functor) {
      using M = typename decltype(functor)::type;
      const auto rows_x = cuda::input_wide<S>(x), rows_y = cuda::input_wide<S>(y);
      const cuda::Scratch<A> x_squares(x, M::kRows ? T * n : 0), y_squares(x, M::kRows ? T * m : 0);
      if constexpr (M::kRows) {
        const int64_t one_chunk = cuda::slabs_of<S>(d);
        cuda::launch_row_squares<S>(rows_x, x_squares.data(), T, n, d, one_chunk, stream);
        cuda::launch_row_squares<S>(rows_y, y_squares.data(), T, m, d, one_chunk, stream);
      }
      cuda::launch_distance_jvp<S, M>(rows_x, rows_y, cuda::input_wide<S>(tangent_x), cuda::input_wide<S>(tangent_y),
                                      x_squares.data(), y_squares.data(), out.mutable_data_ptr<S>(), T, n, m, d,
                                      stream);
    });
  });
  return out;
}

}  // namespace

METAFAST_CUDA_LIBRARY(m) {
  m.impl("pairwise_distance", TORCH_BOX(&pairwise_distance));
  m.impl("pairwise_distance_vjp", TORCH_BOX(&pairwise_distance_vjp));
  m.impl("pairwise_distance_jvp", TORCH_BOX(&pairwise_distance_jvp));
}

}  // namespace metafast
