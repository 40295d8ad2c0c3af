// The affine step x <- a x + b score + c z.
#include "../update.h"

#include "score.h"

namespace sk {
namespace SK_ISA {

namespace {

// The last operation of a step.
struct Unchanged {
  SK_INLINE float operator()(float x) const { return x; }
};
struct Clamp {
  float low, high;
  SK_INLINE float operator()(float x) const { return clamped(x, low, high); }
};
struct Wrap {
  float inverse, period;
  SK_INLINE float operator()(float x) const { return wrapped(x, inverse, period); }
};

// body(end), with the end of a step as a type of its own.
template <class Body>
SK_INLINE void with_end(const TableArgs& args, const Body& body) {
  if (args.end == End::kClamp) return body(Clamp{args.low, args.high});
  if (args.end == End::kWrap) return body(Wrap{args.low, args.high});
  body(Unchanged{});
}

// Coefficients by value: a reference to a float could alias `out` and would stop vectorisation.
template <class End>
SK_INLINE void combine(float* out, const float* x, const float* score, const float* z,
                       uint64_t count, float a, float b, float c, End end) {
  if (c == 0.0f) {
#pragma omp simd
    for (uint64_t i = 0; i < count; ++i) out[i] = end(affine(a, x[i], b, score[i]));
    return;
  }
#pragma omp simd
  for (uint64_t i = 0; i < count; ++i) out[i] = end(affine(a, x[i], b, score[i], c, z[i]));
}

// With a preconditioner g.
template <class End>
SK_INLINE void combine(float* out, const float* x, const float* score, const float* z,
                       const float* g, uint64_t count, float a, float b, float c, End end) {
  if (c == 0.0f) {
#pragma omp simd
    for (uint64_t i = 0; i < count; ++i) out[i] = end(affine(a, x[i], b * g[i], score[i]));
    return;
  }
#pragma omp simd
  for (uint64_t i = 0; i < count; ++i)
    out[i] = end(affine(a, x[i], b * g[i], score[i], c * gain_root(g[i]), z[i]));
}

// Known elements take the place of those that were computed.
template <class End>
SK_INLINE void keep(float* out, const float* known, const uint8_t* mask, const float* z,
                    uint64_t count, float scale, float noise_scale, End end) {
#pragma omp simd
  for (uint64_t i = 0; i < count; ++i) {
    const float value = scale * known[i];
    const float noisy = noise_scale == 0.0f ? value : fma(noise_scale, z[i], value);
    out[i] = mask[i] ? end(noisy) : out[i];
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
            args.c, Unchanged{});
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
    if (has_noise(args, tile))
      fill_normals(z, args.key, args.elements, tile, written(args.out, tile),
                   read(args.out == args.x ? nullptr : args.x, tile),
                   read(args.score, tile, args.score_dtype), read(args.precondition, tile));
    const float* score = score_tile(args.score, args.score_dtype, tile, converted);
    const auto update = [&](uint64_t row, uint64_t first, uint64_t count) {
      const Coefficients k = line_of(args, row);
      const uint64_t at = tile.offset + first;
      with_end(args, [&](auto end) {
        if (args.precondition)
          combine(args.out + at, args.x + at, score + first, z + first, args.precondition + at,
                  count, k.a, k.b, k.c, end);
        else
          combine(args.out + at, args.x + at, score + first, z + first, count, k.a, k.b, k.c, end);
        if (args.known)
          keep(args.out + at, args.known + at, args.mask + at, z + first, count, k.scale,
               k.noise_scale, end);
      });
    };
    // One line for all rows is one loop.
    if (args.per_row)
      for_each_row(tile, update);
    else
      update(0, 0, tile.count);
  });
}

}  // namespace SK_ISA
}  // namespace sk
