// What is launched with the kernels of planted.cuh, and the results that these must give. nvcc compiles it as well:
// the correct cases run on a GPU with what the emulator is held to.
#pragma once

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "planted.cuh"

namespace cases {

// Memory of exactly n numbers that both host and kernels see.
template <class T>
class Array {
 public:
  explicit Array(int n, T value = T(0)) : n_(n) {
    const size_t bytes = static_cast<size_t>(n) * sizeof(T);
#if defined(__CUDACC__)
    void* memory = nullptr;
    const cudaError_t error = cudaMallocManaged(&memory, bytes);
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
#else
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes) != 0) throw std::bad_alloc();
#endif
    numbers_ = static_cast<T*>(memory);
    for (int k = 0; k < n; ++k) numbers_[k] = value;
  }
  // 1, 2, ..., period, 1, 2, ...
  static Array counting(int n, int period) {
    Array made(n);
    for (int k = 0; k < n; ++k) made[k] = static_cast<T>(k % period + 1);
    return made;
  }
  Array(Array&& other) : n_(other.n_), numbers_(other.numbers_) { other.numbers_ = nullptr; }
  ~Array() {
#if defined(__CUDACC__)
    cudaFree(numbers_);
#else
    std::free(numbers_);
#endif
  }

  int size() const { return n_; }
  T* data() { return numbers_; }
  T& operator[](int k) { return numbers_[k]; }

  // All kernels are done then.
  template <class Wanted>
  void expect(const Wanted& wanted) {
#if defined(__CUDACC__)
    const cudaError_t error = cudaDeviceSynchronize();
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
#endif
    for (int k = 0; k < n_; ++k) {
      if (!(numbers_[k] == wanted(k))) {
        throw std::runtime_error("wrong result: number " + std::to_string(k) + " is " + std::to_string(numbers_[k]) +
                                 ", not " + std::to_string(wanted(k)));
      }
    }
  }

 private:
  int n_;
  T* numbers_;
};

using Floats = Array<float>;
using Ints = Array<int>;

struct Case {
  const char* name;
  void (*run)();
};

#define LAUNCH(kernel, grid, block, shared_bytes, ...) \
  METAFAST_LAUNCH(kernel, grid, block, shared_bytes, metafast::cuda::Stream(), __VA_ARGS__)

inline constexpr Case kCorrect[] = {
    {"vector_add",
     [] {
       Floats x = Floats::counting(1000, 97), out(1000);
       LAUNCH((correct::vector_add), 8, 128, 0, x.data(), x.data(), out.data(), 1000);
       out.expect([&](int k) { return 2 * x[k]; });
     }},
    {"block_sums",
     [] {
       Floats x = Floats::counting(1000, 10), sums(4);
       Ints positive(1);
       x[7] = -8;
       LAUNCH((correct::block_sums), 4, 256, 0, x.data(), sums.data(), positive.data(), 1000);
       positive.expect([](int) { return 999; });
       sums.expect([&](int block) {
         float sum = 0;
         for (int k = block * 256; k < block * 256 + 256 && k < 1000; ++k) sum += x[k];
         return sum;
       });
     }},
    {"tiled_distance",
     [] {
       const int n = 19, m = 21, d = 11;
       Floats x = Floats::counting(n * d, 13), y = Floats::counting(m * d, 7), out(n * m);
       LAUNCH((correct::tiled_distance<8>), dim3(3, 3), dim3(8, 8), 0, x.data(), y.data(), out.data(), n, m, d);
       out.expect([&](int k) {
         float sum = 0;
         for (int j = 0; j < d; ++j) {
           const float difference = x[k / m * d + j] - y[k % m * d + j];
           sum += difference * difference;
         }
         return sum;
       });
     }},
    {"copied_row_sums",
     [] {
       Floats x = Floats::counting(2 * 768, 11), out(2);
       LAUNCH((correct::copied_row_sums), 2, 64, 2048, x.data(), out.data(), 3);
       out.expect([&](int row) {
         float sum = 0;
         for (int k = 0; k < 768; ++k) sum += x[row * 768 + k];
         return sum;
       });
     }},
    {"warp_sum_in_shared",
     [] {
       Floats x = Floats::counting(32, 32), out(1);
       LAUNCH((correct::warp_sum_in_shared), 1, 32, 0, x.data(), out.data());
       out.expect([](int) { return 528.0f; });
     }},
    {"half_warps",
     [] {
       Floats x = Floats::counting(32, 32), out(32);
       LAUNCH((correct::half_warps), 1, 32, 0, x.data(), out.data());
       out.expect([&](int k) { return x[k < 16 ? 15 - k : k]; });
     }},
    {"leaving_lanes",
     [] {
       Ints out(32);
       LAUNCH((correct::leaving_lanes), 1, 32, 0, out.data());
       out.expect([](int k) { return 32 - k; });
     }},
    {"early_return",
     [] {
       Floats x = Floats::counting(100, 100), out(100);
       LAUNCH((correct::early_return), 2, 64, 0, x.data(), out.data(), 100);
       out.expect([&](int k) { return x[k]; });
     }},
    {"vector_transpose",
     [] {
       Floats x = Floats::counting(256, 256), out(256);
       LAUNCH((correct::vector_transpose), 1, 64, 0, x.data(), out.data());
       out.expect([&](int k) { return x[k / 4 + k % 4 * 64]; });
     }},
    {"histogram",
     [] {
       Ints numbers(300), counts(8);
       for (int k = 0; k < 300; ++k) numbers[k] = k * k % 8;
       LAUNCH((correct::histogram), 3, 128, 0, numbers.data(), counts.data(), 300);
       counts.expect([](int value) { return value == 1 ? 150 : (value == 0 || value == 4 ? 75 : 0); });
     }},
    {"collectives",
     [] {
       Ints mistakes(correct::kCollectives);
       LAUNCH((correct::collectives), 3, 64, 0, mistakes.data());
       mistakes.expect([](int) { return 0; });
     }},
};

inline float total(Floats& x) {
  float sum = 0;
  for (int k = 0; k < x.size(); ++k) sum += x[k];
  return sum;
}

// Launches a kernel with arguments that may name the 256 numbers x and the 64 numbers out, initially 0; in the end
// out[k] must be what `wanted` says.
#define PLANTED(kernel, grid, block, shared_bytes, wanted, ...)           \
  {#kernel, [] {                                                          \
     Floats x = Floats::counting(256, 97), out(64);                       \
     LAUNCH((planted::kernel), grid, block, shared_bytes, __VA_ARGS__);   \
     out.expect([&]([[maybe_unused]] int k) -> float { return wanted; }); \
   }}

inline constexpr Case kPlanted[] = {
    PLANTED(shared_write_past_end, 1, 64, 0, 1, out.data()),
    PLANTED(shared_read_past_end, 1, 64, 0, 1, out.data()),
    PLANTED(dynamic_shared_too_small, 1, 64, 63 * 4, 1, out.data()),
    PLANTED(global_write_past_end, 2, 33, 0, 1, out.data()),
    PLANTED(global_read_past_end, 2, 33, 0, x[192 + k], x.data() + 192, out.data(), 64),
    PLANTED(misaligned_vector, 1, 32, 0, k < 32 ? x[4 * k + 1] : 0, x.data(), out.data()),

    PLANTED(no_barrier, 1, 64, 0, x[63 - k], x.data(), out.data()),
    PLANTED(no_barrier_lower_neighbour, 1, 64, 0, k > 0 ? x[k - 1] : 0, x.data(), out.data()),
    PLANTED(no_second_barrier, 1, 64, 0, total(x), x.data(), out.data(), 4),
    PLANTED(no_syncwarp, 1, 32, 0, k == 0 ? 528 : 0, x.data(), out.data()),
    PLANTED(read_by_other_warp, 1, 64, 0, x[0], x.data(), out.data()),
    PLANTED(shuffle_for_syncwarp, 1, 32, 0, k < 32 ? x[k ^ 1] : 0, x.data(), out.data()),
    PLANTED(half_syncwarp, 1, 32, 0, k < 32 ? x[k ^ 16] : 0, x.data(), out.data()),
    PLANTED(no_atomic, 4, 64, 0, k == 0 ? total(x) : 0, x.data(), out.data()),
    PLANTED(all_write, 1, 64, 0, k == 0, x.data(), out.data()),
    PLANTED(atomic_and_plain, 1, 64, 0, 1, x.data(), out.data()),
    PLANTED(vector_overlap, 1, 64, 0, 1, out.data()),
    PLANTED(blocks_not_ordered, 4, 1, 0, k == 0 ? 4 : k <= 4, out.data() + 1, out.data()),
    PLANTED(uninitialised_shared, 1, 64, 0, k == 0 ? 64 : 0, out.data()),

    PLANTED(copy_not_awaited, 1, 64, 256, x[k], x.data(), out.data()),
    PLANTED(copy_awaited_too_late, 1, 64, 256, x[63 - k], x.data(), out.data()),
    PLANTED(copy_without_barrier, 1, 64, 256, x[63 - k], x.data(), out.data()),
    PLANTED(copy_refills_too_early, 1, 64, 256, x[63 - k] + x[127 - k], x.data(), out.data()),
    PLANTED(copy_misaligned, 1, 1, 16, k == 0 ? x[1] : 0, x.data(), out.data()),
    PLANTED(copy_abandoned, 1, 64, 256, 0, x.data()),

    PLANTED(divergent_barrier, 1, 64, 0, k >= 32, out.data()),
    PLANTED(return_before_barrier, 1, 64, 0, k < 40, out.data()),
    PLANTED(half_of_shuffle, 1, 64, 0, k % 32 < 16 ? 2 : 1, out.data()),
    PLANTED(shuffle_from_missing_lane, 1, 48, 0, k == 0 ? 32 : out[k], out.data()),
    PLANTED(shuffle_outside_mask, 1, 32, 0, 0, out.data()),
    PLANTED(shuffle_width, 1, 32, 0, 0, out.data()),
    PLANTED(different_collectives, 1, 32, 0, k < 32 ? 2 : 0, out.data()),

    PLANTED(too_much_shared, 1, 64, 32 * 1024, 1, out.data()),
    PLANTED(too_much_dynamic_shared, 1, 64, 48 * 1024 + 1, 0, out.data()),
    PLANTED(empty_grid, 0, 64, 0, 0, out.data()),
    PLANTED(too_many_threads, 1, 2048, 0, 0, out.data()),
};
#undef PLANTED
#undef LAUNCH

}  // namespace cases
