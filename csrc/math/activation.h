// The activations of inner loops.
#pragma once

namespace metafast {

// The order is that of ACTIVATIONS in metafast/mlp.py.
enum class Activation : int { relu = 0, tanh = 1 };

}  // namespace metafast
