// The kernels of csrc/cuda: an op's function launches it on the stream of `target`, checks that,
// and throws std::runtime_error. Pointers are to device memory; rows and elements are not 0. An op
// without a kernel is null.
#pragma once

#include "../args.h"

namespace sk {

struct DeviceAndStream {
  int device;
  void* stream;
};

namespace cuda {

#define SK_DECLARE(op, Args) \
  __attribute__((weak)) void op(const Args& args, const DeviceAndStream& target);
SK_OPS(SK_DECLARE)
#undef SK_DECLARE

// Pieces that a row is summed in. It depends on the row's length alone.
uint64_t partials(uint64_t elements);

}  // namespace cuda
}  // namespace sk
