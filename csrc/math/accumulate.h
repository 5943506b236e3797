// The storage types, and what sums of each are kept in.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace metafast {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

}  // namespace metafast
