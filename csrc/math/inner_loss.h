// The losses of inner loops.
#pragma once

namespace metafast {

// The order is that of LOSSES in metafast/_inner_loss.py. Both are torch's means: the cross-entropy over rows, the squared
// error over rows and outputs.
enum class InnerLoss : int { cross_entropy = 0, mse = 1 };

}  // namespace metafast
