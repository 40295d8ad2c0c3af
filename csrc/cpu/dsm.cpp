// Denoising score matching: noisy data, the loss of each sample, its gradient by the score.
#include "../dsm.h"

#include <vector>

#include "score.h"
#include "sums.h"

namespace sk {
namespace SK_ISA {

namespace {

SK_INLINE void perturb_row(float* out, const float* x, const float* z, uint64_t count,
                           float sigma) {
#pragma omp simd
  for (uint64_t i = 0; i < count; ++i) out[i] = perturbed(x[i], sigma, z[i]);
}

// z becomes the residual.
SK_INLINE void residual_row(float* z, const float* score, uint64_t count, float sigma) {
#pragma omp simd
  for (uint64_t i = 0; i < count; ++i) z[i] = dsm_residual(score[i], sigma, z[i]);
}

SK_INLINE double squares_of_row(const float* values, uint64_t count) {
  if (count <= kSumLanes) return short_sum(values, values, count);
  LaneSums sums;
  uint64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) sums.add(values + i, values + i, kSumLanes);
  sums.add(values + i, values + i, count - i);
  return sums.total();
}

SK_INLINE float weight_of(const DsmArgs& args, uint64_t row) {
  return args.weight ? args.weight[row] : 1.0f;
}

template <class Args, class Out>
SK_INLINE void noise_ahead(const Args& args, const Tile& tile, float* z, const void* in,
                           uint64_t in_size, Out* out) {
  const char* from = static_cast<const char*>(in) + tile.offset * in_size;
  fill_tile<NormalMap>(z, args.key, args.elements, tile,
                       [=](uint64_t first, uint64_t count) SK_LAMBDA_INLINE {
                         if (out) prefetch<true>(out + tile.offset + first, count * sizeof(Out));
                         prefetch<false>(from + first * in_size, count * in_size);
                       });
}

}  // namespace

void perturb(const PerturbArgs& args) {
  for_each_tile(args.rows, args.elements, [args](const Tile& tile) {
    alignas(64) float z[kTileBuffer];
    noise_ahead(args, tile, z, args.x, sizeof(float), args.out);
    for_each_row(tile, [&](uint64_t row, uint64_t first, uint64_t count) {
      const uint64_t at = tile.offset + first;
      perturb_row(args.out + at, args.x + at, z + first, count, args.sigma[row]);
    });
  });
}

void dsm_loss(const DsmArgs& args) {
  const Tiling tiling(args.rows, args.elements);
  const uint64_t pieces = tiling.tiles_per_row;
  std::vector<double> sums(args.rows * pieces);
  double* const partial = sums.data();
  for_each_tile(args.rows, args.elements, [args, pieces, partial](const Tile& tile) {
    alignas(64) float z[kTileBuffer], converted[kTile];
    noise_ahead(args, tile, z, args.score, size_of(args.score_dtype), args.gradient);
    const float* score = score_tile(args.score, args.score_dtype, tile, converted);
    for_each_row(tile, [&](uint64_t row, uint64_t first, uint64_t count) {
      const float sigma = args.sigma[row];
      residual_row(z + first, score + first, count, sigma);
      partial[row * pieces + tile.first / kTile] = squares_of_row(z + first, count);
      if (args.gradient)
        scale_row(args.gradient + tile.offset + first, z + first, count,
                  weight_of(args, row) * sigma);
    });
  });
  for (uint64_t row = 0; row < args.rows; ++row) {
    double total = 0.0;
    for (uint64_t i = 0; i < pieces; ++i) total += partial[row * pieces + i];
    args.loss[row] = float(0.5 * weight_of(args, row) * total);
  }
}

void dsm_gradient(const DsmArgs& args) {
  for_each_tile(args.rows, args.elements, [args](const Tile& tile) {
    alignas(64) float z[kTileBuffer], converted[kTile];
    noise_ahead(args, tile, z, args.score, size_of(args.score_dtype), args.gradient);
    const float* score = score_tile(args.score, args.score_dtype, tile, converted);
    for_each_row(tile, [&](uint64_t row, uint64_t first, uint64_t count) {
      const float sigma = args.sigma[row];
      residual_row(z + first, score + first, count, sigma);
      scale_row(args.gradient + tile.offset + first, z + first, count,
                args.upstream[row] * (weight_of(args, row) * sigma));
    });
  });
}

}  // namespace SK_ISA
}  // namespace sk
