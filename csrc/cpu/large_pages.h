// Results on large pages: most of what fresh memory costs is its page faults, one for each 4 KiB.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

#include "check.h"

namespace metafast {

// A new tensor, for whose memory the system is asked for large pages. It may have none: then nothing changes.
inline Tensor on_large_pages(Tensor tensor) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t bytes = static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  if (bytes < 2 * kPage) return tensor;
  const uintptr_t data = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (data + kPage - 1) / kPage * kPage, last = (data + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

}  // namespace metafast
