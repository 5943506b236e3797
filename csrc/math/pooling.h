// What a pooled pixel remembers of its 2 x 2 window, in one byte.
#pragma once

namespace metafast {

// The place of the largest pixel, row by row, or that ReLU left nothing of the window.
constexpr int kWindow = 4, kDead = 4;

}  // namespace metafast
