#include <torch/csrc/stable/library.h>

#include <string>

#if defined(USE_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace metafast {
namespace {

// How this library was built, as JSON; read by 'metafast doctor'.
std::string build_info() {
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = "gcc " __VERSION__;
#endif
#if defined(USE_CUDA)
  const std::string version = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  const std::string cuda = "\"" + version + "\", \"cuda_architectures\": \"" METAFAST_CUDA_ARCHITECTURES "\"";
#else
  const std::string cuda = "null, \"cuda_architectures\": null";
#endif
  return "{\"compiler\": \"" + compiler + "\", \"cuda\": " + cuda + "}";
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metafast, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }

}  // namespace metafast
