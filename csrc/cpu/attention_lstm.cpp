// The attention LSTM of matching networks on the CPU: threads over tasks and query rows.
#include "cpu/attention_lstm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "arguments.h"
#include "cpu/distance.h"

#define METAFAST_KERNELS "cpu/attention_lstm_kernels.h"
#include "cpu/for_each_isa.h"

namespace metafast {
namespace {

constexpr int64_t kMostRows = 60;
constexpr int64_t kTileRows = 5;  // of combine_rows
constexpr int64_t kColumns = 256;

// Every block of rows reads all weights in each step: as few of them as there are threads, where rows stay in the cache.
int64_t rows_of_block(int64_t tasks, int64_t m) {
  const int64_t threads = torch::stable::get_num_threads(), each = (tasks * m + threads - 1) / threads;
  return std::clamp((each + kTileRows - 1) / kTileRows * kTileRows, kTileRows, kMostRows);
}

Tensor attention_lstm(const Tensor& support_any, const Tensor& query_any, const Tensor& weight_any,
                      const Tensor& bias_any, const Tensor& hidden_any, const Tensor& cell_any, int64_t steps) {
  check_cpu(support_any, "support");
  check_attention_lstm(support_any, query_any, weight_any, bias_any, hidden_any, cell_any, steps);
  const Tensor support = contiguous_rows(support_any), query = dense(query_any), weight = dense(weight_any);
  const Tensor bias = dense(bias_any), hidden = dense(hidden_any), cell = dense(cell_any);
  const int64_t T = query.size(0), n = support.size(1), m = query.size(1), d = query.size(2);
  const int64_t wide = 4 * d;
  Tensor out = empty(query, {T, m, d});
  dispatch_full(query.scalar_type(), "query", [&](auto dtype) {
    using A = typename decltype(dtype)::type;
    auto* turned = METAFAST_KERNEL(turned_rows<A>);
    auto* combine = METAFAST_KERNEL(combine_rows<A, 1>);
    auto* read = METAFAST_KERNEL(attention_lstm_rows<A>);
    constexpr int64_t kVectorNumbers = 16;  // of the widest vectors
    const int64_t stride = (n + kVectorNumbers - 1) / kVectorNumbers * kVectorNumbers, block = rows_of_block(T, m);
    const auto rows_support = input_rows<A>(support);
    const PerRow<A> columns(T, d * stride), projected(T, n * wide);
    const A *own = query.template const_data_ptr<A>(), *biases = bias.template const_data_ptr<A>();
    const A* weights = weight.template const_data_ptr<A>();
    const A *first_hidden = hidden.template const_data_ptr<A>(), *first_cell = cell.template const_data_ptr<A>();
    A* to = out.template mutable_data_ptr<A>();
    // The weights of query rows, support rows and states.
    const A *of_query = weights, *of_support = weights + d * wide, *of_state = weights + 2 * d * wide;
    const auto turn = [&](int64_t t, int64_t) {
      std::fill_n(columns.of(t), d * stride, A(0));
      turned(rows_support, t, 0, n, d, columns.of(t), stride);
    };
    const auto project = [&](int64_t t, int64_t chunk) {
      const Terms<A> terms[1] = {{rows_support.row(t, 0), rows_support.row_stride, 1, of_support, wide, d}};
      combine(terms, A(1), nullptr, 0, nullptr, projected.of(t), wide, n, chunk * kColumns,
              std::min(wide, (chunk + 1) * kColumns));
    };
    const auto rows = [&](int64_t t, int64_t number) {
      const int64_t begin = number * block, count = std::min(block, m - begin), at = t * m + begin;
      const Scratch<A> cells(count * d), scores(count * stride), fixed(count * wide), gates(count * wide);
      std::copy_n(first_hidden + at * d, count * d, to + at * d);
      std::copy_n(first_cell + at * d, count * d, cells.get());
      read({columns.of(t), projected.of(t), of_query, of_state, biases, own + at * d, stride, n, d, steps}, count,
           to + at * d, cells.get(), scores.get(), fixed.get(), gates.get());
    };
    parallel_stages(
        T, Stage{1, n * d, turn}, Stage{(wide + kColumns - 1) / kColumns, n * d * kColumns, project},
        Stage{(m + block - 1) / block, std::min(m, block) * (steps * (n * d + (n + d + 8) * wide) + d * wide), rows});
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, m) { m.impl("attention_lstm", TORCH_BOX(&attention_lstm)); }

}  // namespace metafast
