// fill_tile<Map>(out, key, elements, tile, ahead): the noise of a tile, dense, into a buffer of
// kTileBuffer floats. One text for every vector width, and a scalar one for the portable build.
//
// ahead(first, count) is called before each group of values of a long row: the place to prefetch
// what the kernel reads and writes next, while the arithmetic hides the wait.
#pragma once

#include "tile.h"

namespace sk {
namespace {

struct Nothing {
  SK_INLINE void operator()(uint64_t, uint64_t) const {}
};

#if defined(SK_VECTOR)

using F = Vector::F;
using U = Vector::U;
using Wide = Vector::Wide;
constexpr int kLanes = Vector::kLanes;
// A group is one Philox call over all lanes: kLanes blocks, four values each.
constexpr uint64_t kGroup = 4 * kLanes;
// Groups that run in lockstep: one alone waits on its own multiplications too often to fill the
// processor, and two want more registers than AVX2 has.
constexpr int kLockstep = Vector::kRegisters >= 32 ? 2 : 1;

// The shuffles at the end of a group work within 128 bits, so that blocks are dealt to lanes such
// that the vectors come out in the order of the elements: lane 4 q + r holds block
// (kLanes / 4) r + q for the 4 x 4 transpose, and the order of pairs for the interleaving of two.
struct LaneOrder {
  uint32_t quads[kLanes], pairs[kLanes];
  constexpr LaneOrder() : quads(), pairs() {
    for (int i = 0; i < kLanes; ++i) {
      const int q = i / 4, r = i % 4;
      quads[i] = uint32_t(kLanes / 4 * r + q);
      pairs[i] = uint32_t(kLanes / 2 * (r / 2) + 2 * q + r % 2);
    }
  }
};
alignas(64) constexpr LaneOrder kLaneOrder;

// Half the lanes of a Philox state (simd.h): four words in 64-bit lanes.
struct Half {
  Wide w0, w1, w2, w3;
};

struct RoundKeys {
  uint32_t k0, k1;
  SK_INLINE void next() { k0 += kPhiloxW0, k1 += kPhiloxW1; }
};

SK_INLINE void philox_round(Half& h, RoundKeys k) {
  const Wide p0 = Vector::multiply(h.w0, Vector::wide(kPhiloxM0));
  const Wide p1 = Vector::multiply(h.w2, Vector::wide(kPhiloxM1));
  h = {Vector::exclusive(Vector::high(p1), h.w1, Vector::wide(k.k0)), p1,
       Vector::exclusive(Vector::high(p0), h.w3, Vector::wide(k.k1)), p0};
}

// The rounds from `round` on, the map, and the values in the order of the elements: all four of a
// block or, with kPairs, only the first two.
template <class Map, bool kPairs, int kGroups>
SK_INLINE void finish(float* out, Half (&even)[kGroups], Half (&odd)[kGroups], RoundKeys k,
                      int round) {
  for (; round < 9; ++round) {
    for (int g = 0; g < kGroups; ++g) {
      philox_round(even[g], k);
      philox_round(odd[g], k);
    }
    k.next();
  }
  constexpr int kStores = kPairs ? 2 : 4;
  for (int g = 0; g < kGroups; ++g, out += kStores * kLanes) {
    // The last round joins the halves before it moves the high words down: fewer instructions.
    const Wide even0 = Vector::multiply(even[g].w0, Vector::wide(kPhiloxM0));
    const Wide even1 = Vector::multiply(even[g].w2, Vector::wide(kPhiloxM1));
    const Wide odd0 = Vector::multiply(odd[g].w0, Vector::wide(kPhiloxM0));
    const Wide odd1 = Vector::multiply(odd[g].w2, Vector::wide(kPhiloxM1));
    const U w0 = Vector::join_high(even1, odd1) ^ Vector::join_low(even[g].w1, odd[g].w1) ^ U(k.k0);
    const U w2 = Vector::join_high(even0, odd0) ^ Vector::join_low(even[g].w3, odd[g].w3) ^ U(k.k1);
    F v[4] = {F(0.0f), F(0.0f), F(0.0f), F(0.0f)};
    Map::apply(w0, Vector::join_low(even1, odd1), w2, Vector::join_low(even0, odd0), v);
    if constexpr (kPairs)
      Vector::interleave(v[0], v[1]);
    else
      Vector::transpose(v[0], v[1], v[2], v[3]);
    for (int i = 0; i < kStores; ++i) Vector::store(out + i * kLanes, v[i]);
  }
}

// The first two rounds by `start`, for kGroups groups from `counters` on, kLanes apart; then the
// rest. start takes the low halves of 64-bit lanes.
template <class Map, bool kPairs, int kGroups, class Start>
SK_INLINE void run_groups(float* out, U counters, const Start& start, RoundKeys third) {
  if constexpr (kGroups == 1) {
    Half even[1] = {start(Vector::even(counters))}, odd[1] = {start(Vector::odd(counters))};
    finish<Map, kPairs>(out, even, odd, third, 2);
  } else {
    static_assert(kGroups == 2);
    const U next = counters + U(uint32_t(kLanes));
    Half even[2] = {start(Vector::even(counters)), start(Vector::even(next))};
    Half odd[2] = {start(Vector::odd(counters)), start(Vector::odd(next))};
    finish<Map, kPairs>(out, even, odd, third, 2);
  }
}

// Consecutive blocks of one sample: only the block varies, so that half of the first two rounds
// is the same for the whole row and is done on scalars.
template <class Map, class Ahead>
SK_INLINE void fill_row(float* out, const NoiseKey& key, uint64_t row, uint32_t block,
                        uint64_t count, const Ahead& ahead) {
  RoundKeys k1 = {uint32_t(key.seed), uint32_t(key.seed >> 32)}, k2 = k1, k3;
  k2.next(), k3 = k2, k3.next();
  const uint64_t sample = uint64_t{kPhiloxM1} * sample_low(key, row);
  const uint64_t draw = uint64_t{kPhiloxM0} * (uint32_t(sample >> 32) ^ key.draw ^ k1.k0);
  const Wide high1 = Vector::wide(sample_high(key, row) ^ k1.k1);
  const Wide high2 = Vector::wide(uint32_t(sample) ^ k2.k0);
  const Wide high3 = Vector::wide(uint32_t(draw >> 32) ^ k2.k1);
  const Wide low3 = Vector::wide(uint32_t(draw)), zero = Vector::wide(0);
  const auto start = [&](Wide blocks) SK_LAMBDA_INLINE {
    const Wide p0 = Vector::multiply(blocks, Vector::wide(kPhiloxM0));
    const Wide p1 =
        Vector::multiply(Vector::exclusive(Vector::high(p0), high1, zero), Vector::wide(kPhiloxM1));
    return Half{Vector::exclusive(Vector::high(p1), high2, zero), p1,
                Vector::exclusive(p0, high3, zero), low3};
  };
  const U order = Vector::load(kLaneOrder.quads);
  const auto blocks = [&](uint64_t i)
                          SK_LAMBDA_INLINE { return order + U(block + uint32_t(i / 4)); };
  uint64_t i = 0;
  for (; i + (kLockstep - 1) * kGroup < count; i += kLockstep * kGroup) {
    ahead(i, kLockstep * kGroup);
    run_groups<Map, false, kLockstep>(out + i, blocks(i), start, k3);
  }
  if (i < count) {
    ahead(i, kGroup);
    run_groups<Map, false, 1>(out + i, blocks(i), start, k3);
  }
}

// Rows of one block: the lanes are consecutive samples, and the block is 0. Again half of the
// first two rounds is the same for all.
template <class Map, bool kPairs>
SK_INLINE void fill_samples(float* out, const NoiseKey& key, uint64_t row, uint64_t rows) {
  RoundKeys k1 = {uint32_t(key.seed), uint32_t(key.seed >> 32)}, k2 = k1, k3;
  k2.next(), k3 = k2, k3.next();
  const Wide high1 = Vector::wide(key.draw ^ k1.k0), high3 = Vector::wide(k2.k1);
  const Wide zero = Vector::wide(0);
  const U order = Vector::load(kPairs ? kLaneOrder.pairs : kLaneOrder.quads);
  constexpr uint64_t kStep = kLockstep * kLanes;
  for (uint64_t i = 0; i < rows; i += kStep, out += (kPairs ? 2 : 4) * kStep) {
    // The high word is that of the first lane: fill_tile sees to it that no lane carries.
    const uint64_t block = uint64_t{kPhiloxM1} * (sample_high(key, row + i) ^ k1.k1);
    const Wide high2 = Vector::wide(uint32_t(block >> 32) ^ k2.k0);
    const Wide low2 = Vector::wide(uint32_t(block));
    const auto start = [&](Wide samples) SK_LAMBDA_INLINE {
      const Wide p1 = Vector::multiply(samples, Vector::wide(kPhiloxM1));
      const Wide p0 = Vector::multiply(Vector::exclusive(Vector::high(p1), high1, zero),
                                       Vector::wide(kPhiloxM0));
      return Half{Vector::exclusive(p1, high2, zero), low2,
                  Vector::exclusive(Vector::high(p0), high3, zero), p0};
    };
    run_groups<Map, kPairs, kLockstep>(out, order + U(sample_low(key, row + i)), start, k3);
  }
}

// Whole short rows of several blocks: every lane has its own sample and block.
template <class Map>
SK_INLINE void fill_blocks(float* out, const NoiseKey& key, const Tile& tile, uint32_t blocks) {
  const uint32_t total = blocks * uint32_t(tile.rows);
  const Wide draw = Vector::wide(key.draw);
  uint64_t row = tile.row;
  uint32_t next = 0;
  for (uint32_t base = 0; base < total; base += kLanes) {
    alignas(64) uint32_t block[kLanes], low[kLanes], high[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int lane = 4 * (i % (kLanes / 4)) + i / (kLanes / 4);
      block[lane] = next;
      low[lane] = sample_low(key, row);
      high[lane] = sample_high(key, row);
      if (++next == blocks) next = 0, ++row;
    }
    const U b = Vector::load(block), l = Vector::load(low), h = Vector::load(high);
    Half even[1] = {{Vector::even(b), draw, Vector::even(l), Vector::even(h)}};
    Half odd[1] = {{Vector::odd(b), draw, Vector::odd(l), Vector::odd(h)}};
    finish<Map, false>(out + 4 * base, even, odd, {uint32_t(key.seed), uint32_t(key.seed >> 32)},
                       0);
  }
}

// The first `elements` of every `stride` floats, moved together.
SK_INLINE void compact(float* out, const float* from, uint64_t rows, uint64_t elements,
                       uint64_t stride) {
  if (elements < 4) {
    for (uint64_t row = 0; row < rows; ++row)
      for (uint64_t i = 0; i < elements; ++i) out[row * elements + i] = from[row * stride + i];
    return;
  }
  // Whole blocks are copied in order: what one writes past its row, the next one overwrites.
  for (uint64_t row = 0; row < rows; ++row)
    for (uint64_t i = 0; i < elements; i += 4)
      memcpy(out + row * elements + i, from + row * stride + i, 4 * sizeof(float));
}

template <class Map, class Ahead = Nothing>
SK_INLINE void fill_tile(float* out, const NoiseKey& key, uint64_t elements, const Tile& tile,
                         const Ahead& ahead = {}) {
  if (tile.rows == 1)
    return fill_row<Map>(out, key, tile.row, uint32_t(tile.first / 4), tile.count, ahead);
  const uint32_t blocks = uint32_t((elements + 3) / 4);
  const bool carries = sample_low(key, tile.row) > UINT32_MAX - (tile.rows + kLockstep * kLanes);
  const bool pairs = elements <= 2 && !carries;
  const uint64_t stride = pairs ? 2 : 4 * blocks;
  alignas(64) float padded[kTileBuffer];
  float* to = elements == stride ? out : padded;
  if (pairs)
    fill_samples<Map, true>(to, key, tile.row, tile.rows);
  else if (blocks == 1 && !carries)
    fill_samples<Map, false>(to, key, tile.row, tile.rows);
  else
    fill_blocks<Map>(to, key, tile, blocks);
  if (to == padded) compact(out, padded, tile.rows, elements, stride);
}

#else

template <class Map, class Ahead = Nothing>
SK_INLINE void fill_tile(float* out, const NoiseKey& key, uint64_t elements, const Tile& tile,
                         const Ahead& = {}) {
  const uint64_t per_row = tile.count / tile.rows;
  for (uint64_t row = 0; row < tile.rows; ++row)
    for (uint64_t i = 0; i < per_row; i += 4) {
      const Words w = words_of(key, tile.row + row, uint32_t((tile.first + i) / 4));
      Map::apply(w.w[0], w.w[1], w.w[2], w.w[3], out + row * elements + i);
    }
}

#endif

}  // namespace
}  // namespace sk
