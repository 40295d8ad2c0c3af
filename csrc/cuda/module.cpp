// score_kernels._cuda: launches on raw device pointers, on a device and stream that Python names.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "kernels.h"

namespace py = pybind11;

namespace {

using sk::Dtype;
using sk::Kind;
using sk::cuda::Place;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The device index and the stream of torch, as integers.
Place place_of(int device, uintptr_t stream) { return {device, at<void>(stream)}; }

void fill(uintptr_t out, uint64_t rows, uint64_t elements, int kind, uint64_t seed,
          uint32_t purpose, uint32_t draw, uint64_t first_sample, int device, uintptr_t stream) {
  sk::cuda::fill({at<void>(out), rows, elements, Kind(kind), {seed, first_sample, draw, purpose}},
                 place_of(device, stream));
}

void affine_step(uintptr_t out, uintptr_t x, uintptr_t score, int score_dtype, uint64_t rows,
                 uint64_t elements, float a, float b, float c, uint64_t seed, uint32_t purpose,
                 uint32_t draw, uint64_t first_sample, int device, uintptr_t stream) {
  sk::cuda::affine_step({at<float>(out),
                         at<const float>(x),
                         at<const void>(score),
                         Dtype(score_dtype),
                         rows,
                         elements,
                         a,
                         b,
                         c,
                         {seed, first_sample, draw, purpose}},
                        place_of(device, stream));
}

void table_step(uintptr_t out, uintptr_t x, uintptr_t score, int score_dtype, uint64_t rows,
                uint64_t elements, uintptr_t table, uintptr_t step, uint64_t lines,
                uint64_t columns, bool per_row, uintptr_t known, uintptr_t mask, uint64_t seed,
                uint32_t purpose, uint32_t draw, uint64_t first_sample, int device,
                uintptr_t stream) {
  sk::cuda::table_step({at<float>(out),
                        at<const float>(x),
                        at<const void>(score),
                        Dtype(score_dtype),
                        rows,
                        elements,
                        0,
                        0,
                        0,
                        {seed, first_sample, draw, purpose}},
                       {at<const float>(table), at<const int64_t>(step), lines, columns, per_row,
                        at<const float>(known), at<const uint8_t>(mask)},
                       place_of(device, stream));
}

void perturb(uintptr_t out, uintptr_t x, uintptr_t sigma, uint64_t rows, uint64_t elements,
             uint64_t seed, uint32_t purpose, uint32_t draw, uint64_t first_sample, int device,
             uintptr_t stream) {
  sk::cuda::perturb({at<float>(out),
                     at<const float>(x),
                     at<const float>(sigma),
                     rows,
                     elements,
                     {seed, first_sample, draw, purpose}},
                    place_of(device, stream));
}

// With an upstream gradient: dsm_gradient; without: dsm_loss.
void dsm(uintptr_t loss, uintptr_t gradient, uintptr_t partial, uintptr_t score, int score_dtype,
         uintptr_t sigma, uintptr_t weight, uintptr_t upstream, uint64_t rows, uint64_t elements,
         uint64_t seed, uint32_t purpose, uint32_t draw, uint64_t first_sample, int device,
         uintptr_t stream) {
  const sk::DsmArgs args = {at<float>(loss),
                            at<float>(gradient),
                            at<const void>(score),
                            Dtype(score_dtype),
                            at<const float>(sigma),
                            at<const float>(weight),
                            at<const float>(upstream),
                            rows,
                            elements,
                            {seed, first_sample, draw, purpose}};
  if (upstream)
    sk::cuda::dsm_gradient(args, place_of(device, stream));
  else
    sk::cuda::dsm_loss(args, at<float>(partial), place_of(device, stream));
}

void probe(uintptr_t out, uintptr_t partial, int kind, uintptr_t a, uintptr_t b, int dtype,
           bool differences, uintptr_t factor, uintptr_t x, uint64_t rows, uint64_t elements,
           uint64_t seed, uint32_t purpose, uint32_t draw, uint64_t first_sample, int device,
           uintptr_t stream) {
  sk::cuda::probe({at<float>(out),
                   Kind(kind),
                   at<const void>(a),
                   at<const void>(b),
                   Dtype(dtype),
                   differences,
                   at<const float>(factor),
                   at<const float>(x),
                   rows,
                   elements,
                   {seed, first_sample, draw, purpose}},
                  at<float>(partial), place_of(device, stream));
}

// How many devices there are, and why there are none.
std::pair<int, std::string> devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return {count, count ? "" : "no CUDA device"};
  // The error is told here, and not to whoever calls the runtime next.
  cudaGetLastError();
  return {0, cudaGetErrorString(error)};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "score_kernels' CUDA kernels. Private: score_kernels.ops is the checked door.";
  m.attr("archs") = SK_CUDA_ARCHS;
  m.def("devices", &devices, "(number of devices, why there are none).");
  m.def("partials", &sk::cuda::partials, "Pieces that a row of so many elements is summed in.");
  m.def("fill", &fill);
  m.def("affine_step", &affine_step);
  m.def("table_step", &table_step);
  m.def("perturb", &perturb);
  m.def("dsm", &dsm);
  m.def("probe", &probe);
}
