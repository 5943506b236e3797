// The inner loop of an MLP on one task, and its reverse sweep by the R operator. Read once for each instruction set: no guard.

constexpr int64_t kTileRows = METAFAST_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int64_t kTileVectors = 3;

METAFAST_HOST_DEVICE int64_t padded_width(int64_t width) { return (width + 15) / 16 * 16; }

// A block of activations, layer by layer.
template <class A>
struct Layer {
  A* data;
  int64_t stride;
};

template <class A>
METAFAST_HOST_DEVICE Layer<A> layer_of(const MlpPlan& plan, A* block, int64_t rows, int64_t l) {
  return {block + rows * plan.column[l], padded_width(plan.width[l + 1])};
}

template <class A>
METAFAST_HOST_DEVICE Matrix<A> plain(Layer<A> layer) {
  return {layer.data, layer.stride, 1};
}

// One of up to two products that are summed: `depth` columns of a, rows of b.
template <class A>
struct Factor {
  Matrix<A> a;
  const A* b;
  int64_t stride;
  int64_t depth;
};

// What becomes of a sum of products S.
enum class Finish { set, add_row, add, subtract, step, step_each };

template <class A>
struct Target {
  A* to;
  int64_t stride;
  const A* base;   // add_row: + base[j]; add: base + S; step: base - rate S
  const A* rates;  // step_each: one for each element
  A rate;
};

template <class A, Finish F>
METAFAST_HOST_DEVICE void finish(const Target<A>& target, int64_t i, int64_t j, vector_t<A> value) {
  const int64_t at = i * target.stride + j;
  if constexpr (F == Finish::add_row) value = load<A>(target.base + j) + value;
  if constexpr (F == Finish::add) value = load<A>(target.base + at) + value;
  if constexpr (F == Finish::subtract) value = load<A>(target.to + at) - value;
  if constexpr (F == Finish::step) value = load<A>(target.base + at) - target.rate * value;
  if constexpr (F == Finish::step_each) value = load<A>(target.base + at) - load<A>(target.rates + at) * value;
  store<A>(target.to + at, value);
}

// R rows and N vectors of columns of the sum of products, from row i and column j. Long sums are made in parts, which
// keeps their rounding small.
template <class A, Finish F, int R, int N>
void product_tile(const Factor<A>* factors, int count, const Target<A>& target, int64_t i, int64_t j) {
  constexpr int64_t kPart = 512;
  vector_t<A> sums[R][N] = {}, totals[R][N];
  bool in_parts = false;
  for (int f = 0; f < count; ++f) {
    const Factor<A>& factor = factors[f];
    const A* a = factor.a.data + i * factor.a.row;
    const A* b = factor.b + j;
    for (int64_t first = 0; first < factor.depth; first += kPart) {
      const int64_t last = first + kPart < factor.depth ? first + kPart : factor.depth;
      for (int64_t k = first; k < last; ++k) {
        vector_t<A> row[N];
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) row[v] = load<A>(b + v * kWidth<A>);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const A value = a[r * factor.a.row];
#pragma GCC unroll 4
          for (int v = 0; v < N; ++v) sums[r][v] += value * row[v];
        }
        a += factor.a.column;
        b += factor.stride;
      }
      if (last == factor.depth) break;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) {
          totals[r][v] = in_parts ? totals[r][v] + sums[r][v] : sums[r][v];
          sums[r][v] = vector_t<A>{};
        }
      }
      in_parts = true;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      if (in_parts) sums[r][v] += totals[r][v];
      finish<A, F>(target, i + r, j + v * kWidth<A>, sums[r][v]);
    }
  }
}

template <class A, Finish F, int R>
METAFAST_HOST_DEVICE void product_rows(const Factor<A>* factors, int count, const Target<A>& target, int64_t i,
                                       int64_t columns) {
  const int64_t all = padded_width(columns) / kWidth<A>;
  int64_t v = 0;
  for (; v + kTileVectors <= all; v += kTileVectors) {
    product_tile<A, F, R, 3>(factors, count, target, i, v * kWidth<A>);
  }
  if (all - v == 2) product_tile<A, F, R, 2>(factors, count, target, i, v * kWidth<A>);
  if (all - v == 1) product_tile<A, F, R, 1>(factors, count, target, i, v * kWidth<A>);
}

// rows x columns of a b (+ a b), vectors along the columns of b; pads become the products of pads, zeros.
template <class A, Finish F>
void product(const Factor<A>* factors, int count, const Target<A>& target, int64_t rows, int64_t columns) {
  if (rows == 0) return;
  // Tiles of nearly equal height.
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  int64_t i = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t height = (rows - i + tiles - tile - 1) / (tiles - tile);
    switch (height) {
      case 1:
        product_rows<A, F, 1>(factors, count, target, i, columns);
        break;
      case 2:
        product_rows<A, F, 2>(factors, count, target, i, columns);
        break;
      case 3:
        product_rows<A, F, 3>(factors, count, target, i, columns);
        break;
      case 4:
        product_rows<A, F, 4>(factors, count, target, i, columns);
        break;
      default:
        if constexpr (kTileRows == 8) {
          if (height == 5) product_rows<A, F, 5>(factors, count, target, i, columns);
          if (height == 6) product_rows<A, F, 6>(factors, count, target, i, columns);
          if (height == 7) product_rows<A, F, 7>(factors, count, target, i, columns);
          if (height == 8) product_rows<A, F, 8>(factors, count, target, i, columns);
        }
    }
    i += height;
  }
}

// One of up to two products of rows with rows that are summed; both have `depth` columns, padded with zeros.
template <class A>
struct RowFactor {
  const A* a;
  int64_t a_stride;
  const A* b;
  int64_t b_stride;
  int64_t depth;
};

// rows x columns of a b^T (+ a b^T), vectors along the depth: the sums of kWidth of them are folded at once.
template <class A, Finish F>
void row_product(const RowFactor<A>* factors, int count, const Target<A>& target, int64_t rows, int64_t columns) {
  constexpr int64_t W = kWidth<A>;
  const int64_t whole = columns / W * W, rest = columns - whole;
  for (int64_t j = 0; j < whole; j += W) {
    for (int64_t i = 0; i < rows; ++i) {
      vector_t<A> sums[W] = {};
      for (int f = 0; f < count; ++f) {
        const RowFactor<A>& factor = factors[f];
        const A* a = factor.a + i * factor.a_stride;
        const A* b = factor.b + j * factor.b_stride;
        for (int64_t k = 0; k < factor.depth; k += W) {
          const vector_t<A> value = load<A>(a + k);
#pragma GCC unroll 16
          for (int64_t o = 0; o < W; ++o) sums[o] += value * load<A>(b + o * factor.b_stride + k);
        }
      }
      finish<A, F>(target, i, j, fold_all<A, W, W>(sums));
    }
  }
  // The columns that fill no vector: as many (row, column) pairs at once as do.
  const int64_t pairs = rows * rest;
  for (int64_t first = 0; first < pairs; first += W) {
    vector_t<A> sums[W] = {};
    int64_t i[W], j[W];
    for (int64_t p = 0; p < W; ++p) {
      const int64_t pair = first + p < pairs ? first + p : first;
      i[p] = pair / rest;
      j[p] = whole + pair % rest;
    }
    for (int f = 0; f < count; ++f) {
      const RowFactor<A>& factor = factors[f];
#pragma GCC unroll 16
      for (int64_t p = 0; p < W; ++p) {
        const A* a = factor.a + i[p] * factor.a_stride;
        const A* b = factor.b + j[p] * factor.b_stride;
        for (int64_t k = 0; k < factor.depth; k += W) sums[p] += load<A>(a + k) * load<A>(b + k);
      }
    }
    const vector_t<A> folded = fold_all<A, W, W>(sums);
    for (int64_t p = 0; p < W && first + p < pairs; ++p) {
      A& to = target.to[i[p] * target.stride + j[p]];
      if constexpr (F == Finish::set) to = folded[p];
      if constexpr (F == Finish::add_row) to = target.base[j[p]] + folded[p];
      if constexpr (F == Finish::subtract) to -= folded[p];
    }
  }
}

// The sums of the columns of `rows` rows, finished like a product.
template <class A, Finish F>
METAFAST_HOST_DEVICE void column_sums(Layer<A> from, int64_t rows, const Target<A>& target, int64_t columns) {
  for (int64_t j = 0; j < padded_width(columns); j += kWidth<A>) {
    vector_t<A> total = {};
    for (int64_t i = 0; i < rows; ++i) total += load<A>(from.data + i * from.stride + j);
    finish<A, F>(target, 0, j, total);
  }
}

// As torch has it, the slope of ReLU is 0 at 0 and 1 at NaN.
template <class A>
METAFAST_HOST_DEVICE vector_t<A> slope(Activation activation, vector_t<A> h, vector_t<A> of) {
  return activation == Activation::relu ? (h <= 0 ? vector_t<A>{} : of) : (1 - h * h) * of;
}

template <class A>
void zero_pads(Layer<A> layer, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = width; j < layer.stride; ++j) layer.data[i * layer.stride + j] = 0;
  }
}

// The sums of the first layer for `rows` rows x: of x W^T + b, and of the change D where their products with the support
// rows are given.
template <class A>
void first_sums(const MlpPlan& plan, const A* parameters, Matrix<A> x, const A* products, const A* change, A* to,
                int64_t rows) {
  const int64_t stride = padded_width(plan.width[1]);
  const Factor<A> factors[2] = {{x, parameters + plan.weight[0], stride, plan.width[0]},
                                {{products, padded_width(plan.rows), 1}, change, stride, plan.rows}};
  product<A, Finish::add_row>(factors, products ? 2 : 1, {to, stride, parameters + plan.bias[0], nullptr, 0}, rows,
                              plan.width[1]);
}

// All activations of `rows` rows from the sums of the first layer in h; the last layer has none.
template <class A>
void forward_pass(const MlpPlan& plan, const A* parameters, A* h, int64_t rows) {
  for (int64_t l = 0; l < plan.layers; ++l) {
    const int64_t in = plan.width[l], out = plan.width[l + 1];
    const Layer<A> to = layer_of(plan, h, rows, l);
    if (l > 0) {
      const Layer<A> from = layer_of(plan, h, rows, l - 1);
      const RowFactor<A> factor{from.data, from.stride, parameters + plan.weight[l], padded_width(in), in};
      row_product<A, Finish::add_row>(&factor, 1, {to.data, to.stride, parameters + plan.bias[l], nullptr, 0}, rows,
                                      out);
    }
    zero_pads(to, rows, out);
    if (l + 1 == plan.layers) break;
    for (int64_t k = 0; k < rows * to.stride; k += kWidth<A>) {
      const vector_t<A> a = load<A>(to.data + k);
      store<A>(to.data + k, plan.activation == Activation::relu ? (a <= 0 ? vector_t<A>{} : a) : tangens(a));
    }
  }
}

// The deltas of all layers from that of the last one.
template <class A>
void backward_pass(const MlpPlan& plan, const A* parameters, A* h, A* delta, int64_t rows) {
  for (int64_t l = plan.layers - 1; l > 0; --l) {
    const Layer<A> from = layer_of(plan, delta, rows, l), to = layer_of(plan, delta, rows, l - 1);
    const Factor<A> factor{plain(from), parameters + plan.weight[l], to.stride, plan.width[l + 1]};
    product<A, Finish::set>(&factor, 1, {to.data, to.stride, nullptr, nullptr, 0}, rows, plan.width[l]);
    const A* own = layer_of(plan, h, rows, l - 1).data;
    for (int64_t k = 0; k < rows * to.stride; k += kWidth<A>) {
      store<A>(to.data + k, slope<A>(plan.activation, load<A>(own + k), load<A>(to.data + k)));
    }
  }
}

// The gradient of every explicit parameter, delta^T h and sum(delta), finished into a block of parameters.
template <class A, Finish F>
void outer_products(const MlpPlan& plan, Matrix<A> x, A* h, A* delta, int64_t rows, const A* base, const A* step_rates,
                    const A* block_rates, A* to) {
  for (int64_t l = plan.lowest(); l < plan.layers; ++l) {
    const int64_t in = plan.width[l], out = plan.width[l + 1];
    const Layer<A> own = layer_of(plan, delta, rows, l);
    const auto target = [&](int64_t at, int64_t stride) {
      return Target<A>{to + at, stride, base ? base + at : nullptr, block_rates ? block_rates + at : nullptr,
                       step_rates ? step_rates[l] : A(0)};
    };
    if (l == 0) {
      const Factor<A> factor{transposed(x), own.data, own.stride, rows};
      product<A, F>(&factor, 1, target(plan.weight[l], own.stride), in, out);
    } else {
      const Layer<A> below = layer_of(plan, h, rows, l - 1);
      const Factor<A> factor{transposed(plain(own)), below.data, below.stride, rows};
      product<A, F>(&factor, 1, target(plan.weight[l], below.stride), out, in);
    }
    column_sums<A, F>(own, rows, target(plan.bias[l], 0), out);
  }
}

template <class A>
METAFAST_HOST_DEVICE A target_of(const MlpTask<A>& task, int64_t i, int64_t c) {
  if (task.labels) return task.labels[i] == c ? A(1) : A(0);
  return task.targets.data[i * task.targets.row + c * task.targets.column];
}

// The derivative of the loss for the outputs: 2 (a - y) / (n C), or (sum(y) softmax(a) - y) / n.
template <class A>
void loss_delta(const MlpPlan& plan, const MlpTask<A>& task, Layer<A> a, Layer<A> delta) {
  const int64_t n = plan.rows, C = plan.width[plan.layers];
  for (int64_t i = 0; i < n; ++i) {
    const A* row = a.data + i * a.stride;
    A* to = delta.data + i * delta.stride;
    if (plan.loss == InnerLoss::mse) {
      const A scale = A(2) / static_cast<A>(n * C);
      for (int64_t c = 0; c < C; ++c) to[c] = scale * (row[c] - target_of(task, i, c));
    } else {
      softmax_row<A>(row, C, to);
      A mass = 0;
      for (int64_t c = 0; c < C; ++c) mass += target_of(task, i, c);
      for (int64_t c = 0; c < C; ++c) to[c] = (mass * to[c] - target_of(task, i, c)) / static_cast<A>(n);
    }
  }
  zero_pads(delta, n, C);
}

// The change of that derivative along the change r of the outputs; the targets' gradient is its mixed derivative.
template <class A>
void loss_delta_tangent(const MlpPlan& plan, const MlpTask<A>& task, Layer<A> a, Layer<A> r, Layer<A> out,
                        A* to_targets) {
  const int64_t n = plan.rows, C = plan.width[plan.layers];
  for (int64_t i = 0; i < n; ++i) {
    const A* along = r.data + i * r.stride;
    A* to = out.data + i * out.stride;
    if (plan.loss == InnerLoss::mse) {
      const A scale = A(2) / static_cast<A>(n * C);
      for (int64_t c = 0; c < C; ++c) {
        to[c] = scale * along[c];
        if (to_targets) to_targets[i * C + c] += to[c];
      }
    } else {
      const A scale = A(1) / static_cast<A>(n);
      softmax_row<A>(a.data + i * a.stride, C, to);
      A mass = 0, mean = 0;
      for (int64_t c = 0; c < C; ++c) {
        mass += target_of(task, i, c);
        mean += to[c] * along[c];
      }
      for (int64_t c = 0; c < C; ++c) {
        if (to_targets) to_targets[i * C + c] += scale * (along[c] - mean);
        to[c] *= scale * mass * (along[c] - mean);
      }
    }
  }
  zero_pads(out, n, C);
}

// The products of `rows` rows x with the support rows, whose columns lie in `turned`; the row of ones behind them is added.
template <class A>
void products_with_rows(const MlpPlan& plan, Matrix<A> x, const A* turned, A* to, int64_t rows) {
  const int64_t stride = padded_width(plan.rows), in = plan.width[0];
  const Factor<A> factor{x, turned, stride, in};
  product<A, Finish::add_row>(&factor, 1, {to, stride, turned + in * stride, nullptr, 0}, rows, plan.rows);
}

// K steps, then the outputs of the query rows; everything is left on the tape.
template <class A>
void mlp_adapt(const MlpPlan& plan, const MlpTask<A>& task, A* scratch) {
  const int64_t n = plan.rows, m = plan.query_rows, block = n * plan.columns;
  const int64_t stride = padded_width(plan.width[1]);
  const A* parameters = task.initial;
  A* const products = plan.factored ? task.tape + plan.products() : nullptr;
  A* const of_query = plan.factored ? products + n * padded_width(n) : nullptr;
  A* const change = task.tape + plan.change();
  A* const sums = scratch;
  if (plan.factored) {
    A* const turned = sums + n * stride;
    const int64_t in = plan.width[0], height = padded_width(n);
    for (int64_t k = 0; k < in; ++k) {
      for (int64_t i = 0; i < n; ++i) turned[k * height + i] = task.inputs.at(i, k);
      for (int64_t i = n; i < height; ++i) turned[k * height + i] = 0;
    }
    for (int64_t i = 0; i < height; ++i) turned[in * height + i] = 1;
    products_with_rows(plan, task.inputs, turned, products, n);
    products_with_rows(plan, task.query, turned, of_query, m);
    first_sums<A>(plan, task.initial, task.inputs, nullptr, nullptr, sums, n);
    for (int64_t k = 0; k < n * stride; ++k) change[k] = 0;
  }
  for (int64_t t = 0; t < plan.steps; ++t) {
    A* h = task.tape + t * plan.step();
    A* delta = h + block;
    A* next = delta + block;
    if (plan.factored) {
      for (int64_t k = 0; k < n * stride; ++k) h[k] = sums[k];
    } else {
      first_sums<A>(plan, parameters, task.inputs, nullptr, nullptr, h, n);
    }
    forward_pass(plan, parameters, h, n);
    loss_delta(plan, task, layer_of(plan, h, n, plan.layers - 1), layer_of(plan, delta, n, plan.layers - 1));
    backward_pass(plan, parameters, h, delta, n);
    if (task.block_rates) {
      outer_products<A, Finish::step_each>(plan, task.inputs, h, delta, n, parameters, nullptr, task.block_rates, next);
    } else {
      outer_products<A, Finish::step>(plan, task.inputs, h, delta, n, parameters, task.step_rates + t * plan.layers,
                                      nullptr, next);
    }
    if (plan.factored) {
      const A rate = task.step_rates[t * plan.layers];
      const Factor<A> factor{{products, padded_width(n), 1}, delta, stride, n};
      product<A, Finish::step>(&factor, 1, {sums, stride, sums, nullptr, rate}, n, plan.width[1]);
      for (int64_t k = 0; k < n * stride; ++k) change[k] -= rate * delta[k];
    }
    parameters = next;
  }
  A* const h = task.tape + plan.steps * plan.step();
  first_sums(plan, plan.factored ? task.initial : parameters, task.query, of_query, change, h, m);
  forward_pass(plan, parameters, h, m);
}

// The weight of the first layer after all steps, then its bias.
template <class A>
void mlp_first_layer(const MlpPlan& plan, const MlpTask<A>& task, A* to) {
  const int64_t stride = padded_width(plan.width[1]), in = plan.width[0], out = plan.width[1];
  const A* const initial = task.initial + plan.weight[0];
  A* const change = task.tape + plan.change();
  const Factor<A> factor{transposed(task.inputs), change, stride, plan.rows};
  product<A, Finish::add>(&factor, 1, {to, stride, initial, nullptr, 0}, in, out);
  column_sums<A, Finish::add>({change, stride}, plan.rows, {to + in * stride, 0, initial + in * stride, nullptr, 0},
                              out);
}

// Adds to rows [begin, end) of `to`, [in, out], those of the gradient of the first layer: L + R^T X.
template <class A>
void mlp_first_gradient(const MlpPlan& plan, const MlpTask<A>& task, const A* factors, int64_t begin, int64_t end,
                        A* to) {
  const int64_t stride = padded_width(plan.width[1]), m = plan.query_rows;
  const auto columns = [&](Matrix<A> x) { return Matrix<A>{x.data + begin * x.column, x.column, x.row}; };
  const Factor<A> terms[2] = {{columns(task.query), factors, stride, m},
                              {columns(task.inputs), factors + m * stride, stride, plan.rows}};
  product<A, Finish::add>(terms, 2, {to, stride, to, nullptr, 0}, end - begin, plan.width[1]);
}

// lam o g for the gradient of the rates, g = the gradient that a step has followed.
template <class A>
void rate_gradients(const MlpPlan& plan, const MlpTask<A>& task, const MlpGradients<A>& grads, int64_t t, A* h,
                    A* delta, A* g) {
  outer_products<A, Finish::set>(plan, task.inputs, h, delta, plan.rows, nullptr, nullptr, nullptr, g);
  if (grads.block_rates) {
    for (int64_t k = 0; k < plan.stepped; ++k) grads.block_rates[k] -= grads.parameters[k] * g[k];
    return;
  }
  for (int64_t l = plan.lowest(); l < plan.layers; ++l) {
    const int64_t in = plan.width[l], out = plan.width[l + 1];
    const int64_t rows = l == 0 ? in : out, columns = l == 0 ? out : in, stride = padded_width(columns);
    vector_t<A> total = {};
    const auto add = [&](int64_t at, int64_t width) {
      for (int64_t j = 0; j < width; j += kWidth<A>) {
        total += load<A>(grads.parameters + at + j) * load<A>(g + at + j);
      }
    };
    for (int64_t i = 0; i < rows; ++i) add(plan.weight[l] + i * stride, columns);
    add(plan.bias[l], out);
    grads.step_rates[t * plan.layers + l] = -sum<A>(total);
  }
}

// The first layer in the reverse sweep where it is factored.
template <class A>
struct FirstLayer {
  const MlpPlan& plan;
  const MlpTask<A>& task;
  const MlpGradients<A>& grads;
  int64_t stride, height;  // of rows of the layer, and of products with rows
  A* R;                    // [n, stride]
  A* Z;                    // [n, stride]: X lam^T, and lam of the bias
  A* scaled;               // [n, stride]: the rate times delta
  A* S;                    // [n, height]: X's gradient has a part S X
  A* C;                    // [m, height]: and another C^T Q
  A* turned;               // [in, height]
  A* block;                // [in + 1, stride]

  FirstLayer(const MlpPlan& plan_, const MlpTask<A>& task_, const MlpGradients<A>& grads_, A* scratch)
      : plan(plan_), task(task_), grads(grads_), stride(padded_width(plan.width[1])), height(padded_width(plan.rows)) {
    const int64_t n = plan.rows, m = plan.query_rows;
    R = grads.factors + m * stride;
    Z = scratch;
    scaled = Z + n * stride;
    S = scaled + n * stride;
    C = S + n * height;
    turned = C + m * height;
    block = turned + plan.width[0] * height;
  }

  const A* products() const { return task.tape + plan.products(); }
  A* change() const { return task.tape + plan.change(); }

  // The weight after all steps.
  const A* adapted() const {
    mlp_first_layer(plan, task, block);
    return block;
  }

  void begin() const {
    const int64_t n = plan.rows, m = plan.query_rows, in = plan.width[0], out = plan.width[1];
    const Target<A> target{Z, stride, grads.first ? grads.first + in * stride : nullptr, nullptr, 0};
    if (grads.first) {
      const Factor<A> factor{task.inputs, grads.first, stride, in};
      product<A, Finish::add_row>(&factor, 1, target, n, out);
    } else {
      const Factor<A> factor{transposed(Matrix<A>{products() + n * height, height, 1}), grads.factors, stride, m};
      product<A, Finish::set>(&factor, 1, target, n, out);
    }
    for (int64_t k = 0; k < n * stride; ++k) R[k] = 0;
    for (int64_t k = 0; k < n * height; ++k) S[k] = 0;
  }

  // The gradient that a step has followed, along lam.
  A along(const A* delta) const {
    vector_t<A> total = {};
    for (int64_t k = 0; k < plan.rows * stride; k += kWidth<A>) total += load<A>(delta + k) * load<A>(Z + k);
    return sum<A>(total);
  }

  void change_of_sums(A rate, A* ra) const {
    for (int64_t k = 0; k < plan.rows * stride; ++k) ra[k] = rate * Z[k];
  }

  void step_back(A rate, const A* delta, const A* rdelta) const {
    const int64_t n = plan.rows, out = plan.width[1];
    if (grads.inputs) {
      for (int64_t k = 0; k < n * stride; ++k) scaled[k] = rate * delta[k];
      const RowFactor<A> factors[2] = {{scaled, stride, R, stride, out}, {R, stride, scaled, stride, out}};
      row_product<A, Finish::subtract>(factors, 2, {S, height, nullptr, nullptr, 0}, n, n);
    }
    for (int64_t k = 0; k < n * stride; ++k) R[k] -= rdelta[k];
    const Factor<A> factor{{products(), height, 1}, rdelta, stride, n};
    product<A, Finish::subtract>(&factor, 1, {Z, stride, nullptr, nullptr, 0}, n, out);
  }

  // The bias's gradient behind the factors; X's: R W + S X + D L, where L is deltas^T Q or given.
  void finish() const {
    const int64_t n = plan.rows, m = plan.query_rows, in = plan.width[0], out = plan.width[1];
    const Target<A> bias{R + n * stride, 0, grads.first ? grads.first + in * stride : nullptr, nullptr, 0};
    const Layer<A> factors{grads.factors, stride};
    if (grads.first) {
      column_sums<A, Finish::add_row>(factors, m + n, bias, out);
    } else {
      column_sums<A, Finish::set>(factors, m + n, bias, out);
    }
    if (!grads.inputs || plan.first_order) return;
    const RowFactor<A> weights[2] = {{R, stride, task.initial + plan.weight[0], stride, out},
                                     {change(), stride, grads.first, stride, out}};
    row_product<A, Finish::set>(weights, grads.first ? 2 : 1, {grads.inputs, in, nullptr, nullptr, 0}, n, in);
    const RowFactor<A> pairs{grads.factors, stride, change(), stride, out};
    row_product<A, Finish::set>(&pairs, 1, {C, height, nullptr, nullptr, 0}, m, n);
    const Factor<A> rows[2] = {{transposed(task.inputs), S, height, n}, {transposed(task.query), C, height, m}};
    product<A, Finish::set>(rows, 2, {turned, height, nullptr, nullptr, 0}, in, n);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t k = 0; k < in; ++k) grads.inputs[i * in + k] += turned[k * height + i];
    }
  }
};

// The gradients of <upstream, outputs>: back through the query rows, then step by step through the inner loop.
template <class A>
void mlp_adapt_vjp(const MlpPlan& plan, const MlpTask<A>& task, const MlpGradients<A>& grads) {
  const int64_t n = plan.rows, m = plan.query_rows, block = n * plan.columns, last = plan.layers - 1;
  A* const lam = grads.parameters;
  A* const V = grads.scratch;
  A* const g = V + plan.stepped;
  A* const ra = g + plan.stepped;
  A* const rh = ra + block;
  A* const rdelta = rh + block;
  A* const qdelta = rdelta + block;
  const FirstLayer<A> first(plan, task, grads, qdelta + (n > m ? n : m) * plan.columns);
  const auto parameters = [&](int64_t t) -> const A* {
    return t == 0 ? task.initial : task.tape + t * plan.step() - plan.stepped;
  };
  if (grads.outputs.data) {
    A* hq = task.tape + plan.steps * plan.step();
    const Layer<A> top = layer_of(plan, qdelta, m, last);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t c = 0; c < plan.width[plan.layers]; ++c) {
        top.data[i * top.stride + c] = grads.outputs.data[i * grads.outputs.row + c * grads.outputs.column];
      }
    }
    zero_pads(top, m, plan.width[plan.layers]);
    backward_pass(plan, parameters(plan.steps), hq, qdelta, m);
    outer_products<A, Finish::set>(plan, task.query, hq, qdelta, m, nullptr, nullptr, nullptr, lam);
    if (plan.factored) {
      for (int64_t k = 0; k < m * first.stride; ++k) grads.factors[k] = qdelta[k];
    }
    if (grads.query) {
      const Layer<A> lowest = layer_of(plan, qdelta, m, 0);
      const A* weight = plan.factored ? first.adapted() : parameters(plan.steps) + plan.weight[0];
      const RowFactor<A> factor{lowest.data, lowest.stride, weight, lowest.stride, plan.width[1]};
      row_product<A, Finish::set>(&factor, 1, {grads.query, plan.width[0], nullptr, nullptr, 0}, m, plan.width[0]);
    }
  }
  if (plan.factored) first.begin();
  for (int64_t t = plan.steps - 1; t >= 0; --t) {
    A* h = task.tape + t * plan.step();
    A* delta = h + block;
    const A* theta = parameters(t);
    if (grads.step_rates || grads.block_rates) rate_gradients(plan, task, grads, t, h, delta, g);
    if (plan.factored && grads.step_rates) grads.step_rates[t * plan.layers] = -first.along(delta);
    if (plan.first_order) continue;
    // V = rate o lam; then R of every activation and delta along V.
    for (int64_t l = plan.lowest(); l < plan.layers; ++l) {
      const int64_t end = plan.bias[l] + padded_width(plan.width[l + 1]);
      if (task.block_rates) {
        for (int64_t k = plan.weight[l]; k < end; ++k) V[k] = task.block_rates[k] * lam[k];
      } else {
        const A rate = task.step_rates[t * plan.layers + l];
        for (int64_t k = plan.weight[l]; k < end; ++k) V[k] = rate * lam[k];
      }
    }
    for (int64_t l = 0; l < plan.layers; ++l) {
      const int64_t in = plan.width[l], out = plan.width[l + 1];
      const Layer<A> to = layer_of(plan, ra, n, l);
      if (l == 0 && plan.factored) {
        first.change_of_sums(task.step_rates[t * plan.layers], ra);
      } else if (l == 0) {
        first_sums<A>(plan, V, task.inputs, nullptr, nullptr, ra, n);
      } else {
        const Layer<A> below = layer_of(plan, h, n, l - 1), moved = layer_of(plan, rh, n, l - 1);
        const int64_t stride = padded_width(in);
        const RowFactor<A> factors[2] = {{below.data, below.stride, V + plan.weight[l], stride, in},
                                         {moved.data, moved.stride, theta + plan.weight[l], stride, in}};
        row_product<A, Finish::add_row>(factors, 2, {to.data, to.stride, V + plan.bias[l], nullptr, 0}, n, out);
      }
      zero_pads(to, n, out);
      if (l == last) break;
      const A* own = layer_of(plan, h, n, l).data;
      A* moved = layer_of(plan, rh, n, l).data;
      for (int64_t k = 0; k < n * to.stride; k += kWidth<A>) {
        store<A>(moved + k, slope<A>(plan.activation, load<A>(own + k), load<A>(to.data + k)));
      }
    }
    loss_delta_tangent(plan, task, layer_of(plan, h, n, last), layer_of(plan, ra, n, last),
                       layer_of(plan, rdelta, n, last), grads.targets);
    for (int64_t l = last; l > 0; --l) {
      const Layer<A> above = layer_of(plan, delta, n, l), moved = layer_of(plan, rdelta, n, l);
      const Layer<A> to = layer_of(plan, rdelta, n, l - 1);
      const Factor<A> factors[2] = {{plain(above), V + plan.weight[l], to.stride, plan.width[l + 1]},
                                    {plain(moved), theta + plan.weight[l], to.stride, plan.width[l + 1]}};
      product<A, Finish::set>(factors, 2, {to.data, to.stride, nullptr, nullptr, 0}, n, plan.width[l]);
      const int64_t offset = n * plan.column[l - 1];
      for (int64_t k = 0; k < n * to.stride; k += kWidth<A>) {
        const vector_t<A> own = load<A>(h + offset + k);
        vector_t<A> value = slope<A>(plan.activation, own, load<A>(to.data + k));
        // phi'' u = -2 h (1 - h^2) u = -2 h delta
        if (plan.activation == Activation::tanh) {
          value -= 2 * own * load<A>(delta + offset + k) * load<A>(ra + offset + k);
        }
        store<A>(to.data + k, value);
      }
    }
    if (plan.factored) {
      first.step_back(task.step_rates[t * plan.layers], delta, rdelta);
    } else if (grads.inputs) {
      const Layer<A> own = layer_of(plan, delta, n, 0), moved = layer_of(plan, rdelta, n, 0);
      const RowFactor<A> factors[2] = {{own.data, own.stride, V + plan.weight[0], own.stride, plan.width[1]},
                                       {moved.data, moved.stride, theta + plan.weight[0], own.stride, plan.width[1]}};
      row_product<A, Finish::subtract>(factors, 2, {grads.inputs, plan.width[0], nullptr, nullptr, 0}, n,
                                       plan.width[0]);
    }
    // lam -= H V
    for (int64_t l = plan.lowest(); l < plan.layers; ++l) {
      const int64_t in = plan.width[l], out = plan.width[l + 1];
      const Layer<A> moved = layer_of(plan, rdelta, n, l);
      if (l == 0) {
        const Factor<A> factor{transposed(task.inputs), moved.data, moved.stride, n};
        product<A, Finish::subtract>(&factor, 1, {lam + plan.weight[l], moved.stride, nullptr, nullptr, 0}, in, out);
      } else {
        const Layer<A> own = layer_of(plan, delta, n, l), below = layer_of(plan, h, n, l - 1);
        const Layer<A> below_moved = layer_of(plan, rh, n, l - 1);
        const Factor<A> factors[2] = {{transposed(plain(moved)), below.data, below.stride, n},
                                      {transposed(plain(own)), below_moved.data, below.stride, n}};
        product<A, Finish::subtract>(factors, 2, {lam + plan.weight[l], below.stride, nullptr, nullptr, 0}, out, in);
      }
      column_sums<A, Finish::subtract>(moved, n, {lam + plan.bias[l], 0, nullptr, nullptr, 0}, out);
    }
  }
  if (plan.factored) first.finish();
}

// Adds to the first of `count` blocks the others, which lie `stride` apart, in their order.
template <class A>
void sum_blocks(A* blocks, int64_t stride, int64_t count, int64_t begin, int64_t end) {
  for (int64_t t = 1; t < count; ++t) {
    for (int64_t k = begin; k < end; ++k) blocks[k] += blocks[t * stride + k];
  }
}
