#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>

#include <atomic>

#include "check.h"

namespace metafast {
namespace {

Isa widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return Isa::avx2;
  }
#endif
  return Isa::baseline;
}

std::atomic<Isa> chosen{widest()};

// Sets the vector width (0 leaves it) and returns the one in use; the tests run every width with it.
int64_t vector_bits(int64_t bits) {
  if (bits != 0) {
    const Isa wanted = static_cast<Isa>(bits);
    if (wanted != Isa::baseline && wanted != Isa::avx2 && wanted != Isa::avx512) {
      fail("vector_bits: expected 0, 128, 256 or 512, got ", bits);
    }
    if (wanted > widest()) {
      fail("vector_bits: this machine has ", static_cast<int64_t>(widest()), ", got ", bits);
    }
    chosen.store(wanted, std::memory_order_relaxed);
  }
  return static_cast<int64_t>(chosen.load(std::memory_order_relaxed));
}

}  // namespace

Isa isa() { return chosen.load(std::memory_order_relaxed); }

STABLE_TORCH_LIBRARY_IMPL(metafast, CompositeExplicitAutograd, m) { m.impl("vector_bits", TORCH_BOX(&vector_bits)); }

}  // namespace metafast
