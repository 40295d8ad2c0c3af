// Denoising score matching: the residual of 1/2 w sum (sigma score + z)^2 and the factor that makes
// of it the derivative by the score. 1/sigma^2 is never formed.
#pragma once

#include "args.h"

namespace sk {

template <class F>
SK_INLINE F perturbed(F x, F sigma, F z) {
  return fma(sigma, z, x);
}

template <class F>
SK_INLINE F dsm_residual(F score, F sigma, F z) {
  return fma(sigma, score, z);
}

SK_INLINE float dsm_weight(const DsmArgs& args, uint64_t row) {
  return args.weight ? args.weight[row] : 1.0f;
}

SK_INLINE float dsm_loss(const DsmArgs& args, uint64_t row, double squares) {
  return float(0.5 * dsm_weight(args, row) * squares);
}

SK_INLINE float dsm_gradient_scale(const DsmArgs& args, uint64_t row) {
  const float scale = dsm_weight(args, row) * args.sigma[row];
  return args.upstream ? args.upstream[row] * scale : scale;
}

}  // namespace sk
