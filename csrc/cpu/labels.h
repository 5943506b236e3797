// Class numbers, checked.
#pragma once

#include <algorithm>
#include <vector>

#include "tensor.h"

namespace metafast {

// Class numbers [T, n] in rows.
struct Labels {
  Tensor tensor;
  const int64_t* labels;
  int64_t tasks;
  int64_t n;
  int64_t num_classes;

  Labels(const Tensor& any, const char* name, int64_t num_classes_)
      : tensor(dense(any)),
        labels(tensor.const_data_ptr<int64_t>()),
        tasks(any.size(0)),
        n(any.size(1)),
        num_classes(num_classes_) {
    const int64_t* const end = labels + tasks * n;
    const int64_t* const bad = std::find_if(labels, end, [&](int64_t y) { return y < 0 || y >= num_classes; });
    if (bad != end) fail(name, ": expected class numbers from 0 to ", num_classes - 1, ", got ", *bad);
  }

  const int64_t* of(int64_t t) const { return labels + t * n; }
};

// One over the number of rows of each class (0 for none).
template <class A>
struct Counts : Labels {
  std::vector<int64_t> count;    // [T, C]
  std::vector<A> inverse_count;  // [T, C]

  Counts(const Tensor& any, const char* name, int64_t num_classes_)
      : Labels(any, name, num_classes_), count(tasks * num_classes), inverse_count(tasks * num_classes) {
    for (int64_t t = 0; t < tasks; ++t) {
      for (int64_t i = 0; i < n; ++i) ++count[t * num_classes + of(t)[i]];
    }
    for (size_t k = 0; k < count.size(); ++k) inverse_count[k] = count[k] > 0 ? A(1) / static_cast<A>(count[k]) : A(0);
  }

  const A* inverse(int64_t t) const { return inverse_count.data() + t * num_classes; }
};

// The rows of each class in their order.
template <class A>
struct Classes : Counts<A> {
  std::vector<int64_t> order;    // [T, n]
  std::vector<int64_t> offsets;  // [T, C + 1]

  Classes(const Tensor& any, const char* name, int64_t num_classes_)
      : Counts<A>(any, name, num_classes_),
        order(this->tasks * this->n),
        offsets(this->tasks * (this->num_classes + 1)) {
    const int64_t C = this->num_classes;
    std::vector<int64_t> next(C);
    for (int64_t t = 0; t < this->tasks; ++t) {
      int64_t* first = offsets.data() + t * (C + 1);
      for (int64_t c = 0; c < C; ++c) {
        next[c] = first[c];
        first[c + 1] = first[c] + this->count[t * C + c];
      }
      for (int64_t i = 0; i < this->n; ++i) order[t * this->n + next[this->of(t)[i]]++] = i;
    }
  }

  // Row numbers class by class, and where each class begins among them.
  const int64_t* order_of(int64_t t) const { return order.data() + t * this->n; }
  const int64_t* offsets_of(int64_t t) const { return offsets.data() + t * (this->num_classes + 1); }
};

}  // namespace metafast
