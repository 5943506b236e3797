// Normalisation, ReLU and pooling of a range of bands of one unit. Read once for each instruction set: no guard.
//
// A kernel's body sees vectors of windows' four pixels from four places, and of their result from a fifth. With the
// channels last these lie in memory: a vector holds channels of one window, and the body goes from window to window. With
// the channels apart the rows of some bands are sorted into four buffers before, and back after; a vector holds windows,
// and one call of the body takes all. Without pooling there is one place, and no sorting.

template <class A>
using lane_t = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;

template <class A>
METAFAST_HOST_DEVICE bits_t<A> lane_numbers() {
  bits_t<A> numbers;
  for (int64_t k = 0; k < kWidth<A>; ++k) numbers[k] = k;
  return numbers;
}

template <class A>
METAFAST_HOST_DEVICE vector_t<A> where(bits_t<A> mask, vector_t<A> value) {
  return (vector_t<A>)((bits_t<A>)value & mask);
}

// A whole vector of elements.
struct Whole {
  template <class S>
  METAFAST_HOST_DEVICE vector_t<accumulate_t<S>> read(const S* from) const {
    return load<S>(from);
  }
  template <class S>
  METAFAST_HOST_DEVICE void write(S* to, vector_t<accumulate_t<S>> value) const {
    store<S>(to, value);
  }
  template <class A>
  METAFAST_HOST_DEVICE bits_t<A> read_choice(const uint8_t* from) const {
    return load_bytes(from, Tag<A>{});
  }
  template <class A>
  METAFAST_HOST_DEVICE void write_choice(uint8_t* to, bits_t<A> value) const {
    store_bytes(to, value);
  }
  template <class A>
  METAFAST_HOST_DEVICE vector_t<A> only(vector_t<A> value) const {
    return value;
  }
};

// The first `count` elements of a vector.
struct Part {
  int64_t count;

  template <class S>
  METAFAST_HOST_DEVICE vector_t<accumulate_t<S>> read(const S* from) const {
    return load_part<S>(from, count);
  }
  template <class S>
  METAFAST_HOST_DEVICE void write(S* to, vector_t<accumulate_t<S>> value) const {
    store_part<S>(to, value, count);
  }
  template <class A>
  METAFAST_HOST_DEVICE bits_t<A> read_choice(const uint8_t* from) const {
    bits_t<A> value = {};
    for (int64_t k = 0; k < count; ++k) value[k] = from[k];
    return value;
  }
  template <class A>
  METAFAST_HOST_DEVICE void write_choice(uint8_t* to, bits_t<A> value) const {
    for (int64_t k = 0; k < count; ++k) to[k] = static_cast<uint8_t>(value[k]);
  }
  template <class A>
  METAFAST_HOST_DEVICE vector_t<A> only(vector_t<A> value) const {
    return where<A>(lane_numbers<A>() < bits_t<A>{} + static_cast<lane_t<A>>(count), value);
  }
};

// Numbers for each channel as vectors: of the channels from c, or all the same.
template <bool Last, class A>
struct Numbers {
  PerChannel<A> of;

  METAFAST_HOST_DEVICE vector_t<A> operator()(int64_t k, int64_t c) const {
    if constexpr (Last) {
      return load<A>(of.row(k) + c);
    } else {
      return vector_t<A>{} + of.row(k)[0];
    }
  }
};

// Where the body goes: over `count` elements of `items` windows (or pixels) which lie x_step apart, their results y_step.
struct Strip {
  int64_t items, x_step, y_step, count;
};

// body(lanes, offset in x, offset in y, channel) over a strip.
template <class A, class Body>
METAFAST_HOST_DEVICE void for_each(const Strip& strip, const Body& body) {
  for (int64_t item = 0; item < strip.items; ++item) {
    const int64_t x = item * strip.x_step, y = item * strip.y_step;
    int64_t k = 0;
    for (; k + kWidth<A> <= strip.count; k += kWidth<A>) body(Whole{}, x + k, y + k, k);
    if (k < strip.count) body(Part{strip.count - k}, x + k, y + k, k);
  }
}

// sums += the terms of a strip, for each channel: term(lanes, offset in x, offset in y, channel, sums).
template <bool Last, class A, int N, class Term>
METAFAST_HOST_DEVICE void add_terms(const Strip& strip, PerChannel<A> sums, const Term& term) {
  using V = vector_t<A>;
  constexpr int64_t W = kWidth<A>;
  constexpr int G = METAFAST_VECTOR_BYTES == 64 && N < 4 ? 4 : 2;
  if constexpr (Last) {
    const auto channels = [&](auto vectors, auto lanes, int64_t c) {
      constexpr int kVectors = decltype(vectors)::value;
      V part[kVectors][N];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) part[v][n] = load<A>(sums.row(n) + c + v * W);
      }
      for (int64_t item = 0; item < strip.items; ++item) {
        const int64_t x = item * strip.x_step + c, y = item * strip.y_step + c;
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) term(lanes, x + v * W, y + v * W, c + v * W, part[v]);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) store<A>(sums.row(n) + c + v * W, part[v][n]);
      }
    };
    int64_t c = 0;
    for (; c + G * W <= strip.count; c += G * W) channels(std::integral_constant<int, G>{}, Whole{}, c);
    for (; c + W <= strip.count; c += W) channels(std::integral_constant<int, 1>{}, Whole{}, c);
    if (c < strip.count) channels(std::integral_constant<int, 1>{}, Part{strip.count - c}, c);
  } else {
    for (int64_t item = 0; item < strip.items; ++item) {
      const int64_t x = item * strip.x_step, y = item * strip.y_step;
      V part[G][N] = {};
      int64_t k = 0;
      for (; k + G * W <= strip.count; k += G * W) {
#pragma GCC unroll 8
        for (int v = 0; v < G; ++v) term(Whole{}, x + k + v * W, y + k + v * W, 0, part[v]);
      }
      for (; k + W <= strip.count; k += W) term(Whole{}, x + k, y + k, 0, part[0]);
      if (k < strip.count) term(Part{strip.count - k}, x + k, y + k, 0, part[0]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
        for (int v = 1; v < G; ++v) part[0][n] += part[v][n];
        sums.row(n)[0] += sum<A>(part[0][n]);
      }
    }
  }
}

// run(offset, strip) for the pixels of the bands begin..end, whose results have the same offset.
template <bool Last, class Run>
METAFAST_HOST_DEVICE void for_pixels(const Maps& maps, int64_t begin, int64_t end, const Run& run) {
  const int64_t per_image = maps.bands_per_image();
  for (int64_t band = begin; band < end;) {
    const int64_t image = band / per_image, last = std::min(end, (image + 1) * per_image);
    const int64_t first = maps.pixels(band) - image * maps.height * maps.width;
    const int64_t pixels = maps.pixels(last) - maps.pixels(band), C = maps.channels;
    run(image * maps.image_stride + first * C, Last ? Strip{pixels, C, C, C} : Strip{1, 0, 0, pixels});
    band = last;
  }
}

// Bands whose windows are sorted into buffers at once, at least one.
METAFAST_HOST_DEVICE int64_t bands_at_once(const Maps& maps) {
  return std::max<int64_t>(1, 1024 / std::max<int64_t>(1, maps.width));
}

// windows(offset in x, offset in y, bands, strip) and rest(offset, strip), of pixels in no window, for the bands begin..end.
template <bool Last, class Windows, class Rest>
METAFAST_HOST_DEVICE void for_windows(const Maps& maps, int64_t begin, int64_t end, const Windows& windows,
                                      const Rest& rest) {
  const int64_t per_image = maps.bands_per_image(), C = maps.channels, W = maps.width, columns = W / 2;
  const int64_t most = Last ? 1 : bands_at_once(maps);
  for (int64_t band = begin; band < end;) {
    const int64_t image = band / per_image, row = band % per_image;
    const int64_t x = image * maps.image_stride + 2 * row * W * C;
    const int64_t bands = std::min({most, end - band, maps.height / 2 - row});
    if (bands > 0) {
      const int64_t y = image * maps.pooled_stride + row * columns * C;
      windows(x, y, bands, Last ? Strip{columns, 2 * C, C, C} : Strip{1, 0, 0, bands * columns});
      if (W % 2 != 0) rest(x + (W - 1) * C, Last ? Strip{2, W * C, 0, C} : Strip{2 * bands, W, 0, 1});
      band += bands;
    } else {
      rest(x, Last ? Strip{W, C, 0, C} : Strip{1, 0, 0, W});
      ++band;
    }
  }
}

// The four pixels of windows in four places of a buffer, with room for a vector after each.
template <class A>
struct Sorted {
  A* at[4];

  static int64_t place(const Maps& maps) { return bands_at_once(maps) * (maps.width / 2) + kWidth<A>; }
  static int64_t size(const Maps& maps) { return 4 * place(maps); }

  METAFAST_HOST_DEVICE Sorted(A* buffer, const Maps& maps) {
    for (int k = 0; k < 4; ++k) at[k] = buffer + k * place(maps);
  }
};

template <class A, int64_t... L>
METAFAST_HOST_DEVICE void split_columns(vector_t<A> a, vector_t<A> b, vector_t<A>& even, vector_t<A>& odd,
                                        std::integer_sequence<int64_t, L...>) {
  even = shuffle<A, (2 * L)...>(a, b);
  odd = shuffle<A, (2 * L + 1)...>(a, b);
}

template <class A, int64_t... L>
METAFAST_HOST_DEVICE void join_columns(vector_t<A> even, vector_t<A> odd, vector_t<A>& a, vector_t<A>& b,
                                       std::integer_sequence<int64_t, L...>) {
  constexpr int64_t W = kWidth<A>;
  a = shuffle<A, (L / 2 + L % 2 * W)...>(even, odd);
  b = shuffle<A, (W / 2 + L / 2 + L % 2 * W)...>(even, odd);
}

// Vectors may read up to `end`.
template <class S, class A>
METAFAST_HOST_DEVICE void sort_windows(const Maps& maps, const S* x, int64_t bands, const S* end, const Sorted<A>& to) {
  constexpr int64_t W = kWidth<A>;
  constexpr auto lanes = std::make_integer_sequence<int64_t, W>{};
  const int64_t columns = maps.width / 2;
  for (int64_t row = 0; row < 2 * bands; ++row, x += maps.width) {
    A *even = to.at[row % 2 * 2] + row / 2 * columns, *odd = to.at[row % 2 * 2 + 1] + row / 2 * columns;
    for (int64_t k = 0; k < columns; k += W) {
      const int64_t left = 2 * (columns - k);
      vector_t<A> a, b, of_even, of_odd;
      if (end - (x + 2 * k) >= 2 * W) {
        a = load<S>(x + 2 * k), b = load<S>(x + 2 * k + W);
      } else {
        a = load_part<S>(x + 2 * k, std::min(left, W));
        b = load_part<S>(x + 2 * k + W, std::min(std::max<int64_t>(left - W, 0), W));
      }
      split_columns<A>(a, b, of_even, of_odd, lanes);
      store<A>(even + k, of_even);
      store<A>(odd + k, of_odd);
    }
  }
}

// Back. Vectors may write up to `end`; what they write behind a row is overwritten by the next, or by the rest.
template <class S, class A>
METAFAST_HOST_DEVICE void unsort_windows(const Maps& maps, const Sorted<A>& from, int64_t bands, S* x, const S* end) {
  constexpr int64_t W = kWidth<A>;
  constexpr auto lanes = std::make_integer_sequence<int64_t, W>{};
  const int64_t columns = maps.width / 2;
  for (int64_t row = 0; row < 2 * bands; ++row, x += maps.width) {
    const A *even = from.at[row % 2 * 2] + row / 2 * columns, *odd = from.at[row % 2 * 2 + 1] + row / 2 * columns;
    for (int64_t k = 0; k < columns; k += W) {
      const int64_t left = 2 * (columns - k);
      vector_t<A> a, b;
      join_columns<A>(load<A>(even + k), load<A>(odd + k), a, b, lanes);
      if (end - (x + 2 * k) >= 2 * W) {
        store<S>(x + 2 * k, a), store<S>(x + 2 * k + W, b);
      } else {
        store_part<S>(x + 2 * k, a, std::min(left, W));
        store_part<S>(x + 2 * k + W, b, std::min(std::max<int64_t>(left - W, 0), W));
      }
    }
  }
}

// The end of the rows of the bands begin..end that share an image with the one at offset x.
METAFAST_HOST_DEVICE int64_t end_of_rows(const Maps& maps, int64_t x, int64_t end) {
  const int64_t image = x / maps.image_stride, last = std::min(end, (image + 1) * maps.bands_per_image());
  return image * maps.image_stride + (maps.pixels(last) - image * maps.height * maps.width) * maps.channels;
}

// The places of windows' pixels with the channels last.
template <class S>
struct Places {
  S* at[4];

  METAFAST_HOST_DEVICE Places(S* x, const Maps& maps) {
    const int64_t C = maps.channels, row = maps.width * C;
    at[0] = x, at[1] = x + C, at[2] = x + row, at[3] = x + row + C;
  }
};

template <class S>
struct OnePlace {
  S* at[1];
};

// Values [P] of a window: the largest and which it is, the first of equal ones and the last NaN as in torch.
template <class A>
METAFAST_HOST_DEVICE void choose(const vector_t<A> (&z)[4], vector_t<A>& best, bits_t<A>& choice) {
  best = z[0];
  choice = bits_t<A>{};
#pragma GCC unroll 4
  for (int k = 1; k < 4; ++k) {
    const bits_t<A> better = (z[k] > best) | (z[k] != z[k]);
    best = better ? z[k] : best;
    choice = better ? bits_t<A>{} + k : choice;
  }
}

template <class A>
METAFAST_HOST_DEVICE vector_t<A> chosen(const vector_t<A> (&values)[4], bits_t<A> choice) {
  vector_t<A> value = values[0];
#pragma GCC unroll 4
  for (int k = 1; k < 4; ++k) value = choice == k ? values[k] : value;
  return value;
}

// Mean and sum of squared differences to it, of each channel. Blocks that stay in the first-level cache are read twice:
// first for about their mean, then for the differences to this, whose sums do not cancel.
template <bool Last, class S>
void slice_statistics(const Maps& maps, const S* x, int64_t begin, int64_t end,
                      PerChannel<accumulate_t<S>> statistics) {
  using A = accumulate_t<S>;
  using V = vector_t<A>;
  constexpr int64_t kBlockElements = 16384 / sizeof(S);
  const int64_t C = maps.channels, stride = statistics.stride;
  const int64_t at_once = std::max<int64_t>(1, kBlockElements / (2 * maps.width * C));
  // Rows: of the differences in a block their sum and that of their squares; and about the block's mean.
  constexpr int kSum = 0, kSquare = 1, kNear = 2;
  const Scratch<A> buffer(3 * stride);
  const PerChannel<A> block{buffer.get(), stride};
  const Numbers<Last, A> numbers{block};
  A seen = 0;
  for (int64_t band = begin; band < end; band += at_once) {
    const int64_t last = std::min(band + at_once, end);
    const A count = static_cast<A>(maps.pixels(last) - maps.pixels(band));
    std::fill_n(block.row(0), 3 * stride, A(0));
    for_pixels<Last>(maps, band, last, [&](int64_t offset, const Strip& strip) {
      add_terms<Last, A, 1>(
          strip, PerChannel<A>{block.row(kNear), stride},
          [&](auto lanes, int64_t k, int64_t, int64_t, V(&sum)[1]) { sum[0] += lanes.read(x + offset + k); });
    });
    for (int64_t c = 0; c < C; ++c) block.row(kNear)[c] /= count;
    for_pixels<Last>(maps, band, last, [&](int64_t offset, const Strip& strip) {
      add_terms<Last, A, 2>(strip, block, [&](auto lanes, int64_t k, int64_t, int64_t c, V(&sums)[2]) {
        const V apart = lanes.template only<A>(lanes.read(x + offset + k) - numbers(kNear, c));
        sums[0] += apart;
        sums[1] += apart * apart;
      });
    });
    A *mean = statistics.row(0), *square = statistics.row(1);
    const A all = seen + count, share = count / all, cross = seen * share;
    for (int64_t c = 0; c < C; ++c) {
      const A shift = block.row(kSum)[c] / count, own = block.row(kNear)[c] + shift;
      const A rest = block.row(kSquare)[c] - block.row(kSum)[c] * shift, inside = rest < A(0) ? A(0) : rest;
      const A step = seen > A(0) ? own - mean[c] : A(0);
      mean[c] = seen > A(0) ? mean[c] + step * share : own;
      square[c] = seen > A(0) ? square[c] + inside + step * step * cross : inside;
    }
    seen = all;
  }
}

// Calls body(values' places, strip, where their result lies) for every window, or pixel, of the images.
template <bool Pool, bool Last, class A, class S, class Body>
void for_places(const Maps& maps, const S* x, const S* x_end, int64_t begin, int64_t end, const Body& body) {
  if constexpr (!Pool) {
    for_pixels<Last>(maps, begin, end,
                     [&](int64_t at, const Strip& strip) { body(OnePlace<const S>{{x + at}}, strip, at); });
  } else {
    const Scratch<A> buffer(Last ? 0 : Sorted<A>::size(maps));
    const Sorted<A> sorted(buffer.get(), maps);
    for_windows<Last>(
        maps, begin, end,
        [&](int64_t at, int64_t to, int64_t bands, const Strip& strip) {
          if constexpr (Last) {
            body(Places<const S>(x + at, maps), strip, to);
          } else {
            sort_windows<S, A>(maps, x + at, bands, x_end, sorted);
            body(sorted, strip, to);
          }
        },
        [](int64_t, const Strip&) {});
  }
}

// y and, with pooling, choice. Values up to `floor`, which may be NaN for none, become it.
template <bool Last, bool Pool, class S>
void normalise(const Maps& maps, const S* x, const S* x_end, PerChannel<accumulate_t<S>> normal, accumulate_t<S> floor,
               S* y, uint8_t* choice, int64_t begin, int64_t end) {
  using A = accumulate_t<S>;
  using V = vector_t<A>;
  const Numbers<Last, A> numbers{normal};
  const auto body = [&](const auto& places, const Strip& strip, int64_t to) {
    for_each<A>(strip, [&](auto lanes, int64_t k, int64_t j, int64_t c) {
      constexpr int P = sizeof places.at / sizeof *places.at;
      const V mean = numbers(kMean, c), scale = numbers(kScale, c), shift = numbers(kShift, c);
      V z[P], best;
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) z[p] = (lanes.read(places.at[p] + k) - mean) * scale + shift;
      if constexpr (P == 4) {
        bits_t<A> which;
        choose<A>(z, best, which);
        lanes.template write_choice<A>(choice + to + j, best <= floor ? bits_t<A>{} + kDead : which);
      } else {
        best = z[0];
      }
      lanes.write(y + to + j, best <= floor ? V{} + floor : best);
    });
  };
  for_places<Pool, Last, A>(maps, x, x_end, begin, end, body);
}

// The gradient of the normalised values of a window or a pixel: as it comes from y where they lie above the floor.
template <bool Pool, bool Last, class A, class S>
struct Upstream {
  Numbers<Last, A> normal;
  A floor;
  const S* grad;
  const uint8_t* choice;

  // x is looked at without pooling only.
  template <class L>
  METAFAST_HOST_DEVICE vector_t<A> operator()(L lanes, int64_t at, int64_t c, vector_t<A> x, bits_t<A>& which) const {
    const vector_t<A> value = lanes.read(grad + at);
    if constexpr (Pool) {
      which = lanes.template read_choice<A>(choice + at);
      return where<A>(which != kDead, value);
    } else {
      which = bits_t<A>{};
      const vector_t<A> z = (x - normal(kMean, c)) * normal(kScale, c) + normal(kShift, c);
      return where<A>(~(z <= floor), value);
    }
  }
};

template <bool Last, bool Pool, class S>
void gradient_sums(const Maps& maps, const S* x, const S* x_end, PerChannel<accumulate_t<S>> normal,
                   accumulate_t<S> floor, const S* grad, const uint8_t* choice, int64_t begin, int64_t end,
                   PerChannel<accumulate_t<S>> sums) {
  using A = accumulate_t<S>;
  using V = vector_t<A>;
  const Numbers<Last, A> numbers{normal};
  const auto body = [&](const auto& places, const Strip& strip, int64_t to) {
    const Upstream<Pool, Last, A, S> upstream{numbers, floor, grad + to, choice + to};
    add_terms<Last, A, kGradSums>(strip, sums, [&](auto lanes, int64_t k, int64_t j, int64_t c, V(&sum)[kGradSums]) {
      constexpr int P = sizeof places.at / sizeof *places.at;
      V values[P];
      bits_t<A> which;
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) values[p] = lanes.read(places.at[p] + k);
      const V g = upstream(lanes, j, c, values[0], which);
      sum[kGrad] += g;
      if constexpr (P == 4) {
        sum[kGradCentred] += g * (chosen<A>(values, which) - numbers(kMean, c));
      } else {
        sum[kGradCentred] += g * (values[0] - numbers(kMean, c));
      }
    });
  };
  for (int n = 0; n < kGradSums; ++n) {
    for (int64_t c = 0; c < sums.stride; ++c) sums.row(n)[c] = A(0);
  }
  for_places<Pool, Last, A>(maps, x, x_end, begin, end, body);
}

// dx = g scale + constant + (x - mean) slope; g scale alone where the statistics are given.
template <bool Last, bool Pool, bool Given, class S>
void gradient(const Maps& maps, const S* x, const S* x_end, PerChannel<accumulate_t<S>> coefficients,
              accumulate_t<S> floor, const S* grad, const uint8_t* choice, S* dx, int64_t begin, int64_t end) {
  using A = accumulate_t<S>;
  using V = vector_t<A>;
  const Numbers<Last, A> numbers{coefficients};
  const auto affine = [&](V value, int64_t c) {
    return Given ? V{} : numbers(kConstant, c) + (value - numbers(kMean, c)) * numbers(kSlope, c);
  };
  const auto body = [&](const auto& places, const auto& results, const Strip& strip, int64_t to) {
    const Upstream<Pool, Last, A, S> upstream{numbers, floor, grad + to, choice + to};
    for_each<A>(strip, [&](auto lanes, int64_t k, int64_t j, int64_t c) {
      constexpr int P = sizeof places.at / sizeof *places.at;
      V values[P];
      bits_t<A> which;
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) values[p] = Given && Pool ? V{} : lanes.read(places.at[p] + k);
      const V step = upstream(lanes, j, c, values[0], which) * numbers(kScale, c);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        lanes.write(results.at[p] + k, where<A>(which == p, step) + affine(values[p], c));
      }
    });
  };
  if constexpr (!Pool) {
    for_pixels<Last>(maps, begin, end, [&](int64_t at, const Strip& strip) {
      body(OnePlace<const S>{{x + at}}, OnePlace<S>{{dx + at}}, strip, at);
    });
  } else {
    const Scratch<A> buffer(Last ? 0 : 2 * Sorted<A>::size(maps));
    const Sorted<A> sorted(buffer.get(), maps), results(buffer.get() + Sorted<A>::size(maps), maps);
    for_windows<Last>(
        maps, begin, end,
        [&](int64_t at, int64_t to, int64_t bands, const Strip& strip) {
          if constexpr (Last) {
            body(Places<const S>(x + at, maps), Places<S>(dx + at, maps), strip, to);
          } else {
            if constexpr (!Given) sort_windows<S, A>(maps, x + at, bands, x_end, sorted);
            body(sorted, results, strip, to);
            unsort_windows<S, A>(maps, results, bands, dx + at, dx + end_of_rows(maps, at, end));
          }
        },
        [&](int64_t at, const Strip& strip) {
          for_each<A>(strip, [&](auto lanes, int64_t k, int64_t, int64_t c) {
            lanes.write(dx + at + k, affine(lanes.read(x + at + k), c));
          });
        });
  }
}

template <bool Last, bool Pool, class S>
void second_sums(const Maps& maps, const S* x, const S* x_end, PerChannel<accumulate_t<S>> normal,
                 accumulate_t<S> floor, const S* grad, const uint8_t* choice, const S* u, const S* u_end, int64_t begin,
                 int64_t end, PerChannel<accumulate_t<S>> sums) {
  using A = accumulate_t<S>;
  using V = vector_t<A>;
  const Numbers<Last, A> numbers{normal};
  const auto add = [&](V value, V direction, int64_t c, V(&sum)[kSecondSums]) {
    sum[kDirection] += direction;
    sum[kDirectionCentred] += direction * (value - numbers(kMean, c));
  };
  const auto body = [&](const auto& places, const auto& directions, const Strip& strip, int64_t to) {
    const Upstream<Pool, Last, A, S> upstream{numbers, floor, grad + to, choice + to};
    add_terms<Last, A, kSecondSums>(strip, sums,
                                    [&](auto lanes, int64_t k, int64_t j, int64_t c, V(&sum)[kSecondSums]) {
                                      constexpr int P = sizeof places.at / sizeof *places.at;
                                      V values[P], along[P];
                                      bits_t<A> which;
#pragma GCC unroll 4
                                      for (int p = 0; p < P; ++p) {
                                        values[p] = lanes.read(places.at[p] + k);
                                        along[p] = lanes.read(directions.at[p] + k);
                                        add(values[p], along[p], c, sum);
                                      }
                                      const V g = upstream(lanes, j, c, values[0], which);
                                      sum[kGrad] += g;
                                      if constexpr (P == 4) {
                                        sum[kGradCentred] += g * (chosen<A>(values, which) - numbers(kMean, c));
                                        sum[kGradDirection] += g * chosen<A>(along, which);
                                      } else {
                                        sum[kGradCentred] += g * (values[0] - numbers(kMean, c));
                                        sum[kGradDirection] += g * along[0];
                                      }
                                    });
  };
  for (int n = 0; n < kSecondSums; ++n) {
    for (int64_t c = 0; c < sums.stride; ++c) sums.row(n)[c] = A(0);
  }
  if constexpr (!Pool) {
    for_pixels<Last>(maps, begin, end, [&](int64_t at, const Strip& strip) {
      body(OnePlace<const S>{{x + at}}, OnePlace<const S>{{u + at}}, strip, at);
    });
  } else {
    const Scratch<A> buffer(Last ? 0 : 2 * Sorted<A>::size(maps));
    const Sorted<A> sorted(buffer.get(), maps), directions(buffer.get() + Sorted<A>::size(maps), maps);
    for_windows<Last>(
        maps, begin, end,
        [&](int64_t at, int64_t to, int64_t bands, const Strip& strip) {
          if constexpr (Last) {
            body(Places<const S>(x + at, maps), Places<const S>(u + at, maps), strip, to);
          } else {
            sort_windows<S, A>(maps, x + at, bands, x_end, sorted);
            sort_windows<S, A>(maps, u + at, bands, u_end, directions);
            body(sorted, directions, strip, to);
          }
        },
        [&](int64_t at, const Strip& strip) {
          add_terms<Last, A, kSecondSums>(strip, sums,
                                          [&](auto lanes, int64_t k, int64_t, int64_t c, V(&sum)[kSecondSums]) {
                                            add(lanes.read(x + at + k), lanes.read(u + at + k), c, sum);
                                          });
        });
  }
}

// dy = pool(u scale + (x - mean) turn + offset), dx = g turn + constant + (x - mean) bend + u slope; g turn alone where the
// statistics are given.
template <bool Last, bool Pool, bool Given, class S>
void second(const Maps& maps, const S* x, const S* x_end, PerChannel<accumulate_t<S>> coefficients,
            accumulate_t<S> floor, const S* grad, const uint8_t* choice, const S* u, const S* u_end, S* dy, S* dx,
            int64_t begin, int64_t end) {
  using A = accumulate_t<S>;
  using V = vector_t<A>;
  const Numbers<Last, A> numbers{coefficients};
  const auto affine = [&](V value, V along, int64_t c) {
    if constexpr (Given) return V{};
    return numbers(kConstant, c) + (value - numbers(kMean, c)) * numbers(kBend, c) + along * numbers(kSlope, c);
  };
  const auto body = [&](const auto& places, const auto& directions, const auto& results, const Strip& strip,
                        int64_t to) {
    const Upstream<Pool, Last, A, S> upstream{numbers, floor, grad + to, choice + to};
    for_each<A>(strip, [&](auto lanes, int64_t k, int64_t j, int64_t c) {
      constexpr int P = sizeof places.at / sizeof *places.at;
      const V mean = numbers(kMean, c), scale = numbers(kScale, c), turn = numbers(kTurn, c);
      V values[P], along[P], moved[P];
      bits_t<A> which;
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        values[p] = lanes.read(places.at[p] + k);
        along[p] = lanes.read(directions.at[p] + k);
        moved[p] = along[p] * scale + (values[p] - mean) * turn + numbers(kOffset, c);
      }
      const V step = upstream(lanes, j, c, values[0], which) * turn;
      if constexpr (P == 4) {
        lanes.write(dy + to + j, where<A>(which != kDead, chosen<A>(moved, which)));
      } else {
        const V z = (values[0] - mean) * scale + numbers(kShift, c);
        lanes.write(dy + to + j, where<A>(~(z <= floor), moved[0]));
      }
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        lanes.write(results.at[p] + k, where<A>(which == p, step) + affine(values[p], along[p], c));
      }
    });
  };
  if constexpr (!Pool) {
    for_pixels<Last>(maps, begin, end, [&](int64_t at, const Strip& strip) {
      body(OnePlace<const S>{{x + at}}, OnePlace<const S>{{u + at}}, OnePlace<S>{{dx + at}}, strip, at);
    });
  } else {
    const int64_t size = Sorted<A>::size(maps);
    const Scratch<A> buffer(Last ? 0 : 3 * size);
    const Sorted<A> sorted(buffer.get(), maps), directions(buffer.get() + size, maps);
    const Sorted<A> results(buffer.get() + 2 * size, maps);
    for_windows<Last>(
        maps, begin, end,
        [&](int64_t at, int64_t to, int64_t bands, const Strip& strip) {
          if constexpr (Last) {
            body(Places<const S>(x + at, maps), Places<const S>(u + at, maps), Places<S>(dx + at, maps), strip, to);
          } else {
            sort_windows<S, A>(maps, x + at, bands, x_end, sorted);
            sort_windows<S, A>(maps, u + at, bands, u_end, directions);
            body(sorted, directions, results, strip, to);
            unsort_windows<S, A>(maps, results, bands, dx + at, dx + end_of_rows(maps, at, end));
          }
        },
        [&](int64_t at, const Strip& strip) {
          for_each<A>(strip, [&](auto lanes, int64_t k, int64_t, int64_t c) {
            lanes.write(dx + at + k, affine(lanes.read(x + at + k), lanes.read(u + at + k), c));
          });
        });
  }
}
