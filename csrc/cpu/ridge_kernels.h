// Ridge regression of one task. Read once for each instruction set: no guard.

#include "cpu/row_kernels.h"

// The upper factor U of a = U^T U in the place of the upper half of a, whose lower half is 0. Rows have `stride` entries,
// whole vectors. From the first pivot that is not positive on the rows are NaN.
template <class A>
void cholesky(A* a, int64_t n, int64_t stride) {
  constexpr int64_t W = kWidth<A>, kPanel = 16, kGroup = 5;
  for (int64_t panel = 0; panel < n; panel += kPanel) {
    const int64_t last = panel + kPanel < n ? panel + kPanel : n;
    for (int64_t k = panel; k < last; ++k) {
      A* row = a + k * stride;
      const A pivot = row[k] > A(0) ? std::sqrt(row[k]) : A(NAN);
      const A inverse = A(1) / pivot;
      for (int64_t j = k / W * W; j < stride; j += W) store<A>(row + j, load<A>(row + j) * inverse);
      row[k] = pivot;
      for (int64_t i = k + 1; i < last; ++i) {
        A* to = a + i * stride;
        const A factor = row[i];
        for (int64_t j = i / W * W; j < stride; j += W) store<A>(to + j, load<A>(to + j) - load<A>(row + j) * factor);
        // What the vector reached left of the diagonal.
        for (int64_t j = i / W * W; j < i; ++j) to[j] = A(0);
      }
    }
    for (int64_t i = last; i < n; i += kGroup) {
      const int64_t rows = n - i < kGroup ? n - i : kGroup, begin = i / W * W;
      const Terms<A> terms[1] = {{a + panel * stride + i, 1, stride, a + panel * stride, stride, last - panel}};
      A* to = a + i * stride;
      combine_rows<A, 1>(terms, A(-1), to, stride, nullptr, to, stride, rows, begin, stride);
      for (int64_t r = i; r < i + rows; ++r) {
        for (int64_t j = begin; j < r; ++j) a[r * stride + j] = A(0);
      }
    }
  }
}

// The rows of b [n, classes] become those of (U^T U)^-1 b; `classes` is a number of whole vectors.
template <class A>
void cholesky_solve(const A* u, int64_t n, int64_t stride, A* b, int64_t classes) {
  using V = vector_t<A>;
  for (int64_t c = 0; c < classes; c += kWidth<A>, b += kWidth<A>) {
    for (int64_t k = 0; k < n; ++k) {
      const A* row = u + k * stride;
      const V value = load<A>(b + k * classes) * (A(1) / row[k]);
      store<A>(b + k * classes, value);
      for (int64_t j = k + 1; j < n; ++j) store<A>(b + j * classes, load<A>(b + j * classes) - value * row[j]);
    }
    for (int64_t k = n - 1; k >= 0; --k) {
      const A* row = u + k * stride;
      // Sums side by side: an addition waits for the one before.
      V part[4] = {};
      int64_t j = k + 1;
      for (; j + 4 <= n; j += 4) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) part[r] += load<A>(b + (j + r) * classes) * row[j + r];
      }
      for (; j < n; ++j) part[0] += load<A>(b + j * classes) * row[j];
      const V value = load<A>(b + k * classes) - ((part[0] + part[1]) + (part[2] + part[3]));
      store<A>(b + k * classes, value * (A(1) / row[k]));
    }
  }
}
