// One step of gradient descent for a list of tensors, and its gradient: each input is read once, whatever broadcasts.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/distance.h"

#define METAFAST_KERNELS "cpu/inner_update_kernels.h"
#include "cpu/for_each_isa.h"

namespace metafast {
namespace {

using Tensors = std::vector<Tensor>;
using Sizes = std::vector<int64_t>;

// Elements of one piece of work, and the least number of bytes that a step moves for its results to go past the caches:
// less than that may still lie in them when the results are read.
constexpr int64_t kPiece = 16384, kStreamFrom = int64_t(24) << 20;

Sizes sizes_of(const Tensor& tensor) {
  Sizes sizes(tensor.dim());
  for (size_t k = 0; k < sizes.size(); ++k) sizes[k] = tensor.size(static_cast<int64_t>(k));
  return sizes;
}

// Whether an operand has a size of its own in a dimension of the result, is one for all of it, or cannot be told (1 of 1).
enum class Extent { any, own, one };

std::vector<Extent> extents(const Tensor& operand, const char* name, const Sizes& out) {
  const int64_t lead = static_cast<int64_t>(out.size()) - operand.dim();
  if (lead < 0) fail(name, ": ", shape_text(operand), " has more dimensions than the result");
  std::vector<Extent> found(out.size(), Extent::one);
  for (int64_t k = 0; k < static_cast<int64_t>(out.size()); ++k) {
    const int64_t size = k < lead ? 1 : operand.size(k - lead);
    if (size != 1 && size != out[k]) fail(name, ": ", shape_text(operand), " does not broadcast to the result's shape");
    found[k] = out[k] == 1 ? Extent::any : size == 1 ? Extent::one : Extent::own;
  }
  return found;
}

// The result's dimensions as three: an operand is whole or one number in each of them, or is copied until it is.
struct Split {
  size_t first = 0, second = 0;

  // Whether the operand has a size of its own in each of the three.
  bool fits(const std::vector<Extent>& operand, std::array<bool, 3>* own) const {
    const size_t cuts[4] = {0, first, second, operand.size()};
    for (size_t part = 0; part < 3; ++part) {
      bool one = false, whole = false;
      for (size_t k = cuts[part]; k < cuts[part + 1]; ++k) {
        one |= operand[k] == Extent::one;
        whole |= operand[k] == Extent::own;
      }
      if (one && whole) return false;
      (*own)[part] = !one;
    }
    return true;
  }

  int64_t size(const Sizes& out, int part) const {
    const size_t cuts[4] = {0, first, second, out.size()};
    int64_t count = 1;
    for (size_t k = cuts[part]; k < cuts[part + 1]; ++k) count *= out[k];
    return count;
  }
};

// An operand seen as [outer, rows, columns]: strides, and whether it has columns at all.
struct Operand {
  Tensor tensor;
  int64_t outer = 0, row = 0;
  bool dense = false;

  template <class S>
  const S* at(int64_t o, int64_t a, int64_t b) const {
    return tensor.const_data_ptr<S>() + o * outer + a * row + (dense ? b : 0);
  }
};

Operand operand(const Tensor& given, const char* name, const Sizes& out, const Split& split) {
  std::array<bool, 3> own{};
  Tensor tensor = dense(given);
  if (!split.fits(extents(given, name, out), &own)) {
    tensor = empty(given, out.data(), static_cast<int64_t>(out.size()));
    torch::stable::copy_(tensor, given);
    own = {true, true, true};
  }
  const int64_t columns = own[2] ? split.size(out, 2) : 1;
  const int64_t rows = own[1] ? split.size(out, 1) : 1;
  return {tensor, own[0] ? rows * columns : 0, own[1] ? columns : 0, own[2]};
}

// The first way to split the result's dimensions that fits all operands; where there is none, all in one.
Split split_of(const std::vector<std::vector<Extent>>& operands) {
  const size_t dims = operands[0].size();
  std::array<bool, 3> own{};
  for (size_t first = 0; first <= dims; ++first) {
    for (size_t second = first; second <= dims; ++second) {
      const Split split{first, second};
      const auto fit = [&](const auto& operand) { return split.fits(operand, &own); };
      if (std::all_of(operands.begin(), operands.end(), fit)) return split;
    }
  }
  return {};
}

// A part of one tensor's work: the rows of all outer indices, one after the other, and columns.
struct Piece {
  size_t tensor;
  int64_t first_row, last_row, first_column, last_column;
};

void add_pieces(std::vector<Piece>& pieces, size_t tensor, int64_t rows, int64_t columns) {
  if (rows == 0 || columns == 0) return;
  const int64_t wide = std::min(columns, kPiece), many = std::max<int64_t>(1, kPiece / columns);
  for (int64_t a = 0; a < rows; a += many) {
    for (int64_t b = 0; b < columns; b += wide) {
      pieces.push_back({tensor, a, std::min(a + many, rows), b, std::min(b + wide, columns)});
    }
  }
}

Sizes broadcast(const std::vector<const Tensor*>& operands) {
  Sizes out;
  for (const Tensor* operand : operands) {
    const Sizes own = sizes_of(*operand);
    if (own.size() > out.size()) out.insert(out.begin(), own.size() - out.size(), 1);
    for (size_t k = 1; k <= own.size(); ++k) {
      int64_t& size = out[out.size() - k];
      if (size == 1) size = own[own.size() - k];
    }
  }
  return out;
}

void check_lists(const Tensors& first, const char* name, const Tensors& grads, const Tensors& rates) {
  if (grads.size() != first.size()) fail("grads: expected ", first.size(), " tensors, got ", grads.size());
  if (!rates.empty() && rates.size() != first.size()) {
    fail("rates: expected none or ", first.size(), " tensors, got ", rates.size());
  }
  for (size_t k = 0; k < first.size(); ++k) {
    check_cpu(first[k], name);
    check_like(grads[k], "grads", first[k], name);
    if (!rates.empty()) check_like(rates[k], "rates", first[k], name);
  }
}

// Calls body(dtype, positions) for each dtype in the list.
template <class Body>
void for_each_dtype(const Tensors& list, const char* name, const Body& body) {
  std::vector<bool> done(list.size());
  for (size_t first = 0; first < list.size(); ++first) {
    if (done[first]) continue;
    std::vector<size_t> positions;
    for (size_t k = first; k < list.size(); ++k) {
      if (list[k].scalar_type() != list[first].scalar_type()) continue;
      done[k] = true;
      positions.push_back(k);
    }
    dispatch_floating(list[first].scalar_type(), name, [&](auto dtype) { body(dtype, positions); });
  }
}

template <class Body>
void for_each_piece(const std::vector<Piece>& pieces, const Body& body) {
  parallel(static_cast<int64_t>(pieces.size()), kPiece, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) body(pieces[k]);
  });
}

struct Update {
  Operand params, grads, rates;
  int64_t rows, columns;
};

template <class S>
using UpdateKernel = void(const S*, const S*, const S*, accumulate_t<S>, S*, int64_t, bool);

template <class S>
UpdateKernel<S>* update_kernel(const Update& own) {
  const auto with = [&](auto params, auto grads) -> UpdateKernel<S>* {
    constexpr bool P = decltype(params)::value, G = decltype(grads)::value;
    return own.rates.dense ? METAFAST_KERNEL(update_span<S, P, G, true>) : METAFAST_KERNEL(update_span<S, P, G, false>);
  };
  if (own.params.dense) {
    return own.grads.dense ? with(std::true_type{}, std::true_type{}) : with(std::true_type{}, std::false_type{});
  }
  return own.grads.dense ? with(std::false_type{}, std::true_type{}) : with(std::false_type{}, std::false_type{});
}

Tensors sgd_update(const Tensors& params, const Tensors& grads, const Tensors& rates, double rate) {
  check_lists(params, "params", grads, rates);
  Tensors outs;
  std::vector<Update> updates;
  for (size_t k = 0; k < params.size(); ++k) {
    std::vector<const Tensor*> operands{&params[k], &grads[k]};
    if (!rates.empty()) operands.push_back(&rates[k]);
    const Sizes out = broadcast(operands);
    std::vector<std::vector<Extent>> all;
    for (const Tensor* operand : operands) all.push_back(extents(*operand, "grads", out));
    const Split split = split_of(all);
    Update own{operand(params[k], "params", out, split), operand(grads[k], "grads", out, split),
               rates.empty() ? Operand{} : operand(rates[k], "rates", out, split), split.size(out, 1),
               split.size(out, 2)};
    updates.push_back(std::move(own));
    outs.push_back(empty(params[k], out.data(), static_cast<int64_t>(out.size())));
  }
  for_each_dtype(params, "params", [&](auto dtype, const std::vector<size_t>& positions) {
    using S = typename decltype(dtype)::type;
    std::vector<Piece> pieces;
    int64_t bytes = 0;
    for (size_t k : positions) {
      if (outs[k].numel() == 0) continue;
      add_pieces(pieces, k, outs[k].numel() / updates[k].columns, updates[k].columns);
      bytes += 3 * outs[k].numel() * static_cast<int64_t>(sizeof(S));
    }
    for_each_piece(pieces, [&](const Piece& piece) {
      const Update& own = updates[piece.tensor];
      auto* kernel = update_kernel<S>(own);
      S* to = outs[piece.tensor].template mutable_data_ptr<S>();
      const int64_t b = piece.first_column;
      for (int64_t row = piece.first_row; row < piece.last_row; ++row) {
        const int64_t o = row / own.rows, a = row % own.rows;
        kernel(own.params.at<S>(o, a, b), own.grads.at<S>(o, a, b), rates.empty() ? nullptr : own.rates.at<S>(o, a, b),
               static_cast<accumulate_t<S>>(rate), to + row * own.columns + b, piece.last_column - b,
               bytes >= kStreamFrom);
      }
    });
  });
  return outs;
}

// How the gradient of a rate is summed: [outer, rows, columns] over the rows, or over the columns where it has none.
struct Products {
  Operand upstream, grads, rates;
  int64_t outer, rows, columns;
  bool over_rows;
  int64_t first_part;  // of the sums of its pieces

  int64_t chunks() const { return (columns + kPiece - 1) / kPiece; }
};

Tensors sgd_update_vjp(const Tensors& upstream, const Tensors& grads, const Tensors& rates, bool scaled) {
  check_lists(upstream, "upstream", grads, rates);
  if (rates.empty() && !upstream.empty()) fail("rates: expected a tensor for each of upstream");
  Tensors scaled_outs, sums;
  std::vector<Products> products;
  for (size_t k = 0; k < upstream.size(); ++k) {
    const Sizes out = sizes_of(upstream[k]);
    const std::vector<Extent> of_rate = extents(rates[k], "rates", out);
    // Own sizes, then what is summed, then own sizes.
    size_t first = 0, second = 0;
    while (first < out.size() && of_rate[first] != Extent::one) ++first;
    second = first;
    while (second < out.size() && of_rate[second] != Extent::own) ++second;
    if (std::find(of_rate.begin() + second, of_rate.end(), Extent::one) != of_rate.end()) {
      fail("rates: expected the sizes that are summed side by side, got ", shape_text(rates[k]));
    }
    // Where nothing is summed all is one row of columns, and sums over the last dimensions run over columns.
    const bool over_rows = second < out.size() || first == out.size();
    const Split split = first == out.size() ? Split{0, 0} : over_rows ? Split{first, second} : Split{first, first};
    Products own{operand(upstream[k], "upstream", out, split),
                 operand(grads[k], "grads", out, split),
                 operand(rates[k], "rates", out, split),
                 split.size(out, 0),
                 split.size(out, 1),
                 split.size(out, 2),
                 over_rows,
                 0};
    products.push_back(std::move(own));
    if (scaled) scaled_outs.push_back(empty(upstream[k], out.data(), static_cast<int64_t>(out.size())));
    const Sizes shape = sizes_of(rates[k]);
    sums.push_back(empty(upstream[k], shape.data(), static_cast<int64_t>(shape.size())));
  }
  for_each_dtype(upstream, "upstream", [&](auto dtype, const std::vector<size_t>& positions) {
    using S = typename decltype(dtype)::type;
    using A = accumulate_t<S>;
    // Pieces of columns sums have all rows of one outer index, which stands as their first row.
    std::vector<Piece> of_rows, of_columns;
    int64_t bytes = 0, parts = 0;
    for (size_t k : positions) {
      Products& own = products[k];
      bytes += (scaled ? 3 : 2) * upstream[k].numel() * static_cast<int64_t>(sizeof(S));
      if (own.over_rows) {
        const int64_t wide = 2048;
        for (int64_t o = 0; o < own.outer; ++o) {
          for (int64_t b = 0; b < own.columns; b += wide) {
            of_rows.push_back({k, o, o + 1, b, std::min(b + wide, own.columns)});
          }
        }
      } else {
        own.first_part = parts;
        add_pieces(of_columns, k, own.outer * own.rows, own.columns);
        parts += own.outer * own.rows * own.chunks();
      }
    }
    const bool stream = scaled && bytes >= kStreamFrom;
    const auto to_scaled = [&](const Piece& piece) {
      return scaled ? scaled_outs[piece.tensor].template mutable_data_ptr<S>() : nullptr;
    };
    for_each_piece(of_rows, [&](const Piece& piece) {
      const Products& own = products[piece.tensor];
      auto* kernel =
          own.grads.dense ? METAFAST_KERNEL(products_span<S, true>) : METAFAST_KERNEL(products_span<S, false>);
      const int64_t b = piece.first_column, count = piece.last_column - b, o = piece.first_row;
      constexpr int64_t kRowsInPart = 64;
      const Scratch<A> part(count), total(count);
      std::fill_n(total.get(), count, A(0));
      for (int64_t first = 0; first < own.rows; first += kRowsInPart) {
        std::fill_n(part.get(), count, A(0));
        for (int64_t a = first; a < std::min(first + kRowsInPart, own.rows); ++a) {
          S* to = to_scaled(piece);
          kernel(own.upstream.at<S>(o, a, b), own.grads.at<S>(o, a, b), own.rates.at<S>(o, a, b),
                 to == nullptr ? to : to + (o * own.rows + a) * own.columns + b, part.get(), count, stream);
        }
        for (int64_t j = 0; j < count; ++j) total.get()[j] += part.get()[j];
      }
      S* sum = sums[piece.tensor].template mutable_data_ptr<S>() + o * own.columns + b;
      for (int64_t j = 0; j < count; ++j) sum[j] = static_cast<S>(-total.get()[j]);
    });
    const Scratch<double> part(parts);
    for_each_piece(of_columns, [&](const Piece& piece) {
      const Products& own = products[piece.tensor];
      auto* kernel = own.grads.dense ? METAFAST_KERNEL(products_sum<S, true>) : METAFAST_KERNEL(products_sum<S, false>);
      const int64_t b = piece.first_column;
      for (int64_t row = piece.first_row; row < piece.last_row; ++row) {
        const int64_t o = row / own.rows, a = row % own.rows;
        S* to = to_scaled(piece);
        part.get()[own.first_part + row * own.chunks() + b / kPiece] =
            kernel(own.upstream.at<S>(o, a, b), own.grads.at<S>(o, a, b), own.rates.at<S>(o, a, b),
                   to == nullptr ? to : to + row * own.columns + b, piece.last_column - b, stream);
      }
    });
    for (size_t k : positions) {
      const Products& own = products[k];
      if (own.over_rows) continue;
      S* sum = sums[k].template mutable_data_ptr<S>();
      const int64_t each = own.rows * own.chunks();
      for (int64_t o = 0; o < own.outer; ++o) {
        const double* from = part.get() + own.first_part + o * each;
        sum[o] = static_cast<S>(static_cast<A>(-std::accumulate(from, from + each, 0.0)));
      }
    }
  });
  scaled_outs.insert(scaled_outs.end(), sums.begin(), sums.end());
  return scaled_outs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metafast, CPU, m) {
  m.impl("sgd_update", TORCH_BOX(&sgd_update));
  m.impl("sgd_update_vjp", TORCH_BOX(&sgd_update_vjp));
}

}  // namespace metafast
