// The first convolutional block on a GPU: a block of threads has a band of an image in shared memory, and its threads
// channels side by side. The convolution is computed where it is wanted, and never stored.
#pragma once

#include "cuda/features.cuh"
#include "cuda/reduce.cuh"
#include "math/conv_block.h"

namespace metafast::cuda {

// Rows of pooled pixels that a block of threads takes of an image.
struct Bands {
  BlockShape shape;
  int64_t height, count;

  // Rows of the image with the border that one more above and below make.
  METAFAST_HOST_DEVICE int64_t image_rows() const { return 2 * height + 2; }
  METAFAST_HOST_DEVICE int64_t plane() const { return image_rows() * shape.stride(); }
  METAFAST_HOST_DEVICE int64_t memory() const { return shape.planes * plane(); }
};

// As many rows as `bytes` of shared memory hold, at least one. All pixels belong to a band: of an odd height the last has
// one row of pixels more than it has pooled ones.
template <class A>
Bands bands_of(const BlockShape& shape) {
  constexpr int64_t kBytes = 24 * 1024, kMost = 16;
  const int64_t row = shape.planes * shape.stride() * static_cast<int64_t>(sizeof(A));
  int64_t height = (kBytes / row - 2) / 2;
  height = height < 1 ? 1 : (height > kMost ? kMost : height);
  return {shape, height, ((shape.height + 1) / 2 + height - 1) / height};
}

// The band of an image with its border, in shared memory; ends with a barrier.
template <class S, class A>
__device__ __forceinline__ void load_band(const S* __restrict__ image, const Bands& bands, int64_t band, A* to) {
  const BlockShape& shape = bands.shape;
  const int64_t stride = shape.stride(), first = 2 * band * bands.height - 1;
  for (int64_t k = threadIdx.x; k < bands.memory(); k += kThreads) {
    const int64_t plane = k / bands.plane(), i = first + k % bands.plane() / stride, j = k % stride - 1;
    const bool inside = i >= 0 && i < shape.height && j >= 0 && j < shape.width;
    to[k] = inside ? static_cast<A>(image[(plane * shape.height + i) * shape.width + j]) : A(0);
  }
  __syncthreads();
}

// visit(window's number in the image, its corner in the band, channel) for all of a band; neighbours have neighbouring
// channels.
template <class A, class Visit>
__device__ __forceinline__ void for_each_result(const Bands& bands, int64_t band, const A* image, const Visit& visit) {
  const BlockShape& shape = bands.shape;
  const int64_t first = band * bands.height, columns = shape.columns();
  const int64_t rows = shape.rows() - first < bands.height ? shape.rows() - first : bands.height;
  for (int64_t k = threadIdx.x; k < rows * columns * shape.channels; k += kThreads) {
    const int64_t window = k / shape.channels, i = window / columns, j = window % columns;
    visit((first + i) * columns + j, image + 2 * i * shape.stride() + 2 * j, k % shape.channels);
  }
}

// The convolution at the pixel whose patch begins at the corner.
template <class A>
__device__ __forceinline__ A convolve(const A* corner, const Bands& bands, const A* __restrict__ weight, A sum) {
  for (int64_t plane = 0; plane < bands.shape.planes; ++plane, corner += bands.plane(), weight += 9) {
#pragma unroll
    for (int k = 0; k < 9; ++k) sum = std::fma(weight[k], corner[k / 3 * bands.shape.stride() + k % 3], sum);
  }
  return sum;
}

// Parameters [G, C, patch] and [G, C] of groups of equally many tasks, and how many images a group has.
template <class A>
struct ConvParameters {
  const A* weight;
  const A* bias;
  int64_t group_images;
};

template <class S>
__global__ void __launch_bounds__(kThreads)
    conv_pool_kernel(const S* __restrict__ x, ConvParameters<accumulate_t<S>> kernel, S* __restrict__ out,
                     uint8_t* __restrict__ choice, const __grid_constant__ Bands bands) {
  using A = accumulate_t<S>;
  METAFAST_DYNAMIC_SHARED(A, image);
  BlockNumber block;
  const int64_t band = block.part(bands.count), k = block.rest();
  const BlockShape& shape = bands.shape;
  load_band(x + k * shape.pixels(), bands, band, image);
  const int64_t own = k / kernel.group_images * shape.channels;
  for_each_result<A>(bands, band, image, [&](int64_t window, const A* corner, int64_t c) {
    const A* weight = kernel.weight + (own + c) * shape.patch();
    A best = A(0);
    int kept = 0;
    for (int q = 0; q < kWindow; ++q) {
      const A value = convolve(corner + q / 2 * shape.stride() + q % 2, bands, weight, kernel.bias[own + c]);
      // NaN wins, as in torch.
      if (q > 0 && !(value > best) && value == value) continue;
      best = value;
      kept = q;
    }
    const bool nothing = best <= A(0);
    const int64_t at = k * shape.results() + window * shape.channels + c;
    out[at] = static_cast<S>(nothing ? A(0) : best);
    choice[at] = static_cast<uint8_t>(nothing ? kDead : kept);
  });
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    conv_chosen_kernel(const S* __restrict__ x, ConvParameters<accumulate_t<S>> kernel,
                       const uint8_t* __restrict__ choice, S* __restrict__ out, const __grid_constant__ Bands bands) {
  using A = accumulate_t<S>;
  METAFAST_DYNAMIC_SHARED(A, image);
  BlockNumber block;
  const int64_t band = block.part(bands.count), k = block.rest();
  const BlockShape& shape = bands.shape;
  load_band(x + k * shape.pixels(), bands, band, image);
  const int64_t own = k / kernel.group_images * shape.channels;
  for_each_result<A>(bands, band, image, [&](int64_t window, const A* corner, int64_t c) {
    const int64_t at = k * shape.results() + window * shape.channels + c;
    const int q = choice[at];
    const A* weight = kernel.weight + (own + c) * shape.patch();
    const A* chosen = corner + q / 2 * shape.stride() + q % 2;
    out[at] = q == kDead ? static_cast<S>(0) : static_cast<S>(convolve(chosen, bands, weight, kernel.bias[own + c]));
  });
}

// parts [images, bands, C patch + C]: the sums over a band's windows of the gradient times its patch, and of the gradient.
// A thread has one channel and every `together`-th window; their sums are added in shared memory, behind the image.
template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    conv_sums_kernel(const S* __restrict__ x, const S* __restrict__ grad, const uint8_t* __restrict__ choice,
                     accumulate_t<S>* __restrict__ parts, const __grid_constant__ Bands bands) {
  using A = accumulate_t<S>;
  METAFAST_DYNAMIC_SHARED(A, image);
  A* sums = image + bands.memory();
  BlockNumber block;
  const int64_t band = block.part(bands.count), k = block.rest();
  const BlockShape& shape = bands.shape;
  const int64_t C = shape.channels, K = shape.patch(), columns = shape.columns(), first = band * bands.height;
  const int64_t rows = shape.rows() - first < bands.height ? shape.rows() - first : bands.height;
  load_band(x + k * shape.pixels(), bands, band, image);
  // Lanes of a warp have neighbouring channels, warps windows of their own.
  for (int64_t begin = 0; begin < C; begin += kWarp) {
    const int64_t c = begin + lane_index();
    for (int64_t plane = 0; plane < shape.planes; ++plane) {
      A own[9] = {}, total = A(0);
      for (int64_t window = warp_index(); c < C && window < rows * columns; window += kWarps) {
        const int64_t at = k * shape.results() + (first * columns + window) * C + c;
        const int q = choice[at];
        if (q == kDead) continue;
        const A value = static_cast<A>(grad[at]);
        const int64_t i = 2 * (window / columns) + q / 2, j = 2 * (window % columns) + q % 2;
        const A* pixel = image + plane * bands.plane() + i * shape.stride() + j;
        total += value;
#pragma unroll
        for (int e = 0; e < 9; ++e) own[e] = std::fma(value, pixel[e / 3 * shape.stride() + e % 3], own[e]);
      }
#pragma unroll
      for (int e = 0; e < 10; ++e) {
        sums[warp_index() * kWarp + lane_index()] = e < 9 ? own[e < 9 ? e : 0] : total;
        __syncthreads();
        if (warp_index() == 0 && c < C && (e < 9 || plane == 0)) {
          A sum = A(0);
          for (int w = 0; w < kWarps; ++w) sum += sums[w * kWarp + lane_index()];
          A* to = parts + (k * bands.count + band) * C * (K + 1);
          to[e < 9 ? c * K + plane * 9 + e : C * K + c] = sum;
        }
        __syncthreads();
      }
    }
  }
}

// parts [images, bands, patch + patch patch]: the sums of the patches' entries at a band's pixels, and of their products.
template <class S>
__global__ void __launch_bounds__(kThreads)
    patch_moments_kernel(const S* __restrict__ x, double* __restrict__ parts, const __grid_constant__ Bands bands) {
  using A = accumulate_t<S>;
  METAFAST_DYNAMIC_SHARED(A, image);
  BlockNumber block;
  const int64_t band = block.part(bands.count), k = block.rest();
  const BlockShape& shape = bands.shape;
  const int64_t K = shape.patch(), stride = shape.stride(), first = 2 * band * bands.height;
  const int64_t rows = shape.height - first < 2 * bands.height ? shape.height - first : 2 * bands.height;
  load_band(x + k * shape.pixels(), bands, band, image);
  const auto shifted = [&](int64_t e) { return image + e / 9 * bands.plane() + e % 9 / 3 * stride + e % 3; };
  for (int64_t e = threadIdx.x; e < K + K * K; e += kThreads) {
    const A* a = shifted(e < K ? e : (e - K) / K);
    const A* b = e < K ? nullptr : shifted((e - K) % K);
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < shape.width; ++j) {
        const double other = b == nullptr ? 1.0 : static_cast<double>(b[i * stride + j]);
        sum = std::fma(static_cast<double>(a[i * stride + j]), other, sum);
      }
    }
    parts[(k * bands.count + band) * (K + K * K) + e] = sum;
  }
}

// mean [T, patch] and covariance [T, patch, patch] from the sums of each task over `count` pixels. A thread an entry.
__global__ void __launch_bounds__(kThreads)
    finish_moments_kernel(const double* __restrict__ sums, const double* __restrict__ products,
                          double* __restrict__ mean, double* __restrict__ covariance, int64_t tasks, int64_t K,
                          double count) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= tasks * K * K) return;
  const int64_t t = k / (K * K), a = k % (K * K) / K, b = k % K;
  const double first = sums[t * K + a] / count, second = sums[t * K + b] / count;
  covariance[k] = products[k] / count - first * second;
  if (b == 0) mean[t * K + a] = first;
}

template <class A>
unsigned band_bytes(const Bands& bands, int64_t more) {
  return static_cast<unsigned>((bands.memory() + more) * static_cast<int64_t>(sizeof(A)));
}

template <class S>
void launch_conv_pool(const S* x, const ConvParameters<accumulate_t<S>>& kernel, S* out, uint8_t* choice,
                      const Bands& bands, int64_t images, Stream stream) {
  const unsigned grid = grid_size(images * bands.count);
  if (grid == 0) return;
  METAFAST_LAUNCH((conv_pool_kernel<S>), grid, kThreads, band_bytes<accumulate_t<S>>(bands, 0), stream, x, kernel, out,
                  choice, bands);
}

template <class S>
void launch_conv_chosen(const S* x, const ConvParameters<accumulate_t<S>>& kernel, const uint8_t* choice, S* out,
                        const Bands& bands, int64_t images, Stream stream) {
  const unsigned grid = grid_size(images * bands.count);
  if (grid == 0) return;
  METAFAST_LAUNCH((conv_chosen_kernel<S>), grid, kThreads, band_bytes<accumulate_t<S>>(bands, 0), stream, x, kernel,
                  choice, out, bands);
}

template <class S>
void launch_conv_sums(const S* x, const S* grad, const uint8_t* choice, accumulate_t<S>* parts, const Bands& bands,
                      int64_t images, Stream stream) {
  const unsigned grid = grid_size(images * bands.count);
  if (grid == 0) return;
  METAFAST_LAUNCH((conv_sums_kernel<S>), grid, kThreads, band_bytes<accumulate_t<S>>(bands, kThreads), stream, x, grad,
                  choice, parts, bands);
}

template <class S>
void launch_patch_moments(const S* x, double* parts, const Bands& bands, int64_t images, Stream stream) {
  const unsigned grid = grid_size(images * bands.count);
  if (grid == 0) return;
  METAFAST_LAUNCH((patch_moments_kernel<S>), grid, kThreads, band_bytes<accumulate_t<S>>(bands, 0), stream, x, parts,
                  bands);
}

inline void launch_finish_moments(const double* sums, const double* products, double* mean, double* covariance,
                                  int64_t tasks, int64_t K, double count, Stream stream) {
  const unsigned grid = grid_size(ceil_div(tasks * K * K, kThreads));
  if (grid == 0) return;
  METAFAST_LAUNCH((finish_moments_kernel), grid, kThreads, 0, stream, sums, products, mean, covariance, tasks, K,
                  count);
}

}  // namespace metafast::cuda
