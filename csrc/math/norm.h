// What the derivatives of batch normalisation make of a channel's sums; metafast/norm_relu_pool.py has the formulas.
#pragma once

#include <cmath>

#include "math/host_device.h"

namespace metafast {

METAFAST_HOST_DEVICE double norm_rstd(double var, double eps) { return 1 / std::sqrt(var + eps); }

// dx = g scale + constant + (x - mean) slope.
struct NormGradients {
  double weight, bias, mean, var, constant, slope;
};

// Of the sums of g and g (x - mean), and the gradients for the statistics from elsewhere; share = 1 / pixels. The gradients
// for mean and var are those of all their uses: x's own share in them is in constant and slope.
METAFAST_HOST_DEVICE NormGradients norm_gradients(double weight, double rstd, double grad, double grad_centred,
                                                  double grad_mean, double grad_var, double share) {
  const double scale = weight * rstd, along = grad_centred * rstd;
  NormGradients to;
  to.weight = along;
  to.bias = grad;
  to.mean = grad_mean - scale * grad;
  to.var = grad_var - 0.5 * scale * rstd * along;
  to.constant = to.mean * share;
  to.slope = 2 * to.var * share;
  return to;
}

// The tangent of y is that of u scale + (x - mean) turn + offset, and dx = g turn + constant + (x - mean) bend + u slope.
struct NormSecond {
  double weight, mean, var, turn, offset, constant, bend, slope;
};

struct NormDirections {
  double weight, bias, mean, var;
};

// Of the sums of g, g (x - mean) and g u for directions u.
METAFAST_HOST_DEVICE NormSecond norm_second(double weight, double rstd, double grad, double grad_centred,
                                            double grad_direction, const NormDirections& u, double grad_var,
                                            double share) {
  const double scale = weight * rstd, along = grad_centred * rstd;
  // d rstd = rstd turned
  const double turned = -0.5 * rstd * rstd * u.var, u_scale = (u.weight + weight * turned) * rstd;
  NormSecond to;
  to.weight = (grad_direction - u.mean * grad) * rstd + turned * along;
  to.mean = -u_scale * grad;
  to.var = -0.5 * rstd * ((u_scale + scale * turned) * along + scale * to.weight);
  to.turn = u_scale;
  to.offset = u.bias - scale * u.mean;
  to.slope = 2 * share * (grad_var - 0.5 * scale * rstd * along);
  to.bend = 2 * share * to.var;
  to.constant = share * to.mean - to.slope * u.mean;
  return to;
}

}  // namespace metafast
