// Denoising score matching: noisy data, the loss of each sample, its gradient by the score.
#include "../dsm.h"

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

}  // namespace

void perturb(const PerturbArgs& args) {
  for_each_tile(args.rows, args.elements, [args](const Tile& tile) {
    alignas(64) float z[kTileBuffer];
    fill_normals(z, args.key, args.elements, tile, written(args.out, tile), read(args.x, tile));
    for_each_row(tile, [&](uint64_t row, uint64_t first, uint64_t count) {
      const uint64_t at = tile.offset + first;
      perturb_row(args.out + at, args.x + at, z + first, count, args.sigma[row]);
    });
  });
}

void dsm(const DsmArgs& args) {
  const auto body = [args](const Tile& tile, const auto& add) {
    alignas(64) float z[kTileBuffer], converted[kTile];
    fill_normals(z, args.key, args.elements, tile, written(args.gradient, tile),
                 read(args.score, tile, args.score_dtype));
    const float* score = score_tile(args.score, args.score_dtype, tile, converted);
    for_each_row(tile, [&](uint64_t row, uint64_t first, uint64_t count) {
      float* residual = z + first;
      residual_row(residual, score + first, count, args.sigma[row]);
      if (args.loss) add(row, sum_up<1>({{residual}, {residual}}, count));
      if (args.gradient)
        scale_row(args.gradient + tile.offset + first, residual, count,
                  dsm_gradient_scale(args, row));
    });
  };
  sum_rows<1>(args.rows, args.elements, body, [args](uint64_t row, const Sums<1>& squares) {
    if (args.loss) args.loss[row] = dsm_loss(args, row, squares.of[0]);
  });
}

}  // namespace SK_ISA
}  // namespace sk
