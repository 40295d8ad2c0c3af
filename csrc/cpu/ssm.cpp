// Sliced score matching: sums over a probe v that is made in the kernel, and the probe scaled.
#include "../ssm.h"

#include <vector>

#include "score.h"
#include "sums.h"

namespace sk {
namespace SK_ISA {

namespace {

struct Pieces {
  double sum[kProbeSums];
};

// The sums of a piece of a row. A null b counts as zeros.
SK_INLINE Pieces sum_row(const float* v, const float* a, const float* b, uint64_t count) {
  if (count <= kSumLanes)
    return {{short_sum(v, v, count), short_sum(v, a, count), b ? short_sum(v, b, count) : 0.0,
             short_sum(a, a, count)}};
  LaneSums vv, va, vb, aa;
  const auto add = [&](uint64_t first, uint64_t n) SK_LAMBDA_INLINE {
    vv.add(v + first, v + first, n);
    va.add(v + first, a + first, n);
    aa.add(a + first, a + first, n);
    if (b) vb.add(v + first, b + first, n);
  };
  uint64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) add(i, kSumLanes);
  add(i, count - i);
  return {{vv.total(), va.total(), vb.total(), aa.total()}};
}

// a and b become their mean and their difference, in the buffers.
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

SK_INLINE void store_sums(const ProbeArgs& args, uint64_t row, const Pieces& pieces) {
  for (int k = 0; k < kProbeSums; ++k) args.out[k * args.rows + row] = float(pieces.sum[k]);
}

template <class Map>
void sums(const ProbeArgs& args) {
  const uint64_t pieces = Tiling(args.rows, args.elements).tiles_per_row;
  // Rows of one piece need no second stage, and no memory for it.
  std::vector<Pieces> partial(pieces > 1 ? args.rows * pieces : 0);
  Pieces* const to = partial.data();
  for_each_tile(args.rows, args.elements, [args, pieces, to](const Tile& tile) {
    alignas(64) float v[kTileBuffer], a_tile[kTile], b_tile[kTile];
    fill_tile<Map>(v, args.key, args.elements, tile);
    const float* a = score_tile(args.a, args.dtype, tile, a_tile);
    const float* b = args.b ? score_tile(args.b, args.dtype, tile, b_tile) : nullptr;
    if (args.differences) {
      mean_and_difference(a, b, a_tile, b_tile, tile.count);
      a = a_tile, b = b_tile;
    }
    for_each_row(tile, [&](uint64_t row, uint64_t first, uint64_t count) {
      const Pieces piece = sum_row(v + first, a + first, b ? b + first : nullptr, count);
      if (pieces == 1)
        store_sums(args, row, piece);
      else
        to[row * pieces + tile.first / kTile] = piece;
    });
  });
  if (pieces == 1) return;
  for (uint64_t row = 0; row < args.rows; ++row) {
    Pieces total = {};
    for (uint64_t i = 0; i < pieces; ++i)
      for (int k = 0; k < kProbeSums; ++k) total.sum[k] += to[row * pieces + i].sum[k];
    store_sums(args, row, total);
  }
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
