// The affine step x <- a x + b score + c z.
#include "../update.h"

#include "score.h"

namespace sk {
namespace SK_ISA {

namespace {

// Coefficients by value: a reference to a float could alias `out` and would stop vectorisation.
SK_INLINE void combine(float* out, const float* x, const float* score, const float* z,
                       uint64_t count, float a, float b, float c) {
#pragma omp simd
  for (uint64_t i = 0; i < count; ++i) out[i] = affine(a, x[i], b, score[i], c, z[i]);
}

SK_INLINE void combine(float* out, const float* x, const float* score, uint64_t count, float a,
                       float b) {
#pragma omp simd
  for (uint64_t i = 0; i < count; ++i) out[i] = affine(a, x[i], b, score[i]);
}

}  // namespace

void affine_step(const AffineArgs& args) {
  for_each_tile(args.rows, args.elements, [args](const Tile& tile) {
    alignas(64) float z[kTileBuffer], converted[kTile];
    const float* x = args.x + tile.offset;
    float* out = args.out + tile.offset;
    if (args.c != 0.0f)
      fill_tile<NormalMap>(z, args.key, args.elements, tile,
                           [=](uint64_t first, uint64_t count) SK_LAMBDA_INLINE {
                             prefetch<true>(out + first, count * sizeof(float));
                             if (out != x) prefetch<false>(x + first, count * sizeof(float));
                             const uint64_t size = size_of(args.score_dtype);
                             prefetch<false>(score_at(args.score, args.score_dtype, tile) +
                                                 first * size,
                                             count * size);
                           });
    const float* score = score_tile(args.score, args.score_dtype, tile, converted);
    if (args.c == 0.0f) return combine(out, x, score, tile.count, args.a, args.b);
    combine(out, x, score, z, tile.count, args.a, args.b, args.c);
  });
}

}  // namespace SK_ISA
}  // namespace sk
