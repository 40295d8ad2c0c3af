// The kernels of every instruction set that is built, and whether this processor has it.
#pragma once

#include "kernels.h"

namespace sk {

// One entry a kernel of kernels.h.
struct Isa {
  const char* name;
  bool (*supported)();
  decltype(&portable::fill) fill;
  decltype(&portable::affine_step) affine_step;
  decltype(&portable::table_step) table_step;
  decltype(&portable::perturb) perturb;
  decltype(&portable::dsm_loss) dsm_loss;
  decltype(&portable::dsm_gradient) dsm_gradient;
  decltype(&portable::probe) probe;
};

#define SK_ISA_ROW(isa, supported)                                                         \
  {#isa,          supported,      &isa::fill,         &isa::affine_step, &isa::table_step, \
   &isa::perturb, &isa::dsm_loss, &isa::dsm_gradient, &isa::probe}

// Best first.
constexpr Isa kIsas[] = {
#ifdef SK_X86
    SK_ISA_ROW(avx512,
               [] {
                 return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
               }),
    SK_ISA_ROW(avx2,
               [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }),
#endif
#ifdef SK_ARM64
    SK_ISA_ROW(neon, [] { return true; }),
#endif
    SK_ISA_ROW(portable, [] { return true; }),
};

#undef SK_ISA_ROW

}  // namespace sk
