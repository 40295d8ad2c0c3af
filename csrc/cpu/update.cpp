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

// What is known takes the place of what was computed.
SK_INLINE void keep(float* out, const float* known, const uint8_t* mask, const float* z,
                    uint64_t count, float scale, float spread) {
#pragma omp simd
  for (uint64_t i = 0; i < count; ++i) {
    const float value = scale * known[i];
    const float noisy = spread == 0.0f ? value : fma(spread, z[i], value);
    out[i] = mask[i] ? noisy : out[i];
  }
}

// The coefficients of a row, by value.
struct Line {
  float a, b, c, scale, spread;
  bool noise() const { return c != 0.0f || spread != 0.0f; }
};

SK_INLINE Line line_of(const StepTable& table, uint64_t row) {
  const float* line = table.table + (table.per_row ? row * table.columns : 0);
  Line k = {line[0], line[1], line[2], 0.0f, 0.0f};
  if (table.known) k.scale = line[3], k.spread = line[4];
  return k;
}

bool has_noise(const StepTable& table, const Tile& tile) {
  for (uint64_t row = tile.row; row < tile.row + tile.rows; ++row)
    if (line_of(table, row).noise()) return true;
  return false;
}

}  // namespace

void affine_step(const AffineArgs& args) {
  for_each_tile(args.rows, args.elements, [args](const Tile& tile) {
    alignas(64) float z[kTileBuffer], converted[kTile];
    const float* x = args.x + tile.offset;
    float* out = args.out + tile.offset;
    if (args.c != 0.0f)
      fill_tile<NormalMap>(
          z, args.key, args.elements, tile, [=](uint64_t first, uint64_t count) SK_LAMBDA_INLINE {
            prefetch<true>(out + first, count * sizeof(float));
            if (out != x) prefetch<false>(x + first, count * sizeof(float));
            const uint64_t size = size_of(args.score_dtype);
            prefetch<false>(score_at(args.score, args.score_dtype, tile) + first * size,
                            count * size);
          });
    const float* score = score_tile(args.score, args.score_dtype, tile, converted);
    if (args.c == 0.0f) return combine(out, x, score, tile.count, args.a, args.b);
    combine(out, x, score, z, tile.count, args.a, args.b, args.c);
  });
}

void table_step(const AffineArgs& args, const StepTable& table) {
  for_each_tile(args.rows, args.elements, [args, table](const Tile& tile) {
    alignas(64) float z[kTileBuffer], converted[kTile];
    if (has_noise(table, tile)) fill_tile<NormalMap>(z, args.key, args.elements, tile);
    const float* score = score_tile(args.score, args.score_dtype, tile, converted);
    for_each_row(tile, [&](uint64_t row, uint64_t first, uint64_t count) {
      const Line k = line_of(table, row);
      const uint64_t at = tile.offset + first;
      if (k.c == 0.0f)
        combine(args.out + at, args.x + at, score + first, count, k.a, k.b);
      else
        combine(args.out + at, args.x + at, score + first, z + first, count, k.a, k.b, k.c);
      if (table.known)
        keep(args.out + at, table.known + at, table.mask + at, z + first, count, k.scale, k.spread);
    });
  });
}

}  // namespace SK_ISA
}  // namespace sk
