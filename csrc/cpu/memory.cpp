#include <torch/csrc/stable/library.h>

#if defined(__GLIBC__)
#include <malloc.h>

#include <climits>
#endif

namespace metafast {
namespace {

// glibc gives large blocks back to the system at each free, so that every training step writes to fresh pages.
// Taking them from the heap and never trimming it keeps the pages. False where the C library has no such setting.
bool keep_pages() {
#if defined(__GLIBC__)
  return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, INT_MAX) == 1 && mallopt(M_TOP_PAD, 64 << 20) == 1;
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metafast, CompositeExplicitAutograd, m) { m.impl("keep_pages", TORCH_BOX(&keep_pages)); }

}  // namespace metafast
