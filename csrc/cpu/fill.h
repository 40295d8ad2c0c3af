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

// The 4 x 4 transpose at the end of a group works within 128 bits, so that blocks are dealt to
// lanes such that the vectors come out in the order of the elements: lane 4 q + r holds block
// (kLanes / 4) r + q.
struct LaneOrder {
  uint32_t of[kLanes];
  constexpr LaneOrder() : of() {
    for (int i = 0; i < kLanes; ++i) of[i] = uint32_t(kLanes / 4 * (i % 4) + i / 4);
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

// The first kKept values of each block, side by side, of vectors v[i] that hold the blocks' i-th.
template <int kKept>
SK_INLINE void store_group(float* out, F (&v)[4]) {
  if constexpr (kKept == 1) {
    float values[kLanes];
    Vector::store(values, v[0]);
    for (int i = 0; i < kLanes; ++i) out[kLaneOrder.of[i]] = values[i];
  } else if constexpr (kKept == 2) {
    Vector::interleave(v[0], v[1]);
    for (int i = 0; i < 2; ++i) Vector::store(out + i * kLanes, Vector::deal_pairs(v[i]));
  } else {
    Vector::transpose(v[0], v[1], v[2], v[3]);
    for (int i = 0; i < 4; ++i)
      if constexpr (kKept == 4)
        Vector::store(out + i * kLanes, v[i]);
      else
        // What is written past a block, the next one overwrites.
        for (int q = 0; q < kLanes / 4; ++q)
          memcpy(out + kKept * (i * kLanes / 4 + q), reinterpret_cast<const float*>(&v[i]) + 4 * q,
                 4 * sizeof(float));
  }
}

// Where the values of a group go: the first kKept of each block in the order of the elements; or by
// lanes, as kKept vectors.
template <int kKept>
struct InOrder {
  static constexpr int kFloats = kKept * kLanes;
  static SK_INLINE void store(float* out, F (&v)[4]) { store_group<kKept>(out, v); }
};
template <int kKept>
struct ByLanes {
  static constexpr int kFloats = kKept * kLanes;
  static SK_INLINE void store(float* out, F (&v)[4]) {
    for (int i = 0; i < kKept; ++i) Vector::store(out + i * kLanes, v[i]);
  }
};

// The rounds from `round` on, the map, and the values of each block by Store.
template <class Map, class Store, int kGroups>
SK_INLINE void finish(float* out, Half (&even)[kGroups], Half (&odd)[kGroups], RoundKeys k,
                      int round) {
  for (; round < 9; ++round) {
    for (int g = 0; g < kGroups; ++g) {
      philox_round(even[g], k);
      philox_round(odd[g], k);
    }
    k.next();
  }
  for (int g = 0; g < kGroups; ++g, out += Store::kFloats) {
    // The last round joins the halves before it moves the high words down: fewer instructions.
    const Wide even0 = Vector::multiply(even[g].w0, Vector::wide(kPhiloxM0));
    const Wide even1 = Vector::multiply(even[g].w2, Vector::wide(kPhiloxM1));
    const Wide odd0 = Vector::multiply(odd[g].w0, Vector::wide(kPhiloxM0));
    const Wide odd1 = Vector::multiply(odd[g].w2, Vector::wide(kPhiloxM1));
    const U w0 = Vector::join_high(even1, odd1) ^ Vector::join_low(even[g].w1, odd[g].w1) ^ U(k.k0);
    const U w2 = Vector::join_high(even0, odd0) ^ Vector::join_low(even[g].w3, odd[g].w3) ^ U(k.k1);
    F v[4] = {F(0.0f), F(0.0f), F(0.0f), F(0.0f)};
    Map::apply(w0, Vector::join_low(even1, odd1), w2, Vector::join_low(even0, odd0), v);
    Store::store(out, v);
  }
}

// The first two rounds by `start`, for kGroups groups from `counters` on, kLanes apart; then the
// rest. start takes the low halves of 64-bit lanes.
template <class Map, class Store, int kGroups, class Start>
SK_INLINE void run_groups(float* out, U counters, const Start& start, RoundKeys third) {
  if constexpr (kGroups == 1) {
    Half even[1] = {start(Vector::even(counters))}, odd[1] = {start(Vector::odd(counters))};
    finish<Map, Store>(out, even, odd, third, 2);
  } else {
    static_assert(kGroups == 2);
    const U next = counters + U(uint32_t(kLanes));
    Half even[2] = {start(Vector::even(counters)), start(Vector::even(next))};
    Half odd[2] = {start(Vector::odd(counters)), start(Vector::odd(next))};
    finish<Map, Store>(out, even, odd, third, 2);
  }
}

// Consecutive blocks of one sample: only the block varies, so that half of the first two rounds
// is the same for the whole row and is done on scalars.
template <class Map, class Ahead>
SK_INLINE void fill_row(float* out, const NoiseKey& key, const Counter& row, uint32_t block,
                        uint64_t count, const Ahead& ahead) {
  RoundKeys k1 = {uint32_t(key.seed), uint32_t(key.seed >> 32)}, k2 = k1, k3;
  k2.next(), k3 = k2, k3.next();
  const uint64_t sample = uint64_t{kPhiloxM1} * row.sample_low;
  const uint64_t draw = uint64_t{kPhiloxM0} * (uint32_t(sample >> 32) ^ row.draw ^ k1.k0);
  const Wide high1 = Vector::wide(row.sample_high ^ k1.k1);
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
  const U order = Vector::load(kLaneOrder.of);
  const auto blocks = [&](uint64_t i)
                          SK_LAMBDA_INLINE { return order + U(block + uint32_t(i / 4)); };
  uint64_t i = 0;
  for (; i + (kLockstep - 1) * kGroup < count; i += kLockstep * kGroup) {
    ahead(i, kLockstep * kGroup);
    run_groups<Map, InOrder<4>, kLockstep>(out + i, blocks(i), start, k3);
  }
  if (i < count) {
    ahead(i, kGroup);
    run_groups<Map, InOrder<4>, 1>(out + i, blocks(i), start, k3);
  }
}

// Rows of one block, of kKept elements: the lanes are consecutive samples, and the block is 0.
// Again half of the first two rounds is the same for all.
template <class Map, int kKept>
SK_INLINE void fill_samples(float* out, const NoiseKey& key, uint64_t row, uint64_t rows) {
  RoundKeys k1 = {uint32_t(key.seed), uint32_t(key.seed >> 32)}, k2 = k1, k3;
  k2.next(), k3 = k2, k3.next();
  const Wide high1 = Vector::wide(key.draw ^ k1.k0), high3 = Vector::wide(k2.k1);
  const Wide zero = Vector::wide(0);
  const U order = Vector::load(kLaneOrder.of);
  constexpr uint64_t kStep = kLockstep * kLanes;
  for (uint64_t i = 0; i < rows; i += kStep, out += kKept * kStep) {
    // The high word is that of the first lane: fill_tile sees to it that no lane carries.
    const Counter first = counter_of(key, row + i, kKept);
    const uint64_t block = uint64_t{kPhiloxM1} * (first.sample_high ^ k1.k1);
    const Wide high2 = Vector::wide(uint32_t(block >> 32) ^ k2.k0);
    const Wide low2 = Vector::wide(uint32_t(block));
    const auto start = [&](Wide samples) SK_LAMBDA_INLINE {
      const Wide p1 = Vector::multiply(samples, Vector::wide(kPhiloxM1));
      const Wide p0 = Vector::multiply(Vector::exclusive(Vector::high(p1), high1, zero),
                                       Vector::wide(kPhiloxM0));
      return Half{Vector::exclusive(p1, high2, zero), low2,
                  Vector::exclusive(Vector::high(p0), high3, zero), p0};
    };
    run_groups<Map, InOrder<kKept>, kLockstep>(out, order + U(first.sample_low), start, k3);
  }
}

// Counters of kLanes blocks, in the order of the lanes.
struct Counters {
  U block, draw, low, high;

  SK_INLINE Half even() const {
    return {Vector::even(block), Vector::even(draw), Vector::even(low), Vector::even(high)};
  }
  SK_INLINE Half odd() const {
    return {Vector::odd(block), Vector::odd(draw), Vector::odd(low), Vector::odd(high)};
  }
};

// Those of kLanes rows of one block each: their addresses, transposed, are in the lanes' order.
SK_INLINE Counters load_counters(const Address* from, const NoiseKey& key) {
  F w[4];
  for (int i = 0; i < 4; ++i)
    w[i] = Vector::load(reinterpret_cast<const float*>(from + i * kLanes / 4));
  Vector::transpose(w[0], w[1], w[2], w[3]);
  return {to_bits(w[2]), to_bits(w[3]) + U(key.draw), to_bits(w[0]),
          to_bits(w[1]) | U(key.purpose << 24)};
}

// Rows of one block, of kKept elements, that have addresses.
template <class Map, int kKept>
SK_INLINE void fill_addressed(float* out, const NoiseKey& key, uint64_t row, uint64_t rows) {
  constexpr uint64_t kStep = kLockstep * kLanes;
  Address last[kStep];
  for (uint64_t i = 0; i < rows; i += kStep, out += kKept * kStep) {
    const Address* from = key.addresses + row + i;
    if (rows - i < kStep) {
      memset(last, 0, sizeof last);
      from = static_cast<const Address*>(memcpy(last, from, (rows - i) * sizeof(Address)));
    }
    Half even[kLockstep], odd[kLockstep];
    for (int g = 0; g < kLockstep; ++g) {
      const Counters counters = load_counters(from + g * kLanes, key);
      even[g] = counters.even();
      odd[g] = counters.odd();
    }
    finish<Map, InOrder<kKept>>(out, even, odd, {uint32_t(key.seed), uint32_t(key.seed >> 32)}, 0);
  }
}

// Whole short rows of several blocks: every lane has its own counter.
template <class Map>
SK_INLINE void fill_blocks(float* out, const NoiseKey& key, const Tile& tile, uint64_t elements) {
  const uint32_t blocks = uint32_t((elements + 3) / 4), total = blocks * uint32_t(tile.rows);
  uint64_t row = tile.row;
  Counter counter = counter_of(key, row, elements);
  uint32_t next = 0;
  for (uint32_t base = 0; base < total; base += kLanes) {
    alignas(64) uint32_t block[kLanes], draw[kLanes], low[kLanes], high[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int lane = 4 * (i % (kLanes / 4)) + i / (kLanes / 4);
      block[lane] = counter.block + next;
      draw[lane] = counter.draw;
      low[lane] = counter.sample_low;
      high[lane] = counter.sample_high;
      if (++next < blocks) continue;
      next = 0;
      // The lanes past the last row are not used.
      if (++row < tile.row + tile.rows) counter = counter_of(key, row, elements);
    }
    const Counters counters = {Vector::load(block), Vector::load(draw), Vector::load(low),
                               Vector::load(high)};
    Half even[1] = {counters.even()}, odd[1] = {counters.odd()};
    finish<Map, InOrder<4>>(out + 4 * base, even, odd,
                            {uint32_t(key.seed), uint32_t(key.seed >> 32)}, 0);
  }
}

// Rows of one block.
template <class Map, int kKept>
SK_INLINE void fill_short(float* out, const NoiseKey& key, const Tile& tile) {
  if (key.addresses)
    fill_addressed<Map, kKept>(out, key, tile.row, tile.rows);
  else
    fill_samples<Map, kKept>(out, key, tile.row, tile.rows);
}

// The first `elements` of every `stride` floats, moved together.
SK_INLINE void compact(float* out, const float* from, uint64_t rows, uint64_t elements,
                       uint64_t stride) {
  // Whole blocks are copied in order: what one writes past its row, the next one overwrites.
  for (uint64_t row = 0; row < rows; ++row)
    for (uint64_t i = 0; i < elements; i += 4)
      memcpy(out + row * elements + i, from + row * stride + i, 4 * sizeof(float));
}

// Several rows. Not inlined: the loops over long rows were 3% slower beside it.
template <class Map>
__attribute__((noinline)) void fill_rows(float* out, const NoiseKey& key, uint64_t elements,
                                         const Tile& tile) {
  // Whether the low word of a sample overflows within the tile's vectors.
  const bool carries = !key.addresses && uint32_t(key.first_sample + tile.row) >
                                             UINT32_MAX - (tile.rows + kLockstep * kLanes);
  switch (carries ? 0 : elements) {
    case 1:
      return fill_short<Map, 1>(out, key, tile);
    case 2:
      return fill_short<Map, 2>(out, key, tile);
    case 3:
      return fill_short<Map, 3>(out, key, tile);
    case 4:
      return fill_short<Map, 4>(out, key, tile);
  }
  if (elements % 4 == 0) return fill_blocks<Map>(out, key, tile, elements);
  alignas(64) float padded[kTileBuffer];
  fill_blocks<Map>(padded, key, tile, elements);
  compact(out, padded, tile.rows, elements, (elements + 3) / 4 * 4);
}

template <class Map, class Ahead = Nothing>
SK_INLINE void fill_tile(float* out, const NoiseKey& key, uint64_t elements, const Tile& tile,
                         const Ahead& ahead = {}) {
  if (tile.rows > 1) return fill_rows<Map>(out, key, elements, tile);
  const Counter counter = counter_of(key, tile.row, elements);
  const uint32_t block = counter.block + uint32_t(tile.first / 4);
  fill_row<Map>(out, key, counter, block, tile.count, ahead);
}

#else

template <class Map, class Ahead = Nothing>
SK_INLINE void fill_tile(float* out, const NoiseKey& key, uint64_t elements, const Tile& tile,
                         const Ahead& = {}) {
  const uint64_t per_row = tile.count / tile.rows;
  for (uint64_t row = 0; row < tile.rows; ++row) {
    const Counter counter = counter_of(key, tile.row + row, elements);
    for (uint64_t i = 0; i < per_row; i += 4) {
      const Words w = words_of(key, counter, counter.block + uint32_t((tile.first + i) / 4));
      Map::apply(w.w[0], w.w[1], w.w[2], w.w[3], out + row * elements + i);
    }
  }
}

#endif

}  // namespace
}  // namespace sk
