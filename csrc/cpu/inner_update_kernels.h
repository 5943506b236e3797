// One step of gradient descent and its gradient, a span of consecutive elements at a time.
// Read once for each instruction set: no guard.

// The vectors of `count` elements of `out`: body(k, own) gives the `own` entries from k on. What is streamed goes past the
// caches, which saves reading the line that it overwrites; only whole lines can.
template <class S, class Body>
METAFAST_HOST_DEVICE void write_span(S* out, int64_t count, bool stream, const Body& body) {
  constexpr int64_t W = kWidth<accumulate_t<S>>;
  int64_t k = 0;
  if constexpr (kStreams<S>) {
    if (stream) {
      constexpr uintptr_t kBytes = METAFAST_VECTOR_BYTES;
      const int64_t head =
          static_cast<int64_t>((kBytes - reinterpret_cast<uintptr_t>(out) % kBytes) % kBytes / sizeof(S));
      if (const int64_t own = std::min(head, count); own > 0) {
        store_part<S>(out, body(0, own), own);
        k = own;
      }
      for (; k + W <= count; k += W) stream_past_caches(out + k, body(k, W));
      end_of_stream();
    }
  }
  for (; k + W <= count; k += W) store<S>(out + k, body(k, W));
  if (k < count) store_part<S>(out + k, body(k, count - k), count - k);
}

template <class S>
METAFAST_HOST_DEVICE vector_t<accumulate_t<S>> read_span(const S* from, bool dense, int64_t k, int64_t own) {
  using V = vector_t<accumulate_t<S>>;
  if (!dense) return V{} + static_cast<accumulate_t<S>>(*from);
  return own == kWidth<accumulate_t<S>> ? load<S>(from + k) : load_part<S>(from + k, own);
}

// out = params - rates grads, or with the one rate where rates is null; what is not dense is one number.
template <class S, bool P, bool G, bool R>
void update_span(const S* params, const S* grads, const S* rates, accumulate_t<S> rate_of_all, S* out, int64_t count,
                 bool stream) {
  using V = vector_t<accumulate_t<S>>;
  const V one = V{} + (rates == nullptr ? rate_of_all : static_cast<accumulate_t<S>>(*rates));
  write_span<S>(out, count, stream, [&](int64_t k, int64_t own) {
    const V rate = R ? read_span<S>(rates, true, k, own) : one;
    return read_span<S>(params, P, k, own) - rate * read_span<S>(grads, G, k, own);
  });
}

// scaled = -rates upstream (unless null), and part += upstream grads.
template <class S, bool G>
void products_span(const S* upstream, const S* grads, const S* rates, S* scaled, accumulate_t<S>* part, int64_t count,
                   bool stream) {
  using A = accumulate_t<S>;
  const auto add = [&](int64_t k, int64_t own) {
    const vector_t<A> value = read_span<S>(upstream, true, k, own);
    const vector_t<A> product = value * read_span<S>(grads, G, k, own);
    // The lanes behind a part of a vector belong to others, and 0 times one infinite gradient of all is not 0.
    if (own == kWidth<A>) {
      store<A>(part + k, load<A>(part + k) + product);
    } else {
      store_part<A>(part + k, load_part<A>(part + k, own) + product, own);
    }
    return value;
  };
  if (scaled == nullptr) {
    for (int64_t k = 0; k < count; k += kWidth<A>) add(k, std::min(kWidth<A>, count - k));
    return;
  }
  write_span<S>(scaled, count, stream,
                [&](int64_t k, int64_t own) { return -(add(k, own) * read_span<S>(rates, true, k, own)); });
}

// scaled = -rate upstream (unless null); returns the sum of upstream grads, blocks of which are added in double.
template <class S, bool G>
double products_sum(const S* upstream, const S* grads, const S* rate, S* scaled, int64_t count, bool stream) {
  using A = accumulate_t<S>;
  using V = vector_t<A>;
  constexpr int kParts = 4;
  constexpr int64_t W = kWidth<A>, kTogether = 16 * kParts * W;
  double total = 0;
  int64_t k = 0;
  while (k + kParts * W <= count) {
    V parts[kParts] = {};
    const int64_t end = std::min(count, k + kTogether);
    for (; k + kParts * W <= end; k += kParts * W) {
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        parts[p] += load<S>(upstream + k + p * W) * read_span<S>(grads, G, k + p * W, W);
      }
    }
    total += static_cast<double>(sum<A>((parts[0] + parts[1]) + (parts[2] + parts[3])));
  }
  for (; k < count; ++k) total += static_cast<double>(upstream[k]) * static_cast<double>(grads[G ? k : 0]);
  if (scaled != nullptr) {
    const V factor = V{} - static_cast<A>(*rate);
    write_span<S>(scaled, count, stream,
                  [&](int64_t j, int64_t own) { return factor * read_span<S>(upstream, true, j, own); });
  }
  return total;
}
