// The kernels of csrc/cpu, compiled once per instruction set: SK_ISA names it and the namespace
// that it is compiled in. Pointers need no more alignment than their elements, and rows and
// elements are not 0.
#pragma once

#include <stdexcept>

#include "../args.h"

namespace sk {

// Set in a child of fork() that cannot start threads.
inline bool one_thread = false;

// An error where the address of a row does not fit the noise contract.
inline void require_in_range(const NoiseKey& key, uint64_t rows, uint64_t elements) {
  if (!key.addresses || counter_of(key, rows, elements).in_range) return;
  const Address most = key.addresses[rows];
  if (most.sample >> 56)
    throw std::invalid_argument("samples: got one out of range, expected 0 <= samples < 2**56");
  if ((uint64_t{key.draw} + most.draw) >> 32)
    throw std::invalid_argument(
        "draws: got one that passes 2**32 with the key's draw, expected draw + draws < 2**32");
  throw std::invalid_argument(
      "pieces: got one out of range, expected (pieces + 1) ceil(D / 4) <= 2**32, rows being of D "
      "elements");
}

// The kernels of an instruction set, and whether this processor has it. An op without a kernel is
// null.
#define SK_MEMBER(op, Args) void (*op)(const Args& args);
struct Isa {
  const char* name;
  bool (*supported)();
  SK_OPS(SK_MEMBER)
};

#define SK_DECLARE(op, Args) __attribute__((weak)) void op(const Args& args);
#define SK_ADDRESS(op, Args) &op,
#define SK_ISA_KERNELS(isa, supported)                            \
  namespace isa {                                                 \
  SK_OPS(SK_DECLARE)                                              \
  constexpr Isa kKernels = {#isa, supported, SK_OPS(SK_ADDRESS)}; \
  }

#ifdef SK_X86
SK_ISA_KERNELS(avx512, [] {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
})
SK_ISA_KERNELS(avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); })
#endif
#ifdef SK_ARM64
SK_ISA_KERNELS(neon, [] { return true; })
#endif
SK_ISA_KERNELS(portable, [] { return true; })

// Best first.
constexpr Isa kIsas[] = {
#ifdef SK_X86
    avx512::kKernels,
    avx2::kKernels,
#endif
#ifdef SK_ARM64
    neon::kKernels,
#endif
    portable::kKernels,
};

#undef SK_MEMBER
#undef SK_DECLARE
#undef SK_ADDRESS
#undef SK_ISA_KERNELS

}  // namespace sk
