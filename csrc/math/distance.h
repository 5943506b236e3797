// The metrics: what one pair of rows adds up over its features, and what that gives as value and derivatives.
// V is a number on a GPU and a vector of them on a CPU; A is a single accumulator.
#pragma once

#include <cmath>
#include <type_traits>

#include "math/host_device.h"

namespace metafast {

// The order is that of METRICS in metafast/distance.py.
enum class Metric : int { sqeuclidean = 0, euclidean = 1, cityblock = 2, cosine = 3 };

// The gradient of one distance D of rows x and y: dD/dx = w step_x + x_part x and dD/dy = w step_y + y_part y.
template <class A>
struct Slope {
  A w;
  A x_part;
  A y_part;
};

// What a metric knows of a pair: the sum over its features and, for kRows, the squared norms of both rows.
template <class A>
struct Pair {
  A sum;
  A x_square;
  A y_square;
};

struct SqEuclidean {
  static constexpr bool kRows = false;        // are the norms needed, and does the slope hold the rows themselves?
  static constexpr bool kSlopeOfSum = false;  // does the slope depend on the sum?
  template <class V>
  static METAFAST_HOST_DEVICE void add(V& sum, V x, V y) {
    const V difference = x - y;
    sum += difference * difference;
  }
  template <class V>
  static METAFAST_HOST_DEVICE V step_x(V x, V y) {
    return x - y;
  }
  template <class V>
  static METAFAST_HOST_DEVICE V step_y(V x, V y) {
    return y - x;
  }
  template <class A>
  static METAFAST_HOST_DEVICE A value(Pair<A> pair) {
    return pair.sum;
  }
  template <class A>
  static METAFAST_HOST_DEVICE Slope<A> slope(Pair<A>) {
    return {A(2), A(0), A(0)};
  }
};

struct Euclidean : SqEuclidean {
  static constexpr bool kSlopeOfSum = true;
  template <class A>
  static METAFAST_HOST_DEVICE A value(Pair<A> pair) {
    return std::sqrt(pair.sum);
  }
  // Derivative 0 where the distance is 0.
  template <class A>
  static METAFAST_HOST_DEVICE Slope<A> slope(Pair<A> pair) {
    return {pair.sum == A(0) ? A(0) : A(1) / std::sqrt(pair.sum), A(0), A(0)};
  }
};

template <class V>
METAFAST_HOST_DEVICE V magnitude(V value) {
  if constexpr (std::is_floating_point_v<V>) {
    return std::fabs(value);
  } else {
    return value < 0 ? -value : value;
  }
}

struct Cityblock {
  static constexpr bool kRows = false;
  static constexpr bool kSlopeOfSum = false;
  template <class V>
  static METAFAST_HOST_DEVICE void add(V& sum, V x, V y) {
    sum += magnitude(x - y);
  }
  template <class V>
  static METAFAST_HOST_DEVICE V step_x(V x, V y) {
    const V difference = x - y;
    const V one = V{} + 1;
    return x > y ? one : (x < y ? -one : difference);
  }
  template <class V>
  static METAFAST_HOST_DEVICE V step_y(V x, V y) {
    return -step_x(x, y);
  }
  template <class A>
  static METAFAST_HOST_DEVICE A value(Pair<A> pair) {
    return pair.sum;
  }
  template <class A>
  static METAFAST_HOST_DEVICE Slope<A> slope(Pair<A>) {
    return {A(1), A(0), A(0)};
  }
};

// The inner product, a part of the cosine.
struct Dot {
  // Fused for single numbers too, wherever the compiler stands: x . x and x . y of equal rows must round alike.
  template <class V>
  static METAFAST_HOST_DEVICE void add(V& sum, V x, V y) {
    if constexpr (std::is_floating_point_v<V>) {
      sum = std::fma(x, y, sum);
    } else {
      sum += x * y;
    }
  }
};

// The sum is x . y. Close directions are measured again by what is left of x without its share of y, whose rounding is
// small beside itself: 1 - cos = sin^2 / (1 + cos) with sin^2 = |x - (x.y / y.y) y|^2 / x.x
struct Cosine : Dot {
  static constexpr bool kRows = true;
  static constexpr bool kSlopeOfSum = true;
  template <class V>
  static METAFAST_HOST_DEVICE V step_x(V, V y) {
    return -y;
  }
  template <class V>
  static METAFAST_HOST_DEVICE V step_y(V x, V) {
    return -x;
  }
  template <class A>
  static METAFAST_HOST_DEVICE A length(A square) {
    const A norm = std::sqrt(square);
    return norm > A(1e-8) || norm != norm ? norm : A(1e-8);
  }
  template <class A>
  static METAFAST_HOST_DEVICE A similarity(Pair<A> pair) {
    return pair.sum / (length(pair.x_square) * length(pair.y_square));
  }
  template <class A>
  static METAFAST_HOST_DEVICE bool close(Pair<A> pair) {
    return similarity(pair) > A(0.5);
  }
  template <class A>
  static METAFAST_HOST_DEVICE A value(Pair<A> pair) {
    return A(1) - similarity(pair);
  }
  // residual = |x - (x.y / y.y) y|^2
  template <class A>
  static METAFAST_HOST_DEVICE A close_value(Pair<A> pair, A residual) {
    return residual / pair.x_square / (A(1) + similarity(pair));
  }
  // A clamped norm is a constant.
  template <class A>
  static METAFAST_HOST_DEVICE Slope<A> slope(Pair<A> pair) {
    const A x_length = length(pair.x_square), y_length = length(pair.y_square);
    const A w = A(1) / (x_length * y_length);
    const A x_part = x_length > A(1e-8) ? w * pair.sum / pair.x_square : A(0);
    const A y_part = y_length > A(1e-8) ? w * pair.sum / pair.y_square : A(0);
    return {w, x_part, y_part};
  }
};

}  // namespace metafast
