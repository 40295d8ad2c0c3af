// Sliced score matching: sums over a probe v that is made in the kernel, and the probe scaled.
#include <vector>

#include "score.h"
#include "sums.h"

namespace sk {
namespace SK_ISA {

namespace {

enum Sum { kVV, kVA, kVB, kAA, kSums };

struct Pieces {
  double sum[kSums];
};

// The sums of a piece of a row. A null b counts as zeros.
SK_INLINE Pieces sum_row(const float* v, const float* a, const float* b, uint64_t count) {
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

template <class Map>
void sums(const ProbeArgs& args) {
  const uint64_t pieces = Tiling(args.rows, args.elements).tiles_per_row;
  std::vector<Pieces> partial(args.rows * pieces);
  Pieces* const to = partial.data();
  for_each_tile(args.rows, args.elements, [args, pieces, to](const Tile& tile) {
    alignas(64) float v[kTileBuffer], a_tile[kTile], b_tile[kTile];
    fill_tile<Map>(v, args.key, args.elements, tile);
    const float* a = score_tile(args.a, args.dtype, tile, a_tile);
    const float* b = args.b ? score_tile(args.b, args.dtype, tile, b_tile) : nullptr;
    for_each_row(tile, [&](uint64_t row, uint64_t first, uint64_t count) {
      to[row * pieces + tile.first / kTile] =
          sum_row(v + first, a + first, b ? b + first : nullptr, count);
    });
  });
  for (uint64_t row = 0; row < args.rows; ++row)
    for (int k = 0; k < kSums; ++k) {
      double total = 0.0;
      for (uint64_t i = 0; i < pieces; ++i) total += to[row * pieces + i].sum[k];
      args.out[k * args.rows + row] = float(total);
    }
}

template <class Map>
void scale(const ProbeArgs& args) {
  for_each_tile(args.rows, args.elements, [args](const Tile& tile) {
    alignas(64) float v[kTileBuffer];
    fill_tile<Map>(v, args.key, args.elements, tile);
    for_each_row(tile, [&](uint64_t row, uint64_t first, uint64_t count) {
      scale_row(args.out + tile.offset + first, v + first, count, args.factor[row]);
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
