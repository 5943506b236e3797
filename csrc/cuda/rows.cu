// The kernels that several families launch on rows.
#include "cuda/rows.cuh"

namespace metafast::cuda {

METAFAST_ROW_LAUNCHERS(, float)
METAFAST_ROW_LAUNCHERS(, double)

}  // namespace metafast::cuda
