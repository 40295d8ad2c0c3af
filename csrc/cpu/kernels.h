// What module.cpp calls. Every kernel is compiled once per instruction set (SK_ISA names the
// namespace) and chosen at run time. Pointers are to contiguous storage of any alignment; a batch
// is `rows` samples of `elements` each. Python owns shapes, checks and errors.
#pragma once

#include "../noise.h"

namespace sk {

enum class Kind : int { kWords = 0, kNormal = 1, kUniform = 2, kRademacher = 3 };
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Materialised noise. `out` is int64 for words, fp32 otherwise.
struct FillArgs {
  void* out;
  uint64_t rows, elements;
  Kind kind;
  NoiseKey key;
};

// out = a x + b score + c z; out may be x. c = 0 draws no noise.
struct AffineArgs {
  float* out;
  const float* x;
  const void* score;
  Dtype score_dtype;
  uint64_t rows, elements;
  float a, b, c;
  NoiseKey key;
};

#define SK_DECLARE_KERNELS(isa)           \
  namespace isa {                         \
  void fill(const FillArgs& args);        \
  void affine_step(const AffineArgs& args); \
  }

SK_DECLARE_KERNELS(avx512)
SK_DECLARE_KERNELS(avx2)
SK_DECLARE_KERNELS(portable)

}  // namespace sk
