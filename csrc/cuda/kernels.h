// What module.cpp calls: one launcher per op. Pointers are to device memory; a launch goes to the
// stream of `place`, is checked, and throws std::runtime_error. Rows or elements of 0 do nothing.
#pragma once

#include "../args.h"

namespace sk {
namespace cuda {

struct Place {
  int device;
  void* stream;
};

void fill(const FillArgs& args, const Place& place);
void affine_step(const AffineArgs& args, const Place& place);
// args' own a, b and c are not read. The step is, on the device, so that a captured graph goes on
// from replay to replay; past the table the coefficients are NaN.
void table_step(const AffineArgs& args, const StepTable& table, const Place& place);
void perturb(const PerturbArgs& args, const Place& place);
// `partial`: partials(elements) floats a row for each sum; unused, and may be null, if that is 1.
void dsm_loss(const DsmArgs& args, float* partial, const Place& place);
// The gradient is in the score's dtype.
void dsm_gradient(const DsmArgs& args, const Place& place);
void probe(const ProbeArgs& args, float* partial, const Place& place);

// Pieces that a row is summed in. It depends on the row's length alone.
uint64_t partials(uint64_t elements);

}  // namespace cuda
}  // namespace sk
