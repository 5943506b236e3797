// Images as the kernels of normalisation and pooling see them; the same types for every instruction set.
#pragma once

#include <cstdint>

namespace metafast {

// The images of one unit, whose channels share no statistics with those of another: a channel of a task's images that
// lie channel by channel, or all channels of a task's images whose channels lie last. Work is cut by bands, which are
// pairs of rows; the last band of an odd height is a single row.
struct Maps {
  bool last;
  int64_t images, channels, height, width;
  int64_t image_stride;   // from one image of the unit to the next
  int64_t pooled_stride;  // the same in y

  int64_t bands_per_image() const { return (height + 1) / 2; }
  int64_t bands() const { return images * bands_per_image(); }
  // Pixels before a band.
  int64_t pixels(int64_t band) const {
    const int64_t image = band / bands_per_image(), row = 2 * (band % bands_per_image());
    return (image * height + row) * width;
  }
};

// Numbers for each channel: the k-th of channel c is values[k * stride + c]. A unit of one channel has a stride of 1.
template <class A>
struct PerChannel {
  A* values;
  int64_t stride;

  A* row(int64_t k) const { return values + k * stride; }
};

// What is made of the statistics, weight and bias: z = (x - mean) scale + shift.
enum Normal { kMean, kScale, kShift, kNormals };
// The sums of the gradient g of z that a backward begins with: of g and of g (x - mean).
enum GradSums { kGrad, kGradCentred, kGradSums };
// dx = g scale + constant + (x - mean) slope, with mean and scale where they stand above.
enum Gradient { kConstant = kNormals, kSlope, kGradients };
// The second derivative's: sums of g, g (x - mean), u, u (x - mean) and g u for directions u.
enum SecondSums { kDirection = kGradSums, kDirectionCentred, kGradDirection, kSecondSums };
// dy = pool(u scale + (x - mean) turn + offset); dx = g turn + constant + (x - mean) bend + u slope.
enum Second { kTurn = kGradients, kOffset, kBend, kSeconds };

}  // namespace metafast
