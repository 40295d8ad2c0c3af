// The arguments of every kernel, the same for all backends. Pointers are to contiguous storage; a
// batch is `rows` samples of `elements` each. Python owns shapes, checks and errors.
#pragma once

#include "noise.h"

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

// The coefficients of an affine step where they lie, lines of `columns` floats: a, b, c and, for
// what is known, its scale and spread. The line is number *step of `lines`, and the draw is moved
// on by it; without a step it is line 0 or, with per_row, the row's own. Where `mask` is not 0 the
// result is scale known + spread z instead, whatever x and the score are. known and mask go
// together.
struct StepTable {
  const float* table;
  const int64_t* step;
  uint64_t lines, columns;
  bool per_row;
  const float* known;
  const uint8_t* mask;
};

// out = x + sigma z, sigma per row.
struct PerturbArgs {
  float* out;
  const float* x;
  const float* sigma;
  uint64_t rows, elements;
  NoiseKey key;
};

// loss = 1/2 weight sum (sigma score + z)^2 per row, and its gradient by the score: dsm_loss
// writes that of the loss itself, if `gradient` is not null; dsm_gradient writes only the gradient,
// times `upstream`. A null weight is 1.
struct DsmArgs {
  float* loss;
  float* gradient;
  const void* score;
  Dtype score_dtype;
  const float* sigma;
  const float* weight;
  const float* upstream;
  uint64_t rows, elements;
  NoiseKey key;
};

// A probe v per row, normals or random signs. Without factor: out is [4, rows], the sums v.v, v.a,
// v.b and a.a (b may be null); with `differences` a and b are replaced by (a + b) / 2 and a - b.
// With factor: out is factor v or, with x, the pair x + factor v, x - factor v, [2, rows,
// elements].
struct ProbeArgs {
  float* out;
  Kind kind;
  const void* a;
  const void* b;
  Dtype dtype;
  bool differences;
  const float* factor;
  const float* x;
  uint64_t rows, elements;
  NoiseKey key;
};

}  // namespace sk
