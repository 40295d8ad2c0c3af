// Sums over a row that do not depend on threads, tiles' owners or the instruction set: 16 fixed
// lanes of fp32, joined in fp64 in a fixed order, a piece of at most kTile elements at a time.
#pragma once

#include "tile.h"

namespace sk {
namespace {

constexpr uint64_t kSumLanes = 16;

#if defined(SK_VECTOR)
constexpr uint64_t kSumParts = kSumLanes / kLanes;
#endif

class LaneSums {
 public:
  // Adds a[i] b[i] of at most kSumLanes elements.
  SK_INLINE void add(const float* a, const float* b, uint64_t count) {
#if defined(SK_VECTOR)
    if (count == kSumLanes) {
      for (uint64_t part = 0; part < kSumParts; ++part) {
        const uint64_t i = part * kLanes;
        wide_[part] = fma(Vector::load(a + i), Vector::load(b + i), wide_[part]);
      }
      return;
    }
    spill();
#endif
    for (uint64_t lane = 0; lane < count; ++lane)
      lanes_[lane] = fma(a[lane], b[lane], lanes_[lane]);
  }

  // After this nothing may be added.
  SK_INLINE double total() {
#if defined(SK_VECTOR)
    spill();
#endif
    double sum = 0.0;
    for (const float lane : lanes_) sum += lane;
    return sum;
  }

 private:
  alignas(64) float lanes_[kSumLanes] = {};
#if defined(SK_VECTOR)
  F wide_[4] = {F(0.0f), F(0.0f), F(0.0f), F(0.0f)};
  bool spilled_ = false;

  SK_INLINE void spill() {
    if (spilled_) return;
    for (uint64_t part = 0; part < kSumParts; ++part)
      Vector::store(lanes_ + part * kLanes, wide_[part]);
    spilled_ = true;
  }
#endif
};

// What LaneSums gives for at most kSumLanes elements, one a lane, without the lanes: short rows
// spend their time on setting those up.
SK_INLINE double short_sum(const float* a, const float* b, uint64_t count) {
  double sum = 0.0;
  for (uint64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

SK_INLINE void scale_row(float* out, const float* values, uint64_t count, float factor) {
#pragma omp simd
  for (uint64_t i = 0; i < count; ++i) out[i] = factor * values[i];
}

}  // namespace
}  // namespace sk
