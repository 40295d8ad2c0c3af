// The affine step x <- a x + b score + c z.
#include "../update.h"

#include "score.h"

namespace sk {
namespace SK_ISA {

namespace {

// Coefficients by value: a reference to a float could alias `out` and would stop vectorisation.
SK_INLINE void combine(float* out, const float* x, const float* score, const float* z,
                       uint64_t count, float a, float b, float c) {
  if (c == 0.0f) {
#pragma omp simd
    for (uint64_t i = 0; i < count; ++i) out[i] = affine(a, x[i], b, score[i]);
    return;
  }
#pragma omp simd
  for (uint64_t i = 0; i < count; ++i) out[i] = affine(a, x[i], b, score[i], c, z[i]);
}

// Known elements take the place of those that were computed.
SK_INLINE void keep(float* out, const float* known, const uint8_t* mask, const float* z,
                    uint64_t count, float scale, float noise_scale) {
#pragma omp simd
  for (uint64_t i = 0; i < count; ++i) {
    const float value = scale * known[i];
    const float noisy = noise_scale == 0.0f ? value : fma(noise_scale, z[i], value);
    out[i] = mask[i] ? noisy : out[i];
  }
}

SK_INLINE Coefficients line_of(const TableArgs& args, uint64_t row) {
  return read_line(args.table + (args.per_row ? row * args.columns : 0), args.known);
}

bool has_noise(const TableArgs& args, const Tile& tile) {
  for (uint64_t row = tile.row; row < tile.row + tile.rows; ++row)
    if (has_noise(line_of(args, row))) return true;
  return false;
}

}  // namespace

void affine_step(const AffineArgs& args) {
  for_each_tile(args.rows, args.elements, [args](const Tile& tile) {
    alignas(64) float z[kTileBuffer], converted[kTile];
    if (args.c != 0.0f)
      fill_normals(z, args.key, args.elements, tile, written(args.out, tile),
                   read(args.out == args.x ? nullptr : args.x, tile),
                   read(args.score, tile, args.score_dtype));
    const float* score = score_tile(args.score, args.score_dtype, tile, converted);
    combine(args.out + tile.offset, args.x + tile.offset, score, z, tile.count, args.a, args.b,
            args.c);
  });
}

void table_step(const TableArgs& from) {
  TableArgs args = from;
  if (args.step) {
    const uint64_t step = uint64_t(*args.step);
    if (step >= args.lines) throw std::invalid_argument("step: points past the table");
    args.table += step * args.columns;
    args.key.draw += uint32_t(step);
    require_in_range(args.key, args.rows, args.elements);
  }
  for_each_tile(args.rows, args.elements, [args](const Tile& tile) {
    alignas(64) float z[kTileBuffer], converted[kTile];
    if (has_noise(args, tile)) fill_tile<NormalMap>(z, args.key, args.elements, tile);
    const float* score = score_tile(args.score, args.score_dtype, tile, converted);
    for_each_row(tile, [&](uint64_t row, uint64_t first, uint64_t count) {
      const Coefficients k = line_of(args, row);
      const uint64_t at = tile.offset + first;
      combine(args.out + at, args.x + at, score + first, z + first, count, k.a, k.b, k.c);
      if (args.known)
        keep(args.out + at, args.known + at, args.mask + at, z + first, count, k.scale,
             k.noise_scale);
    });
  });
}

}  // namespace SK_ISA
}  // namespace sk
