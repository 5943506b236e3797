// Which vector width the CPU kernels use.
#pragma once

#include <cstdint>

namespace metafast {

enum class Isa : int64_t { baseline = 128, avx2 = 256, avx512 = 512 };

// The machine's widest, or a narrower one chosen with the operator vector_bits.
Isa isa();

}  // namespace metafast
