// What module.cpp calls. Every kernel is compiled once per instruction set (SK_ISA names the
// namespace) and chosen at run time. Pointers need no more alignment than their elements.
#pragma once

#include "../args.h"

namespace sk {

// table_step: args' own a, b and c are not read, and the table's step is null: it has been looked
// up.
#define SK_DECLARE_KERNELS(isa)                                    \
  namespace isa {                                                  \
  void fill(const FillArgs& args);                                 \
  void affine_step(const AffineArgs& args);                        \
  void table_step(const AffineArgs& args, const StepTable& table); \
  void perturb(const PerturbArgs& args);                           \
  void dsm_loss(const DsmArgs& args);                              \
  void dsm_gradient(const DsmArgs& args);                          \
  void probe(const ProbeArgs& args);                               \
  }

SK_DECLARE_KERNELS(avx512)
SK_DECLARE_KERNELS(avx2)
SK_DECLARE_KERNELS(neon)
SK_DECLARE_KERNELS(portable)

}  // namespace sk
