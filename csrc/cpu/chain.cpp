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

// A step of the first kKept elements of some blocks of kWidth rows, side by side, as soon as their
// noise is there: groups in lockstep, as in fill.h.
template <int kKept, int kGroups>
SK_INLINE void step_blocks(float* x, const float* s, const LaneCounters* const (&rows)[kGroups],
                           const uint32_t (&blocks)[kGroups], const NoiseKey& key, uint32_t step,
                           Line k) {
  Half even[kGroups], odd[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    const Counters counters = {Vector::load(rows[g]->block) + U(blocks[g]),
                               Vector::load(rows[g]->draw) + U(step), Vector::load(rows[g]->low),
                               Vector::load(rows[g]->high)};
    even[g] = counters.even();
    odd[g] = counters.odd();
  }
  alignas(64) float z[kGroups * kKept * kWidth];
  const RoundKeys keys = {uint32_t(key.seed), uint32_t(key.seed >> 32)};
  finish<NormalMap, ByLanes<kKept>>(z, even, odd, keys, 0);
  for (int i = 0; i < kGroups * kKept * kWidth; i += kWidth)
    Vector::store(x + i, affine(F(k.a), Vector::load(x + i), F(k.b), Vector::load(s + i), F(k.c),
                                Vector::load(z + i)));
}

// Rows of one block, of kKept elements.
template <int kKept>
SK_INLINE void step_short(float* x, const float* s, const std::vector<LaneCounters>& rows,
                          const NoiseKey& key, uint32_t step, Line k) {
  size_t g = 0;
  for (; kLockstep == 2 && g + 1 < rows.size(); g += 2) {
    step_blocks<kKept, 2>(x, s, {&rows[g], &rows[g + 1]}, {0, 0}, key, step, k);
    x += 2 * kKept * kWidth, s += 2 * kKept * kWidth;
  }
  for (; g < rows.size(); ++g, x += kKept * kWidth, s += kKept * kWidth)
    step_blocks<kKept, 1>(x, s, {&rows[g]}, {0}, key, step, k);
}

// A step with noise of groups of rows [groups][elements][kWidth].
SK_INLINE void step_groups(float* x, const float* s, const std::vector<LaneCounters>& rows,
                           const NoiseKey& key, uint64_t elements, uint32_t step, Line k) {
  const uint32_t whole = uint32_t(elements / 4), last = uint32_t(elements % 4);
  if (whole == 0) {
    if (last == 1) return step_short<1>(x, s, rows, key, step, k);
    if (last == 2) return step_short<2>(x, s, rows, key, step, k);
    return step_short<3>(x, s, rows, key, step, k);
  }
  constexpr int kBlockFloats = 4 * kWidth;
  for (const LaneCounters& row : rows) {
    uint32_t b = 0;
    for (; kLockstep == 2 && b + 1 < whole; b += 2, x += 2 * kBlockFloats, s += 2 * kBlockFloats)
      step_blocks<4, 2>(x, s, {&row, &row}, {b, b + 1}, key, step, k);
    for (; b < whole; ++b, x += kBlockFloats, s += kBlockFloats)
      step_blocks<4, 1>(x, s, {&row}, {b}, key, step, k);
    if (last == 1) step_blocks<1, 1>(x, s, {&row}, {whole}, key, step, k);
    if (last == 2) step_blocks<2, 1>(x, s, {&row}, {whole}, key, step, k);
    if (last == 3) step_blocks<3, 1>(x, s, {&row}, {whole}, key, step, k);
    x += last * kWidth, s += last * kWidth;
  }
}

#else

SK_INLINE void step_groups(float* x, const float* s, const std::vector<LaneCounters>& rows,
                           const NoiseKey& key, uint64_t elements, uint32_t step, Line k) {
  for (const LaneCounters& row : rows)
    for (uint64_t first = 0; first < elements; first += 4) {
      const uint64_t kept = std::min<uint64_t>(4, elements - first);
      for (int i = 0; i < kWidth; ++i) {
        float z[4];
        const Counter at = {0, row.draw[i] + step, row.low[i], row.high[i], 1};
        map_words<NormalMap>(words_of(key, at, row.block[i] + uint32_t(first / 4)), z);
        for (uint64_t e = 0; e < kept; ++e) {
          float& to = x[e * kWidth + i];
          to = affine(k.a, to, k.b, s[e * kWidth + i], k.c, z[e]);
        }
      }
      x += kept * kWidth, s += kept * kWidth;
    }
}

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

SK_INLINE void end_step(const ChainArgs& args, float* x, uint64_t size) {
  const float low = args.low, high = args.high;
  if (args.end == End::kClamp) {
#pragma omp simd
    for (uint64_t i = 0; i < size; ++i) x[i] = clamped(x[i], low, high);
  } else if (args.end == End::kWrap) {
#pragma omp simd
    for (uint64_t i = 0; i < size; ++i) x[i] = wrapped(x[i], low, high);
  }
}

// `groups` times kWidth rows through all steps.
void run_block(const ChainArgs& args, uint64_t row, uint64_t groups) {
  const uint64_t elements = args.elements, group = elements * kWidth, size = groups * group;
  const Memory m(size);
  std::vector<LaneCounters> counters;
  counters.reserve(groups);
  for (uint64_t g = 0; g < groups; ++g) counters.emplace_back(args, row + g * kWidth);
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
      step_groups(m.x, m.s, counters, args.key, elements, uint32_t(t), line);
    } else {
#pragma omp simd
      for (uint64_t i = 0; i < size; ++i) m.x[i] = affine(line.a, m.x[i], line.b, m.s[i]);
    }
    end_step(args, m.x, size);
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
