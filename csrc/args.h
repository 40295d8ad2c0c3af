// The arguments of every op, the same for all backends, and the list of ops. Pointers are to
// contiguous storage; a batch is `rows` samples of `elements` each. Python owns shapes and checks.
//
// A new op: its struct with the list of its fields here, its name in SK_OPS, and a function of that
// name in a file of cpu/, of cuda/, or of both.
#pragma once

#include <tuple>

#include "noise.h"
#include "update.h"

namespace sk {

enum class Kind : int { kWords = 0, kNormal = 1, kUniform = 2, kRademacher = 3 };
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A pointer that may not be null or any number; a pointer that may be null; 64 bits that Python
// gives as a signed or as an unsigned integer.
enum class Rule { kRequired, kOptional, kBits };

// The name that a field has in Python, and the members that lead to it.
template <Rule kItsRule, auto... kPath>
struct Field {
  const char* name;

  static constexpr Rule kRule = kItsRule;
  template <class Args>
  static constexpr auto& of(Args& args) {
    return (args.*....*kPath);
  }
};

// Lists of one field, to be joined by std::tuple_cat.
template <auto... kPath>
constexpr auto field(const char* name) {
  return std::make_tuple(Field<Rule::kRequired, kPath...>{name});
}
template <auto... kPath>
constexpr auto optional(const char* name) {
  return std::make_tuple(Field<Rule::kOptional, kPath...>{name});
}

template <auto kKey>
constexpr auto key_fields() {
  return std::tuple_cat(std::make_tuple(Field<Rule::kBits, kKey, &NoiseKey::seed>{"seed"}),
                        field<kKey, &NoiseKey::purpose>("purpose"),
                        field<kKey, &NoiseKey::draw>("draw"),
                        field<kKey, &NoiseKey::first_sample>("first_sample"),
                        optional<kKey, &NoiseKey::addresses>("addresses"));
}

// In a struct that is called A.
#define SK_FIELD(name) field<&A::name>(#name)
#define SK_OPTIONAL(name) optional<&A::name>(#name)

// Materialised noise. `out` is int64 for words, fp32 otherwise.
struct FillArgs {
  void* out;
  uint64_t rows, elements;
  Kind kind;
  NoiseKey key;

  static constexpr auto fields() {
    using A = FillArgs;
    return std::tuple_cat(SK_FIELD(out), SK_FIELD(rows), SK_FIELD(elements), SK_FIELD(kind),
                          key_fields<&A::key>());
  }
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

  static constexpr auto fields() {
    using A = AffineArgs;
    return std::tuple_cat(SK_FIELD(out), SK_FIELD(x), SK_FIELD(score), SK_FIELD(score_dtype),
                          SK_FIELD(rows), SK_FIELD(elements), SK_FIELD(a), SK_FIELD(b), SK_FIELD(c),
                          key_fields<&A::key>());
  }
};

// An affine step with its coefficients read from a table, `lines` lines of `columns` floats: a, b,
// c and, with `known`, a scale and a noise_scale. The line is number *step, and the draw is moved
// on by it; without a step it is line 0 or, with per_row, the row's own. Where `mask` is not 0 the
// result is scale known + noise_scale z instead, whatever x and the score are. known and mask go
// together. With `precondition`, G >= 0 for each element, it is a x + b G score + c sqrt(G) z.
// Last, `end` clamps it to [low, high], or wraps it into [0, high), low then being 1 / high.
//
// A step past the table is an error on a CPU, and coefficients of NaN on a GPU, where it is read by
// the kernel, so that a captured graph goes on from replay to replay.
struct TableArgs {
  float* out;
  const float* x;
  const void* score;
  Dtype score_dtype;
  uint64_t rows, elements;
  const float* table;
  const int64_t* step;
  uint64_t lines, columns;
  bool per_row;
  const float* known;
  const uint8_t* mask;
  const float* precondition;
  End end;
  float low, high;
  NoiseKey key;

  static constexpr auto fields() {
    using A = TableArgs;
    return std::tuple_cat(SK_FIELD(out), SK_FIELD(x), SK_FIELD(score), SK_FIELD(score_dtype),
                          SK_FIELD(rows), SK_FIELD(elements), SK_FIELD(table), SK_OPTIONAL(step),
                          SK_FIELD(lines), SK_FIELD(columns), SK_FIELD(per_row), SK_OPTIONAL(known),
                          SK_OPTIONAL(mask), SK_OPTIONAL(precondition), SK_FIELD(end),
                          SK_FIELD(low), SK_FIELD(high), key_fields<&A::key>());
  }
};

// out = x + sigma z, sigma per row.
struct PerturbArgs {
  float* out;
  const float* x;
  const float* sigma;
  uint64_t rows, elements;
  NoiseKey key;

  static constexpr auto fields() {
    using A = PerturbArgs;
    return std::tuple_cat(SK_FIELD(out), SK_FIELD(x), SK_FIELD(sigma), SK_FIELD(rows),
                          SK_FIELD(elements), key_fields<&A::key>());
  }
};

// loss = 1/2 weight sum (sigma score + z)^2 per row, and its gradient by the score. Without
// `upstream`: the loss and, if `gradient` is not null, its gradient in fp32 (on a CPU only). With
// it: only the gradient, times upstream, in fp32 on a CPU and in the score's dtype on a GPU. A null
// weight is 1. `partial`: cuda::partials(elements) floats a row, where that is more than 1.
struct DsmArgs {
  float* loss;
  float* gradient;
  float* partial;
  const void* score;
  Dtype score_dtype;
  const float* sigma;
  const float* weight;
  const float* upstream;
  uint64_t rows, elements;
  NoiseKey key;

  static constexpr auto fields() {
    using A = DsmArgs;
    return std::tuple_cat(SK_OPTIONAL(loss), SK_OPTIONAL(gradient), SK_OPTIONAL(partial),
                          SK_FIELD(score), SK_FIELD(score_dtype), SK_FIELD(sigma),
                          SK_OPTIONAL(weight), SK_OPTIONAL(upstream), SK_FIELD(rows),
                          SK_FIELD(elements), key_fields<&A::key>());
  }
};

// A probe v per row, normals or random signs. Without factor: out is [4, rows], the sums v.v, v.a,
// v.b and a.a (b may be null); with `differences` a and b are replaced by (a + b) / 2 and a - b.
// With factor: out is factor v or, with x, the pair x + factor v, x - factor v, [2, rows,
// elements]. `partial`: as in DsmArgs, for each of the four sums.
struct ProbeArgs {
  float* out;
  float* partial;
  Kind kind;
  const void* a;
  const void* b;
  Dtype dtype;
  bool differences;
  const float* factor;
  const float* x;
  uint64_t rows, elements;
  NoiseKey key;

  static constexpr auto fields() {
    using A = ProbeArgs;
    return std::tuple_cat(SK_FIELD(out), SK_OPTIONAL(partial), SK_FIELD(kind), SK_OPTIONAL(a),
                          SK_OPTIONAL(b), SK_FIELD(dtype), SK_FIELD(differences),
                          SK_OPTIONAL(factor), SK_OPTIONAL(x), SK_FIELD(rows), SK_FIELD(elements),
                          key_fields<&A::key>());
  }
};

// All steps of a chain: x <- a x + b score(scale x, sigma) + c z, with (a, b, c, sigma, scale) from
// a line of the table for each step, the draws from the key's on, each step ended as in TableArgs.
// `score` is a function of csrc/fused.h that was compiled for the same instruction set; on a CPU
// only.
struct ChainArgs {
  float* x;
  void* score;
  const float* params;
  const float* table;
  uint64_t rows, elements, steps;
  End end;
  float low, high;
  NoiseKey key;

  static constexpr auto fields() {
    using A = ChainArgs;
    return std::tuple_cat(SK_FIELD(x), SK_FIELD(score), SK_OPTIONAL(params), SK_FIELD(table),
                          SK_FIELD(rows), SK_FIELD(elements), SK_FIELD(steps), SK_FIELD(end),
                          SK_FIELD(low), SK_FIELD(high), key_fields<&A::key>());
  }
};

#define SK_OPS(OP)            \
  OP(fill, FillArgs)          \
  OP(affine_step, AffineArgs) \
  OP(table_step, TableArgs)   \
  OP(perturb, PerturbArgs)    \
  OP(dsm, DsmArgs)            \
  OP(probe, ProbeArgs)        \
  OP(chain, ChainArgs)

}  // namespace sk
