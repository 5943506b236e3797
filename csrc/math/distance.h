// The metrics: what one pair of rows adds up over its features, and what that gives as value and derivatives.
// V is a number on a GPU and a vector of them on a CPU; A is a single accumulator.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define METAFAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define METAFAST_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace metafast {

// The order is that of METRICS in metafast/distance.py.
enum class Metric : int { sqeuclidean = 0, euclidean = 1, cityblock = 2, cosine = 3 };

// The gradient of one distance D: dD/dx = w (x - y) + x_part x and dD/dy = w (y - x) + y_part y.
template <class A>
struct Slope {
  A w;
  A x_part;
  A y_part;
};

struct SqEuclidean {
  static constexpr int kSums = 1;
  static constexpr bool kNeedsSums = false;  // does the slope depend on the sums?
  template <class V>
  static METAFAST_HOST_DEVICE void add(V (&sums)[kSums], V x, V y) {
    const V difference = x - y;
    sums[0] += difference * difference;
  }
  template <class A>
  static METAFAST_HOST_DEVICE A value(const A (&sums)[kSums]) {
    return sums[0];
  }
  template <class A>
  static METAFAST_HOST_DEVICE Slope<A> slope(const A (&)[kSums]) {
    return {A(2), A(0), A(0)};
  }
};

struct Euclidean {
  static constexpr int kSums = 1;
  static constexpr bool kNeedsSums = true;
  template <class V>
  static METAFAST_HOST_DEVICE void add(V (&sums)[kSums], V x, V y) {
    SqEuclidean::add(sums, x, y);
  }
  template <class A>
  static METAFAST_HOST_DEVICE A value(const A (&sums)[kSums]) {
    return std::sqrt(sums[0]);
  }
  // Derivative 0 where the distance is 0.
  template <class A>
  static METAFAST_HOST_DEVICE Slope<A> slope(const A (&sums)[kSums]) {
    return {sums[0] == A(0) ? A(0) : A(1) / std::sqrt(sums[0]), A(0), A(0)};
  }
};

// Its gradient is w sign(x - y), which the kernels apply in place of w (x - y).
struct Cityblock {
  static constexpr int kSums = 1;
  static constexpr bool kNeedsSums = false;
  template <class V>
  static METAFAST_HOST_DEVICE void add(V (&sums)[kSums], V x, V y) {
    const V difference = x - y;
    sums[0] += difference < 0 ? -difference : difference;
  }
  template <class A>
  static METAFAST_HOST_DEVICE A value(const A (&sums)[kSums]) {
    return sums[0];
  }
  template <class A>
  static METAFAST_HOST_DEVICE Slope<A> slope(const A (&)[kSums]) {
    return {A(1), A(0), A(0)};
  }
};

// 1 - cos = (|x - y|^2 - (|x| - |y|)^2) / (2 |x| |y|), which does not cancel for close rows.
struct Cosine {
  static constexpr int kSums = 5;
  static constexpr bool kNeedsSums = true;
  template <class V>
  static METAFAST_HOST_DEVICE void add(V (&sums)[kSums], V x, V y) {
    const V difference = x - y;
    sums[0] += difference * difference;
    sums[1] += difference * x;
    sums[2] += difference * y;
    sums[3] += x * x;
    sums[4] += y * y;
  }
  template <class A>
  static METAFAST_HOST_DEVICE A clamp_norm(A norm) {
    return norm > A(1e-8) || norm != norm ? norm : A(1e-8);
  }
  template <class A>
  static METAFAST_HOST_DEVICE A value(const A (&sums)[kSums]) {
    const A x_norm = std::sqrt(sums[3]), y_norm = std::sqrt(sums[4]);
    const A x_length = clamp_norm(x_norm), y_length = clamp_norm(y_norm);
    if (x_length == x_norm && y_length == y_norm) {
      const A gap = (sums[1] + sums[2]) / (x_norm + y_norm);
      const A twice = sums[0] - gap * gap;
      return (twice < A(0) ? A(0) : twice) / (A(2) * x_norm * y_norm);
    }
    return A(1) - (sums[3] - sums[1]) / (x_length * y_length);
  }
  template <class A>
  static METAFAST_HOST_DEVICE Slope<A> slope(const A (&sums)[kSums]) {
    const A x_norm = std::sqrt(sums[3]), y_norm = std::sqrt(sums[4]);
    const A x_length = clamp_norm(x_norm), y_length = clamp_norm(y_norm);
    const A w = A(1) / (x_length * y_length);
    // A clamped norm is a constant, and the row is not projected.
    const A x_part = x_length == x_norm ? -sums[1] / sums[3] : A(-1);
    const A y_part = y_length == y_norm ? sums[2] / sums[4] : A(-1);
    return {w, w * x_part, w * y_part};
  }
};

// What the slope's w multiplies.
struct Difference {
  template <class V>
  static METAFAST_HOST_DEVICE V of(V x, V y) {
    return x - y;
  }
};

struct Sign {
  template <class V>
  static METAFAST_HOST_DEVICE V of(V x, V y) {
    const V difference = x - y;
    const V one = V{} + 1;
    return difference > 0 ? one : (difference < 0 ? -one : difference);
  }
};

}  // namespace metafast
