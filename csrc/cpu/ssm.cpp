// Sliced score matching: sums over a probe v that is made in the kernel, and the probe scaled.
#include "../ssm.h"

#include "score.h"
#include "sums.h"

namespace sk {
namespace SK_ISA {

namespace {

SK_INLINE void mean_and_difference(const float* a, const float* b, float* mean, float* difference,
                                   uint64_t count) {
#pragma omp simd
  for (uint64_t i = 0; i < count; ++i) {
    const float above = a[i], below = b[i];
    mean[i] = mean_of(above, below);
    difference[i] = above - below;
  }
}

SK_INLINE void shift_row(float* above, float* below, const float* x, const float* v, uint64_t count,
                         float step) {
#pragma omp simd
  for (uint64_t i = 0; i < count; ++i) {
    above[i] = shifted(x[i], step, v[i]);
    below[i] = shifted(x[i], -step, v[i]);
  }
}

template <class Map>
void sums(const ProbeArgs& args) {
  const auto body = [args](const Tile& tile, const auto& add) {
    alignas(64) float v_tile[kTileBuffer], a_tile[kTile], b_tile[kTile];
    fill_tile<Map>(v_tile, args.key, args.elements, tile);
    const float* a = score_tile(args.a, args.dtype, tile, a_tile);
    const float* b = args.b ? score_tile(args.b, args.dtype, tile, b_tile) : nullptr;
    if (args.differences) {
      mean_and_difference(a, b, a_tile, b_tile, tile.count);
      a = a_tile, b = b_tile;
    }
    for_each_row(tile, [&](uint64_t row, uint64_t first, uint64_t count) {
      const float *v = v_tile + first, *p = a + first, *q = b ? b + first : nullptr;
      if (q) return add(row, sum_up<kProbeSums>({{v, v, v, p}, {v, p, q, p}}, count));
      const Sums<3> sums = sum_up<3>({{v, v, p}, {v, p, p}}, count);
      add(row, {{sums.of[0], sums.of[1], 0.0, sums.of[2]}});
    });
  };
  sum_rows<kProbeSums>(args.rows, args.elements, body,
                       [args](uint64_t row, const Sums<kProbeSums>& sums) {
                         for (int k = 0; k < kProbeSums; ++k)
                           args.out[k * args.rows + row] = float(sums.of[k]);
                       });
}

template <class Map>
void scale(const ProbeArgs& args) {
  for_each_tile(args.rows, args.elements, [args](const Tile& tile) {
    alignas(64) float v[kTileBuffer];
    fill_tile<Map>(v, args.key, args.elements, tile);
    for_each_row(tile, [&](uint64_t row, uint64_t first, uint64_t count) {
      float* out = args.out + tile.offset + first;
      const float factor = args.factor[row];
      if (args.x)
        shift_row(out, out + args.rows * args.elements, args.x + tile.offset + first, v + first,
                  count, factor);
      else
        scale_row(out, v + first, count, factor);
    });
  });
}

}  // namespace

void probe(const ProbeArgs& args) {
  const bool signs = args.kind == Kind::kRademacher;
  if (args.factor)
    signs ? scale<RademacherMap>(args) : scale<NormalMap>(args);
  else
    signs ? sums<RademacherMap>(args) : sums<NormalMap>(args);
}

}  // namespace SK_ISA
}  // namespace sk
