// The kernels of groups of tasks.
#include "cuda/groups.cuh"

namespace metafast::cuda {

METAFAST_GROUP_LAUNCHERS(, float)
METAFAST_GROUP_LAUNCHERS(, double)

}  // namespace metafast::cuda
