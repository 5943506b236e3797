// Compiles the kernels named by METAFAST_KERNELS once for every vector width and picks the machine's one at run time.
// Standard and torch headers come first: an inline function of theirs must not be compiled for a newer instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"
#include "cpu/terms.h"
#include "dispatch.h"
#include "math/distance.h"
#include "tensor.h"

#define METAFAST_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define METAFAST_BEGIN_ISA(features) \
  METAFAST_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define METAFAST_END_ISA METAFAST_PRAGMA(clang attribute pop)
#else
#define METAFAST_BEGIN_ISA(features) METAFAST_PRAGMA(GCC push_options) METAFAST_PRAGMA(GCC target(features))
#define METAFAST_END_ISA METAFAST_PRAGMA(GCC pop_options)
#endif

#define METAFAST_VECTOR_BYTES 16
namespace metafast::baseline {
#include "cpu/simd.h"
#include METAFAST_KERNELS
}  // namespace metafast::baseline
#undef METAFAST_VECTOR_BYTES

#if defined(__x86_64__)
METAFAST_BEGIN_ISA("avx2,fma,f16c")
#define METAFAST_VECTOR_BYTES 32
namespace metafast::avx2 {
#include "cpu/simd.h"
#include METAFAST_KERNELS
}  // namespace metafast::avx2
#undef METAFAST_VECTOR_BYTES
METAFAST_END_ISA

METAFAST_BEGIN_ISA("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define METAFAST_VECTOR_BYTES 64
namespace metafast::avx512 {
#include "cpu/simd.h"
#include METAFAST_KERNELS
}  // namespace metafast::avx512
#undef METAFAST_VECTOR_BYTES
METAFAST_END_ISA

// The kernel for this machine; variadic, since template arguments hold commas.
#define METAFAST_KERNEL(...) \
  (isa() == Isa::avx512 ? &avx512::__VA_ARGS__ : (isa() == Isa::avx2 ? &avx2::__VA_ARGS__ : &baseline::__VA_ARGS__))
#else
#define METAFAST_KERNEL(...) (&baseline::__VA_ARGS__)
#endif
