// The sums of all pairs of rows, the squared norms of the rows and what follows from them, in torch's memory.
#pragma once

#include "cuda/distance.cuh"
#include "cuda/tensors.cuh"

namespace metafast::cuda {

// Of the rows of x [T, n, d] and y [T, m, d], contiguous each.
template <class S, class M>
class PairSums {
 public:
  using A = accumulate_t<S>;

  PairSums(const Tensor& x, const Tensor& y, Stream stream)
      : PairSums(x, y, distance_plan<S>(x.size(0), x.size(1), y.size(1), x.size(2)), stream) {
    launch_distance_sums<S, M>(input_wide<S>(x), input_wide<S>(y), sums_.data(), nullptr, tasks_, n_, m_, d_, plan_,
                               stream);
  }

  // For a kernel that fills data() itself, a chunk being one slab.
  static PairSums by_slabs(const Tensor& x, const Tensor& y, Stream stream) {
    return PairSums(x, y, DistancePlan{0, 0, slabs_of<S>(x.size(2)), 1}, stream);
  }

  A* data() const { return sums_.data(); }  // [chunks, T, n, m]
  int64_t chunks() const { return plan_.chunks; }

  // totals [T, n, m] receives the sums over all features, and out the distances, where given.
  template <class Out>
  void finish(A* totals, Out* out) {
    if constexpr (M::kRows) {
      launch_row_squares<S>(input_wide<S>(x_), x_squares_.data(), tasks_, n_, d_, plan_.chunk_slabs, stream_);
      launch_row_squares<S>(input_wide<S>(y_), y_squares_.data(), tasks_, m_, d_, plan_.chunk_slabs, stream_);
    }
    launch_distance_finish<S, M, Out>(input_wide<S>(x_), input_wide<S>(y_), sums_.data(), x_squares(), y_squares(),
                                      totals, out, tasks_, n_, m_, d_, plan_.chunks, stream_);
  }

  // The squared norms of the rows where the metric needs them, after finish.
  const A* x_squares() const { return x_squares_.data(); }
  const A* y_squares() const { return y_squares_.data(); }

 private:
  PairSums(const Tensor& x, const Tensor& y, const DistancePlan& plan, Stream stream)
      : x_(x),
        y_(y),
        tasks_(x.size(0)),
        n_(x.size(1)),
        m_(y.size(1)),
        d_(x.size(2)),
        plan_(plan),
        stream_(stream),
        sums_(x, plan.chunks * tasks_ * n_ * m_),
        x_squares_(x, M::kRows ? tasks_ * n_ : 0),
        y_squares_(x, M::kRows ? tasks_ * m_ : 0) {}

  Tensor x_, y_;
  int64_t tasks_, n_, m_, d_;
  DistancePlan plan_;
  Stream stream_;
  Scratch<A> sums_, x_squares_, y_squares_;
};

// What derivatives are made from: sums and squared norms where the metric's slope depends on them, and the distances if
// they are wanted; null otherwise.
template <class S, class M>
class PairTotals {
 public:
  using A = accumulate_t<S>;

  PairTotals(const Tensor& x, const Tensor& y, bool want_distances, Stream stream)
      : totals_(x, M::kSlopeOfSum ? x.size(0) * x.size(1) * y.size(1) : 0),
        distances_(x, want_distances ? x.size(0) * x.size(1) * y.size(1) : 0) {
    if (!M::kSlopeOfSum && !want_distances) return;
    sums_.emplace(x, y, stream);
    sums_->template finish<A>(totals_.data(), distances_.data());
    x_squares_ = sums_->x_squares();
    y_squares_ = sums_->y_squares();
  }

  const A* totals() const { return totals_.data(); }
  const A* distances() const { return distances_.data(); }
  const A* x_squares() const { return x_squares_; }
  const A* y_squares() const { return y_squares_; }

 private:
  Scratch<A> totals_, distances_;
  std::optional<PairSums<S, M>> sums_;
  const A *x_squares_ = nullptr, *y_squares_ = nullptr;
};

}  // namespace metafast::cuda
