// Sums over rows that do not depend on threads, tiles' owners or the instruction set: 16 fixed
// lanes of fp32, joined in fp64 in a fixed order, a piece of at most kTile elements at a time.
#pragma once

#include <vector>

#include "tile.h"

namespace sk {
namespace {

constexpr uint64_t kSumLanes = 16;

// The sums of a[k][i] b[k][i] over i.
template <int kSums>
struct Products {
  const float* a[kSums];
  const float* b[kSums];
};
template <int kSums>
struct Sums {
  double of[kSums];
};

template <int kSums>
SK_INLINE Sums<kSums> sum_up(const Products<kSums>& products, uint64_t count) {
  const auto& [a, b] = products;
  Sums<kSums> sums = {};
  // One element a lane, without the lanes: short rows spend their time on setting those up.
  if (count <= kSumLanes) {
    for (uint64_t i = 0; i < count; ++i)
      for (int k = 0; k < kSums; ++k) sums.of[k] += a[k][i] * b[k][i];
    return sums;
  }
  alignas(64) float lanes[kSums][kSumLanes] = {};
  uint64_t i = 0;
#if defined(SK_VECTOR)
  constexpr int kParts = kSumLanes / kLanes;
  F wide[kSums][kParts];
  for (auto& parts : wide)
    for (F& part : parts) part = F(0.0f);
  for (; i + kSumLanes <= count; i += kSumLanes)
    for (int k = 0; k < kSums; ++k)
      for (int part = 0; part < kParts; ++part) {
        const uint64_t at = i + part * kLanes;
        wide[k][part] = fma(Vector::load(a[k] + at), Vector::load(b[k] + at), wide[k][part]);
      }
  for (int k = 0; k < kSums; ++k)
    for (int part = 0; part < kParts; ++part)
      Vector::store(lanes[k] + part * kLanes, wide[k][part]);
#endif
  for (; i < count; ++i)
    for (int k = 0; k < kSums; ++k) {
      float& lane = lanes[k][i % kSumLanes];
      lane = fma(a[k][i], b[k][i], lane);
    }
  for (int k = 0; k < kSums; ++k)
    for (const float lane : lanes[k]) sums.of[k] += lane;
  return sums;
}

// body(tile, add): the tiles of a batch, with add(row, sums) for the part of a row in the tile.
// Then write(row, sums) has the whole row's.
template <int kSums, class Body, class Write>
void sum_rows(uint64_t rows, uint64_t elements, const Body& body, const Write& write) {
  const uint64_t pieces = Tiling(rows, elements).tiles_per_row;
  // Rows of one piece need no second stage, and no memory for it.
  std::vector<Sums<kSums>> partial(pieces > 1 ? rows * pieces : 0);
  Sums<kSums>* const to = partial.data();
  for_each_tile(rows, elements, [=](const Tile& tile) {
    body(tile, [&](uint64_t row, const Sums<kSums>& sums) SK_LAMBDA_INLINE {
      if (pieces == 1)
        write(row, sums);
      else
        to[row * pieces + tile.first / kTile] = sums;
    });
  });
  if (pieces == 1) return;
  for (uint64_t row = 0; row < rows; ++row) {
    Sums<kSums> total = {};
    for (uint64_t i = 0; i < pieces; ++i)
      for (int k = 0; k < kSums; ++k) total.of[k] += to[row * pieces + i].of[k];
    write(row, total);
  }
}

SK_INLINE void scale_row(float* out, const float* values, uint64_t count, float factor) {
#pragma omp simd
  for (uint64_t i = 0; i < count; ++i) out[i] = factor * values[i];
}

}  // namespace
}  // namespace sk
