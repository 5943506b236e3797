// Vectors of METAFAST_VECTOR_BYTES. Read once for each instruction set by for_each_isa.h, in a namespace of its own: no guard.

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(METAFAST_VECTOR_BYTES)));
  typedef int32_t bits __attribute__((vector_size(METAFAST_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(METAFAST_VECTOR_BYTES)));
  typedef int64_t bits __attribute__((vector_size(METAFAST_VECTOR_BYTES)));
};
template <class A>
using vector_t = typename VectorOf<A>::type;
template <class A>
using bits_t = typename VectorOf<A>::bits;
template <class A>
constexpr int64_t kWidth = METAFAST_VECTOR_BYTES / sizeof(A);

typedef uint16_t half_bits __attribute__((vector_size(METAFAST_VECTOR_BYTES / 2)));
typedef uint32_t float_bits __attribute__((vector_size(METAFAST_VECTOR_BYTES)));

METAFAST_HOST_DEVICE vector_t<float> widen(half_bits bits, Tag<BFloat16>) {
  return (vector_t<float>)(__builtin_convertvector(bits, float_bits) << 16);
}

METAFAST_HOST_DEVICE vector_t<float> widen(half_bits bits, Tag<Half>) {
  const float_bits wide = __builtin_convertvector(bits, float_bits);
  const float_bits magnitude = (wide & 0x7fffu) << 13;
  // Rescaling by 2^112 moves the exponent bias, subnormals included; infinities and NaN keep their exponent.
  const float_bits finite = (float_bits)((vector_t<float>)magnitude * 0x1p112f);
  const float_bits special = magnitude | 0x7f800000u;
  const float_bits value = magnitude >= 0x0f800000u ? special : finite;
  return (vector_t<float>)(value | ((wide & 0x8000u) << 16));
}

template <class S>
METAFAST_HOST_DEVICE vector_t<accumulate_t<S>> load(const S* from) {
  if constexpr (sizeof(S) == 2) {
    half_bits bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return widen(bits, Tag<S>{});
  } else {
    vector_t<S> value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
  }
}

// The first `count` elements; the rest are zeros.
template <class S>
METAFAST_HOST_DEVICE vector_t<accumulate_t<S>> load_part(const S* from, int64_t count) {
  S buffer[kWidth<accumulate_t<S>>];
  __builtin_memset(static_cast<void*>(buffer), 0, sizeof buffer);
  __builtin_memcpy(static_cast<void*>(buffer), from, count * sizeof(S));
  return load<S>(buffer);
}

// To the nearest, and of two as near the even one; a NaN stays one.
METAFAST_HOST_DEVICE half_bits narrow(vector_t<float> value) {
  const float_bits bits = (float_bits)value;
  const float_bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, nan = (float_bits)(value != value);
  return __builtin_convertvector((((bits >> 16) | 0x40u) & nan) | (rounded & ~nan), half_bits);
}

template <class S>
METAFAST_HOST_DEVICE void store(S* to, vector_t<accumulate_t<S>> value) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const half_bits bits = narrow(value);
    __builtin_memcpy(static_cast<void*>(to), &bits, sizeof bits);
  } else if constexpr (sizeof(S) == 2) {
    for (int64_t k = 0; k < kWidth<float>; ++k) to[k] = static_cast<S>(value[k]);
  } else {
    __builtin_memcpy(to, &value, sizeof value);
  }
}

template <class S>
METAFAST_HOST_DEVICE void store_part(S* to, vector_t<accumulate_t<S>> value, int64_t count) {
  for (int64_t k = 0; k < count; ++k) to[k] = static_cast<S>(value[k]);
}

// `count` of a vector's numbers, from a row of them.
template <class A>
METAFAST_HOST_DEVICE vector_t<A> load_some(const A* from, int64_t count) {
  return count < kWidth<A> ? load_part<A>(from, count) : load<A>(from);
}

template <class A>
METAFAST_HOST_DEVICE void store_some(A* to, vector_t<A> value, int64_t count) {
  if (count < kWidth<A>) return store_part<A>(to, value, count);
  store<A>(to, value);
}

typedef uint8_t bytes_of_float __attribute__((vector_size(METAFAST_VECTOR_BYTES / 4)));
typedef uint8_t bytes_of_double __attribute__((vector_size(METAFAST_VECTOR_BYTES / 8)));
typedef uint16_t shorts_of_float __attribute__((vector_size(METAFAST_VECTOR_BYTES / 2)));
typedef uint16_t shorts_of_double __attribute__((vector_size(METAFAST_VECTOR_BYTES / 4)));
typedef int32_t ints_of_double __attribute__((vector_size(METAFAST_VECTOR_BYTES / 2)));

// Bytes to the width of A and back, by steps that are instructions: compilers take one of more apart into scalars.
METAFAST_HOST_DEVICE VectorOf<float>::bits load_bytes(const uint8_t* from, Tag<float>) {
  bytes_of_float bytes;
  __builtin_memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, shorts_of_float), VectorOf<float>::bits);
}

METAFAST_HOST_DEVICE VectorOf<double>::bits load_bytes(const uint8_t* from, Tag<double>) {
  bytes_of_double bytes;
  __builtin_memcpy(&bytes, from, sizeof bytes);
  const auto ints = __builtin_convertvector(__builtin_convertvector(bytes, shorts_of_double), ints_of_double);
  return __builtin_convertvector(ints, VectorOf<double>::bits);
}

METAFAST_HOST_DEVICE void store_bytes(uint8_t* to, VectorOf<float>::bits values) {
  const auto bytes = __builtin_convertvector(__builtin_convertvector(values, shorts_of_float), bytes_of_float);
  __builtin_memcpy(to, &bytes, sizeof bytes);
}

METAFAST_HOST_DEVICE void store_bytes(uint8_t* to, VectorOf<double>::bits values) {
  const auto shorts = __builtin_convertvector(__builtin_convertvector(values, ints_of_double), shorts_of_double);
  const auto bytes = __builtin_convertvector(shorts, bytes_of_double);
  __builtin_memcpy(to, &bytes, sizeof bytes);
}

// Stores that go past the caches, where the machine has them: for results larger than those are. `to` is a multiple of the
// vector's size.
#if defined(__x86_64__)
template <class S>
constexpr bool kStreams = sizeof(S) >= 4;

METAFAST_HOST_DEVICE void stream_past_caches(float* to, vector_t<float> value) {
#if METAFAST_VECTOR_BYTES == 64
  _mm512_stream_ps(to, (__m512)value);
#elif METAFAST_VECTOR_BYTES == 32
  _mm256_stream_ps(to, (__m256)value);
#else
  _mm_stream_ps(to, (__m128)value);
#endif
}

METAFAST_HOST_DEVICE void stream_past_caches(double* to, vector_t<double> value) {
  stream_past_caches(reinterpret_cast<float*>(to), (vector_t<float>)value);
}

METAFAST_HOST_DEVICE void end_of_stream() { _mm_sfence(); }
#else
template <class S>
constexpr bool kStreams = false;
#endif

template <class A, int64_t... I>
METAFAST_HOST_DEVICE vector_t<A> shuffle(vector_t<A> a, vector_t<A> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, typename VectorOf<A>::bits{I...});
#endif
}

// a and b each hold groups of G entries; the result holds the groups of a, then those of b, each folded in half by adding.
template <class A, int64_t G, int64_t... L>
METAFAST_HOST_DEVICE vector_t<A> fold(vector_t<A> a, vector_t<A> b, std::integer_sequence<int64_t, L...>) {
  constexpr int64_t W = kWidth<A>, H = W / 2;
  return shuffle<A, (L / H * W + L % H / (G / 2) * G + L % (G / 2))...>(a, b) +
         shuffle<A, (L / H * W + L % H / (G / 2) * G + L % (G / 2) + G / 2)...>(a, b);
}

template <class A, int N, int64_t G>
METAFAST_HOST_DEVICE vector_t<A> fold_all(const vector_t<A>* values) {
  constexpr auto lanes = std::make_integer_sequence<int64_t, kWidth<A>>{};
  if constexpr (N > 1) {
    vector_t<A> halved[N / 2];
#pragma GCC unroll 16
    for (int k = 0; k < N / 2; ++k) halved[k] = fold<A, G>(values[2 * k], values[2 * k + 1], lanes);
    return fold_all<A, N / 2, G / 2>(halved);
  } else if constexpr (G > 1) {
    const vector_t<A> halved[1] = {fold<A, G>(values[0], values[0], lanes)};
    return fold_all<A, 1, G / 2>(halved);
  } else {
    return values[0];
  }
}

// The sums of the entries of N vectors, each as a balanced tree; as many vectors at once as fill one with their sums.
template <class A, int N, int AtOnce = kWidth<A>>
METAFAST_HOST_DEVICE void sums(const vector_t<A>* values, A* result) {
  if constexpr (N >= AtOnce) {
    const vector_t<A> folded = fold_all<A, AtOnce, kWidth<A>>(values);
#pragma GCC unroll 16
    for (int i = 0; i < AtOnce; ++i) result[i] = folded[i];
    sums<A, N - AtOnce, AtOnce>(values + AtOnce, result + AtOnce);
  } else if constexpr (N > 0) {
    sums<A, N, AtOnce / 2>(values, result);
  }
}

template <class A>
METAFAST_HOST_DEVICE A sum(vector_t<A> value) {
  A result;
  sums<A, 1>(&value, &result);
  return result;
}

// exp to two units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; 0 below -87.3, NaN stays NaN.
METAFAST_HOST_DEVICE vector_t<float> exponential(vector_t<float> x) {
  using V = vector_t<float>;
  typedef VectorOf<float>::bits bits;
  const bits underflow = x < -87.3f;
  x = underflow ? V{} - 87.3f : x;
  x = x > 88.7f ? V{} + 88.7f : x;
  const V magic = V{} + 0x1.8p23f;
  const V shifted = x * 1.44269504088896341f + magic;
  const V n = shifted - magic;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // n reaches 128 only above the largest finite result, where the scale is split in two.
  const bits exponent = ((bits)shifted - (bits)magic);
  const bits low = exponent / 2, high = exponent - low;
  const V scale = (V)((low + 127) << 23), rest = (V)((high + 127) << 23);
  return underflow ? V{} : p * scale * rest;
}

// log of positive numbers, the smallest normal one and above: a polynomial on [sqrt(1/2), sqrt(2)] and the exponent.
METAFAST_HOST_DEVICE vector_t<float> logarithm(vector_t<float> x) {
  using V = vector_t<float>;
  typedef VectorOf<float>::bits bits;
  const bits raw = (bits)x - 0x3f3504f3;
  const V exponent = __builtin_convertvector(raw >> 23, V);
  const V m = (V)((raw & 0x007fffff) + 0x3f3504f3) - 1.0f;
  V p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const V square = m * m;
  const V value = ((p * m * square + exponent * -2.12194440e-4f) - 0.5f * square) + m + exponent * 0.693359375f;
  return x < __builtin_inff() ? value : x;
}

METAFAST_HOST_DEVICE vector_t<double> exponential(vector_t<double> x) {
  for (int64_t k = 0; k < kWidth<double>; ++k) x[k] = std::exp(x[k]);
  return x;
}

METAFAST_HOST_DEVICE vector_t<double> logarithm(vector_t<double> x) {
  for (int64_t k = 0; k < kWidth<double>; ++k) x[k] = std::log(x[k]);
  return x;
}

METAFAST_HOST_DEVICE vector_t<float> tangens(vector_t<float> x) {
  using V = vector_t<float>;
  typedef VectorOf<float>::bits bits;
  const bits sign = (bits)x & (bits{} + INT32_MIN);
  const V size = (V)((bits)x ^ sign);
  const V large = 1.0f - 2.0f / (exponential(size + size) + 1.0f);
  const V z = x * x;
  V p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const V small = p * z * size + size;
  return (V)((bits)(size < 0.625f ? small : large) | sign);
}

METAFAST_HOST_DEVICE vector_t<double> tangens(vector_t<double> x) {
  for (int64_t k = 0; k < kWidth<double>; ++k) x[k] = std::tanh(x[k]);
  return x;
}

// The softmax of a row of `width` numbers; both rows are as long as whole vectors.
template <class A>
METAFAST_HOST_DEVICE void softmax_row(const A* from, int64_t width, A* to) {
  A largest = width > 0 ? from[0] : A(0);
  for (int64_t c = 1; c < width; ++c) largest = from[c] > largest ? from[c] : largest;
  for (int64_t c = 0; c < width; c += kWidth<A>) store<A>(to + c, exponential(load<A>(from + c) - largest));
  A total = 0;
  for (int64_t c = 0; c < width; ++c) total += to[c];
  const A inverse = 1 / total;
  for (int64_t c = 0; c < width; ++c) to[c] *= inverse;
}
