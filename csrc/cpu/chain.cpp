// A whole chain around a compiled score: a few rows at a time take all steps, so that their state
// stays in the first-level cache. Rows lie across the lanes of vectors.
#include <algorithm>
#include <vector>

#include "../update.h"
#include "tile.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace sk {
namespace SK_ISA {

namespace {

#ifdef SK_VECTOR
constexpr int kWidth = kLanes;
#else
constexpr int kWidth = 4;
#endif
// Elements of a block of rows: x and the score of one stay in the cache.
constexpr uint64_t kBlock = 1024;

using Score = void (*)(const float* x, float sigma, float* s, uint64_t groups, const float* params);

struct Line {
  float a, b, c, sigma, scale;
};

// The counters of kWidth rows, before the step and the block are added.
struct LaneCounters {
  alignas(64) uint32_t block[kWidth], draw[kWidth], low[kWidth], high[kWidth];

  LaneCounters(const ChainArgs& args, uint64_t row) {
    for (int i = 0; i < kWidth; ++i) {
      // Past the last row, its noise again.
      const uint64_t at = row + i < args.rows ? row + i : args.rows - 1;
      const Counter counter = counter_of(args.key, at, args.elements);
      block[i] = counter.block;
      draw[i] = counter.draw;
      low[i] = counter.sample_low;
      high[i] = counter.sample_high;
    }
  }
};

#ifdef SK_VECTOR

// One block of kWidth rows after two rounds of Philox, less what depends on the step: half of the
// words of even and of odd lanes.
struct Start {
  U draw, mixed;
  Wide w0[2], w1[2], w2[2];

  SK_INLINE Half at(int odd, uint32_t step) const {
    const U words = mixed ^ (draw + U(step));
    const Wide p0 =
        Vector::multiply(odd ? Vector::odd(words) : Vector::even(words), Vector::wide(kPhiloxM0));
    return {w0[odd], w1[odd], Vector::exclusive(Vector::high(p0), w2[odd], Vector::wide(0)), p0};
  }
};

SK_INLINE Start start_of(const LaneCounters& rows, uint32_t block, RoundKeys k) {
  const U low = Vector::load(rows.low), high = Vector::load(rows.high);
  const U blocks = Vector::load(rows.block) + U(block);
  const Wide samples[2] = {Vector::multiply(Vector::even(low), Vector::wide(kPhiloxM1)),
                           Vector::multiply(Vector::odd(low), Vector::wide(kPhiloxM1))};
  Start start = {Vector::load(rows.draw), Vector::join_high(samples[0], samples[1]) ^ U(k.k0)};
  RoundKeys second = k;
  second.next();
  for (int odd = 0; odd < 2; ++odd) {
    const Wide p0 =
        Vector::multiply(odd ? Vector::odd(blocks) : Vector::even(blocks), Vector::wide(kPhiloxM0));
    const Wide w2 = Vector::exclusive(
        Vector::high(p0), odd ? Vector::odd(high) : Vector::even(high), Vector::wide(k.k1));
    const Wide p1 = Vector::multiply(w2, Vector::wide(kPhiloxM1));
    start.w0[odd] = Vector::exclusive(Vector::high(p1), samples[odd], Vector::wide(second.k0));
    start.w1[odd] = p1;
    start.w2[odd] = Vector::exclusive(p0, Vector::wide(second.k1), Vector::wide(0));
  }
  return start;
}

// A step of the first kKept elements of some blocks, side by side: groups in lockstep, as in
// fill.h. `third` are the keys of the third round.
template <int kKept, int kGroups>
SK_INLINE void step_blocks(float* x, const float* s, const Start* starts, RoundKeys third,
                           uint32_t step, Line k) {
  Half even[kGroups], odd[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    even[g] = starts[g].at(0, step);
    odd[g] = starts[g].at(1, step);
  }
  alignas(64) float z[kGroups * kKept * kWidth];
  finish<NormalMap, ByLanes<kKept>>(z, even, odd, third, 2);
  for (int i = 0; i < kGroups * kKept * kWidth; i += kWidth)
    Vector::store(x + i, affine(F(k.a), Vector::load(x + i), F(k.b), Vector::load(s + i), F(k.c),
                                Vector::load(z + i)));
}

// The last, shorter blocks of `count` groups of rows, `stride` floats from one to the next.
template <int kKept>
SK_INLINE void step_last(float* x, const float* s, const Start* starts, uint64_t count,
                         uint64_t stride, RoundKeys third, uint32_t step, Line k) {
  uint64_t g = 0;
  if (kLockstep == 2 && stride == kKept * kWidth)
    for (; g + 1 < count; g += 2)
      step_blocks<kKept, 2>(x + g * stride, s + g * stride, starts + g, third, step, k);
  for (; g < count; ++g)
    step_blocks<kKept, 1>(x + g * stride, s + g * stride, starts + g, third, step, k);
}

// The noise and the update of groups of kWidth rows.
class Noise {
 public:
  Noise(const ChainArgs& args, uint64_t row, uint64_t groups)
      : blocks_(uint32_t(args.elements / 4)), last_(int(args.elements % 4)) {
    third_ = keys_ = {uint32_t(args.key.seed), uint32_t(args.key.seed >> 32)};
    third_.next(), third_.next();
    for (uint64_t g = 0; g < groups; ++g) {
      rows_.emplace_back(args, row + g * kWidth);
      if (last_) starts_.push_back(start_of(rows_.back(), blocks_, keys_));
    }
  }

  SK_INLINE void step(float* x, const float* s, uint32_t step, Line k) const {
    const uint64_t stride = (4 * blocks_ + last_) * kWidth;
    for (size_t g = 0; blocks_ && g < rows_.size(); ++g) {
      const uint64_t at = g * stride;
      uint32_t b = 0;
      for (; kLockstep == 2 && b + 1 < blocks_; b += 2) {
        const Start two[] = {start_of(rows_[g], b, keys_), start_of(rows_[g], b + 1, keys_)};
        step_blocks<4, 2>(x + at + 4 * b * kWidth, s + at + 4 * b * kWidth, two, third_, step, k);
      }
      for (; b < blocks_; ++b) {
        const Start one = start_of(rows_[g], b, keys_);
        step_blocks<4, 1>(x + at + 4 * b * kWidth, s + at + 4 * b * kWidth, &one, third_, step, k);
      }
    }
    x += 4 * blocks_ * kWidth, s += 4 * blocks_ * kWidth;
    if (last_ == 1) step_last<1>(x, s, starts_.data(), starts_.size(), stride, third_, step, k);
    if (last_ == 2) step_last<2>(x, s, starts_.data(), starts_.size(), stride, third_, step, k);
    if (last_ == 3) step_last<3>(x, s, starts_.data(), starts_.size(), stride, third_, step, k);
  }

 private:
  const uint32_t blocks_;
  const int last_;
  RoundKeys keys_, third_;
  std::vector<LaneCounters> rows_;
  std::vector<Start> starts_;
};

#else

class Noise {
 public:
  Noise(const ChainArgs& args, uint64_t row, uint64_t groups)
      : key_(args.key), elements_(args.elements) {
    for (uint64_t g = 0; g < groups; ++g) rows_.emplace_back(args, row + g * kWidth);
  }

  void step(float* x, const float* s, uint32_t step, Line k) const {
    for (const LaneCounters& row : rows_)
      for (uint64_t first = 0; first < elements_; first += 4) {
        const uint64_t kept = std::min<uint64_t>(4, elements_ - first);
        for (int i = 0; i < kWidth; ++i) {
          float z[4];
          const Counter at = {0, row.draw[i] + step, row.low[i], row.high[i], 1};
          map_words<NormalMap>(words_of(key_, at, row.block[i] + uint32_t(first / 4)), z);
          for (uint64_t e = 0; e < kept; ++e) {
            float& to = x[e * kWidth + i];
            to = affine(k.a, to, k.b, s[e * kWidth + i], k.c, z[e]);
          }
        }
        x += kept * kWidth, s += kept * kWidth;
      }
  }

 private:
  const NoiseKey key_;
  const uint64_t elements_;
  std::vector<LaneCounters> rows_;
};

#endif

// What a block of rows needs, aligned as vectors are.
struct alignas(64) Lanes {
  float v[16];
};
struct Memory {
  std::vector<Lanes> lanes;
  float *x, *s, *scaled;

  explicit Memory(uint64_t size) : lanes(3 * ((size + 15) / 16)) {
    const uint64_t step = (size + 15) / 16 * 16;
    x = lanes[0].v, s = x + step, scaled = s + step;
  }
};

// `groups` times kWidth rows through all steps.
void run_block(const ChainArgs& args, uint64_t row, uint64_t groups) {
  const uint64_t elements = args.elements, group = elements * kWidth, size = groups * group;
  const Memory m(size);
  const Noise noise(args, row, groups);
  const uint64_t rows = std::min(args.rows - row, groups * kWidth);
  const auto at = [&](uint64_t r, uint64_t e) {
    return r / kWidth * group + e * kWidth + r % kWidth;
  };
  for (uint64_t r = 0; r < rows; ++r)
    for (uint64_t e = 0; e < elements; ++e) m.x[at(r, e)] = args.x[(row + r) * elements + e];
  for (uint64_t t = 0; t < args.steps; ++t) {
    const Line line = reinterpret_cast<const Line*>(args.table)[t];
    const float* seen = m.x;
    if (line.scale != 1.0f) {
      for (uint64_t i = 0; i < size; ++i) m.scaled[i] = m.x[i] * line.scale;
      seen = m.scaled;
    }
    reinterpret_cast<Score>(args.score)(seen, line.sigma, m.s, groups, args.params);
    if (line.c != 0.0f) {
      noise.step(m.x, m.s, uint32_t(t), line);
    } else {
#pragma omp simd
      for (uint64_t i = 0; i < size; ++i) m.x[i] = affine(line.a, m.x[i], line.b, m.s[i]);
    }
  }
  for (uint64_t r = 0; r < rows; ++r)
    for (uint64_t e = 0; e < elements; ++e) args.x[(row + r) * elements + e] = m.x[at(r, e)];
}

}  // namespace

void chain(const ChainArgs& args) {
  if (args.steps == 0) return;
  NoiseKey last = args.key;
  last.draw += uint32_t(args.steps - 1);
  require_in_range(last, args.rows, args.elements);
  const uint64_t groups = (args.rows + kWidth - 1) / kWidth;
  uint64_t most = std::max<uint64_t>(1, kBlock / (args.elements * kWidth)), threads = 1;
#ifdef _OPENMP
  if (!one_thread && args.rows * args.elements * args.steps > kSerial)
    threads = uint64_t(omp_get_max_threads());
#endif
  // Every thread has as many blocks as the others.
  const uint64_t rounds = (groups + most * threads - 1) / (most * threads);
  most = (groups + rounds * threads - 1) / (rounds * threads);
  const int64_t blocks = int64_t((groups + most - 1) / most);
#pragma omp parallel for schedule(static) num_threads(int(threads)) if (threads > 1)
  for (int64_t i = 0; i < blocks; ++i)
    run_block(args, uint64_t(i) * most * kWidth, std::min(most, groups - uint64_t(i) * most));
}

}  // namespace SK_ISA
}  // namespace sk
