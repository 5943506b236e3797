// A 3 x 3 convolution of few planes, ReLU and 2 x 2 max-pooling of one image, its adjoint, and the moments of its patches.
// Read once for each instruction set: no guard.

template <class A>
METAFAST_HOST_DEVICE bits_t<A> load_choice(const uint8_t* from, int64_t count) {
  if (count == kWidth<A>) return load_bytes(from, Tag<A>{});
  uint8_t room[kWidth<A>] = {};
  __builtin_memcpy(room, from, count);
  return load_bytes(room, Tag<A>{});
}

template <class A>
METAFAST_HOST_DEVICE void store_choice(uint8_t* to, bits_t<A> value, int64_t count) {
  if (count == kWidth<A>) return store_bytes(to, value);
  uint8_t room[kWidth<A>];
  store_bytes(room, value);
  __builtin_memcpy(to, room, count);
}

// The convolution at the four pixels of a window, for V vectors of channels. weight [patch, lanes].
template <class A, int V>
METAFAST_HOST_DEVICE void convolve_window(const A* corner, const BlockShape& shape, const A* weight, const A* bias,
                                          vector_t<A> (&values)[kWindow][V]) {
  constexpr int64_t W = kWidth<A>;
  const int64_t lanes = shape.lanes(), stride = shape.stride();
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    values[0][v] = values[1][v] = values[2][v] = values[3][v] = load<A>(bias + v * W);
  }
  for (int64_t plane = 0; plane < shape.planes; ++plane, corner += shape.plane()) {
#pragma GCC unroll 3
    for (int64_t y = 0; y < 3; ++y) {
#pragma GCC unroll 3
      for (int64_t x = 0; x < 3; ++x, weight += lanes) {
        const A* pixel = corner + y * stride + x;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const vector_t<A> w = load<A>(weight + v * W);
          values[0][v] += w * pixel[0];
          values[1][v] += w * pixel[1];
          values[2][v] += w * pixel[stride];
          values[3][v] += w * pixel[stride + 1];
        }
      }
    }
  }
}

// body(pixel, corner, first channel, vectors) for every window and group of channels of an image.
template <class A, class Body>
METAFAST_HOST_DEVICE void for_each_window(const A* image, const BlockShape& shape, const Body& body) {
  constexpr int64_t W = kWidth<A>;
  constexpr int kVectors = METAFAST_VECTOR_BYTES == 64 ? 4 : 2;
  const int64_t C = shape.channels, columns = shape.columns();
  for (int64_t i = 0; i < shape.rows(); ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const A* corner = image + 2 * i * shape.stride() + 2 * j;
      int64_t c = 0;
      for (; c + kVectors * W <= C; c += kVectors * W) {
        body((i * columns + j) * C + c, corner, c, std::integral_constant<int, kVectors>{});
      }
      for (; c < C; c += W) body((i * columns + j) * C + c, corner, c, std::integral_constant<int, 1>{});
    }
  }
}

template <class S>
METAFAST_HOST_DEVICE void store_channels(S* to, vector_t<accumulate_t<S>> value, int64_t count) {
  if (count >= kWidth<accumulate_t<S>>) {
    store<S>(to, value);
  } else {
    store_part<S>(to, value, count);
  }
}

// out and choice [rows, columns, C] = max(0, the window's largest). NaN wins, as in torch.
template <class S>
void conv_pool_image(const accumulate_t<S>* image, const BlockShape& shape, const accumulate_t<S>* weight,
                     const accumulate_t<S>* bias, S* out, uint8_t* choice) {
  using A = accumulate_t<S>;
  constexpr int64_t W = kWidth<A>;
  for_each_window<A>(image, shape, [&](int64_t at, const A* corner, int64_t c, auto vectors) {
    constexpr int V = decltype(vectors)::value;
    vector_t<A> values[kWindow][V];
    convolve_window<A, V>(corner, shape, weight + c, bias + c, values);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      vector_t<A> best = values[0][v];
      bits_t<A> kept = {};
#pragma GCC unroll 3
      for (int q = 1; q < kWindow; ++q) {
        const bits_t<A> better = (values[q][v] > best) | (values[q][v] != values[q][v]);
        best = better ? values[q][v] : best;
        kept = better ? bits_t<A>{} + q : kept;
      }
      const bits_t<A> dead = best <= A(0);
      best = dead ? vector_t<A>{} : best;
      kept = dead ? bits_t<A>{} + kDead : kept;
      const int64_t count = std::min(W, shape.channels - c - v * W);
      store_channels<S>(out + at + v * W, best, count);
      store_choice<A>(choice + at + v * W, kept, count);
    }
  });
}

// The convolution where the windows' choices lie, 0 where they are nothing.
template <class S>
void conv_chosen_image(const accumulate_t<S>* image, const BlockShape& shape, const accumulate_t<S>* weight,
                       const accumulate_t<S>* bias, const uint8_t* choice, S* out) {
  using A = accumulate_t<S>;
  constexpr int64_t W = kWidth<A>;
  for_each_window<A>(image, shape, [&](int64_t at, const A* corner, int64_t c, auto vectors) {
    constexpr int V = decltype(vectors)::value;
    vector_t<A> values[kWindow][V];
    convolve_window<A, V>(corner, shape, weight + c, bias + c, values);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t count = std::min(W, shape.channels - c - v * W);
      const bits_t<A> kept = load_choice<A>(choice + at + v * W, count);
      vector_t<A> value = {};
#pragma GCC unroll 4
      for (int q = 0; q < kWindow; ++q) value = kept == q ? values[q][v] : value;
      store_channels<S>(out + at + v * W, value, count);
    }
  });
}

// sums [patch + 1, lanes] += the gradient at each window's choice times its patch, and the gradient itself.
template <class S>
void conv_sums_image(const accumulate_t<S>* image, const BlockShape& shape, const S* grad, const uint8_t* choice,
                     accumulate_t<S>* sums) {
  using A = accumulate_t<S>;
  using V = vector_t<A>;
  constexpr int64_t W = kWidth<A>;
  const int64_t lanes = shape.lanes(), stride = shape.stride(), C = shape.channels, columns = shape.columns();
  for (int64_t i = 0; i < shape.rows(); ++i) {
    for (int64_t c = 0; c < C; c += W) {
      const int64_t count = std::min(W, C - c);
      for (int64_t plane = 0; plane < shape.planes; ++plane) {
        A* to = sums + plane * 9 * lanes + c;
        const A* corner = image + plane * shape.plane() + 2 * i * stride;
        V parts[9];
#pragma GCC unroll 9
        for (int k = 0; k < 9; ++k) parts[k] = load<A>(to + k * lanes);
        V total = {};
        for (int64_t j = 0; j < columns; ++j, corner += 2) {
          const int64_t at = (i * columns + j) * C + c;
          const bits_t<A> kept = load_choice<A>(choice + at, count);
          const V value = count == W ? load<S>(grad + at) : load_part<S>(grad + at, count);
          V own[kWindow];
#pragma GCC unroll 4
          for (int q = 0; q < kWindow; ++q) own[q] = kept == q ? value : V{};
          total += (own[0] + own[1]) + (own[2] + own[3]);
#pragma GCC unroll 9
          for (int k = 0; k < 9; ++k) {
            const A* pixel = corner + k / 3 * stride + k % 3;
            parts[k] += (own[0] * pixel[0] + own[1] * pixel[1]) + (own[2] * pixel[stride] + own[3] * pixel[stride + 1]);
          }
        }
#pragma GCC unroll 9
        for (int k = 0; k < 9; ++k) store<A>(to + k * lanes, parts[k]);
        if (plane == 0) {
          A* all = sums + shape.patch() * lanes + c;
          store<A>(all, load<A>(all) + total);
        }
      }
    }
  }
}

// moments [patch + 1, patch] += the sums of the patches' entries, and in the rows after it those of the products of every
// two, from the diagonal on, of an image with its border: sums over pixels of the image shifted against itself. Rows have
// room for a vector behind them.
template <class S>
void patch_moments_image(const double* image, const BlockShape& shape, double* moments) {
  using V = vector_t<double>;
  constexpr int64_t W = kWidth<double>;
  // Entries of one row of the kernel, which lie side by side.
  constexpr int kSide = 3;
  const int64_t K = shape.patch(), stride = shape.stride(), whole = shape.width / W * W;
  V inside = {};
  for (int64_t lane = 0; lane < shape.width - whole; ++lane) inside[lane] = 1;
  const auto shifted = [&](int64_t k) { return image + k / 9 * shape.plane() + k % 9 / kSide * stride; };
  for (int64_t k = 0; k < K; k += kSide) {
    const double* first = shifted(k);
    for (int64_t l = k; l < K; l += kSide) {
      const double* second = shifted(l);
      V product[kSide][kSide] = {}, entry[kSide] = {};
      const auto add = [&](int64_t at, bool part) {
#pragma GCC unroll 3
        for (int a = 0; a < kSide; ++a) {
          const V all = load<double>(first + at + a), own = part ? all * inside : all;
          entry[a] += own;
#pragma GCC unroll 3
          for (int b = 0; b < kSide; ++b) product[a][b] += own * load<double>(second + at + b);
        }
      };
      for (int64_t i = 0; i < shape.height; ++i) {
        for (int64_t j = 0; j < whole; j += W) add(i * stride + j, false);
        if (whole < shape.width) add(i * stride + whole, true);
      }
      for (int a = 0; a < kSide; ++a) {
        if (k == l) moments[k + a] += sum<double>(entry[a]);
        for (int b = 0; b < kSide; ++b) moments[(1 + k + a) * K + l + b] += sum<double>(product[a][b]);
      }
    }
  }
}
