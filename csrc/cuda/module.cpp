// score_kernels._cuda: launches on raw device pointers, on a device and stream that Python names.
#include <cuda_runtime.h>

#include <utility>

#include "../bindings.h"
#include "kernels.h"

namespace {

template <class Args>
struct On : Args {
  sk::DeviceAndStream target;

  static constexpr auto fields() {
    return std::tuple_cat(Args::fields(),
                          sk::field<&On::target, &sk::DeviceAndStream::device>("device"),
                          sk::optional<&On::target, &sk::DeviceAndStream::stream>("stream"));
  }
};

// How many devices there are, and why there are none.
std::pair<int, std::string> devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return {count, count ? "" : "no CUDA device"};
  // The error is reported here, and not to whoever calls the runtime next.
  cudaGetLastError();
  return {0, cudaGetErrorString(error)};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "score_kernels' CUDA kernels. Private: score_kernels.ops is the checked door.";
  m.attr("archs") = SK_CUDA_ARCHS;
  m.def("devices", &devices, "(number of devices, why there are none).");
  m.def("partials", &sk::cuda::partials, pybind11::arg("elements").noconvert(),
        "Pieces that a row of so many elements is summed in.");
#define SK_BIND(op, Args) \
  if (&sk::cuda::op)      \
    sk::bind<On<sk::Args>>(m, #op, [](const auto& args) { sk::cuda::op(args, args.target); });
  SK_OPS(SK_BIND)
}
