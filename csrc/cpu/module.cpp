// score_kernels._cpu: the kernels of the best instruction set this processor has, on raw pointers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "fork.h"
#include "isa.h"

#ifdef _OPENMP
#include <omp.h>
#endif

// Other OpenMP libraries than GNU's see to forks themselves.
#if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__) && !defined(_WIN32)
#define SK_GNU_OPENMP
#include <pthread.h>
#if __GNUC__ >= 9
// The library that is loaded may be older than the header.
#pragma weak omp_pause_resource_all
#endif
#endif

namespace py = pybind11;

namespace {

using sk::Isa, sk::kIsas;

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas)
    if (isa.supported()) names.push_back(isa.name);
  return names;
}

const Isa* best_isa() {
  for (const Isa& isa : kIsas)
    if (isa.supported()) return &isa;
  return nullptr;
}

std::atomic<const Isa*> current{best_isa()};

void set_isa(const std::string& name) {
  std::string known;
  for (const Isa& isa : kIsas) {
    if (!isa.supported()) continue;
    if (name == isa.name) {
      current = &isa;
      return;
    }
    known += known.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw py::value_error("isa: got '" + name + "', expected one of: " + known);
}

#ifdef SK_GNU_OPENMP
thread_local bool dissolved;

void before_fork() {
#if __GNUC__ >= 9
  dissolved = omp_pause_resource_all && omp_pause_resource_all(omp_pause_soft) == 0;
#endif
}

void in_child() {
  if (!dissolved) sk::one_thread = true;
}

void survive_forks() { pthread_atfork(before_fork, nullptr, in_child); }
#else
void survive_forks() {}
#endif

// Other Python threads run during a long kernel; for a short one the hand-over costs more.
constexpr uint64_t kHoldGil = 4096;

// An address that may not be 0, as that of a tensor is whose memory was freed under it.
struct Needed {
  uintptr_t address;
  const char* name;
};

template <class Run>
void run(uint64_t rows, uint64_t elements, std::initializer_list<Needed> needed, const Run& body) {
  if (rows == 0 || elements == 0) return;
  for (const auto& [address, name] : needed)
    if (!address)
      throw py::value_error(std::string(name) + ": got a tensor whose memory was freed");
  std::optional<py::gil_scoped_release> release;
  if (elements > kHoldGil || rows * elements > kHoldGil) release.emplace();
  body();
}

void fill(uintptr_t out, uint64_t rows, uint64_t elements, int kind, uint64_t seed,
          uint32_t purpose, uint32_t draw, uint64_t first_sample) {
  run(rows, elements, {{out, "out"}}, [&] {
    current.load()->fill({reinterpret_cast<void*>(out),
                          rows,
                          elements,
                          sk::Kind(kind),
                          {seed, first_sample, draw, purpose}});
  });
}

void affine_step(uintptr_t out, uintptr_t x, uintptr_t score, int score_dtype, uint64_t rows,
                 uint64_t elements, float a, float b, float c, uint64_t seed, uint32_t purpose,
                 uint32_t draw, uint64_t first_sample) {
  run(rows, elements, {{out, "x"}, {x, "x"}, {score, "score"}}, [&] {
    current.load()->affine_step({reinterpret_cast<float*>(out),
                                 reinterpret_cast<const float*>(x),
                                 reinterpret_cast<const void*>(score),
                                 sk::Dtype(score_dtype),
                                 rows,
                                 elements,
                                 a,
                                 b,
                                 c,
                                 {seed, first_sample, draw, purpose}});
  });
}

void table_step(uintptr_t out, uintptr_t x, uintptr_t score, int score_dtype, uint64_t rows,
                uint64_t elements, uintptr_t table, uintptr_t step, uint64_t lines,
                uint64_t columns, bool per_row, uintptr_t known, uintptr_t mask, uint64_t seed,
                uint32_t purpose, uint32_t draw, uint64_t first_sample) {
  const float* line = reinterpret_cast<const float*>(table);
  if (step) {
    const int64_t at = *reinterpret_cast<const int64_t*>(step);
    if (uint64_t(at) >= lines) throw py::value_error("step: points past the table");
    line += columns * uint64_t(at);
    draw += uint32_t(at);
  }
  run(rows, elements, {{out, "x"}, {x, "x"}, {score, "score"}, {table, "table"}}, [&] {
    current.load()->table_step(
        {reinterpret_cast<float*>(out),
         reinterpret_cast<const float*>(x),
         reinterpret_cast<const void*>(score),
         sk::Dtype(score_dtype),
         rows,
         elements,
         0,
         0,
         0,
         {seed, first_sample, draw, purpose}},
        {line, nullptr, lines, columns, per_row, reinterpret_cast<const float*>(known),
         reinterpret_cast<const uint8_t*>(mask)});
  });
}

void perturb(uintptr_t out, uintptr_t x, uintptr_t sigma, uint64_t rows, uint64_t elements,
             uint64_t seed, uint32_t purpose, uint32_t draw, uint64_t first_sample) {
  run(rows, elements, {{out, "out"}, {x, "x"}, {sigma, "sigma"}}, [&] {
    current.load()->perturb({reinterpret_cast<float*>(out),
                             reinterpret_cast<const float*>(x),
                             reinterpret_cast<const float*>(sigma),
                             rows,
                             elements,
                             {seed, first_sample, draw, purpose}});
  });
}

// With an upstream gradient: dsm_gradient; without: dsm_loss. Sums of two stages find their own
// memory here: the third address is for kernels that cannot.
void dsm(uintptr_t loss, uintptr_t gradient, uintptr_t, uintptr_t score, int score_dtype,
         uintptr_t sigma, uintptr_t weight, uintptr_t upstream, uint64_t rows, uint64_t elements,
         uint64_t seed, uint32_t purpose, uint32_t draw, uint64_t first_sample) {
  const sk::DsmArgs args = {reinterpret_cast<float*>(loss),
                            reinterpret_cast<float*>(gradient),
                            reinterpret_cast<const void*>(score),
                            sk::Dtype(score_dtype),
                            reinterpret_cast<const float*>(sigma),
                            reinterpret_cast<const float*>(weight),
                            reinterpret_cast<const float*>(upstream),
                            rows,
                            elements,
                            {seed, first_sample, draw, purpose}};
  run(rows, elements, {{score, "score"}, {sigma, "sigma"}}, [&] {
    const Isa* isa = current.load();
    (upstream ? isa->dsm_gradient : isa->dsm_loss)(args);
  });
}

void probe(uintptr_t out, uintptr_t, int kind, uintptr_t a, uintptr_t b, int dtype,
           bool differences, uintptr_t factor, uintptr_t x, uint64_t rows, uint64_t elements,
           uint64_t seed, uint32_t purpose, uint32_t draw, uint64_t first_sample) {
  run(rows, elements, {{out, "out"}}, [&] {
    current.load()->probe({reinterpret_cast<float*>(out),
                           sk::Kind(kind),
                           reinterpret_cast<const void*>(a),
                           reinterpret_cast<const void*>(b),
                           sk::Dtype(dtype),
                           differences,
                           reinterpret_cast<const float*>(factor),
                           reinterpret_cast<const float*>(x),
                           rows,
                           elements,
                           {seed, first_sample, draw, purpose}});
  });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  survive_forks();
  m.doc() = "score_kernels' native CPU kernels. Private: score_kernels.ops is the checked door.";
  m.def("isas", &supported_isas, "Instruction sets built and supported here, best first.");
  m.def("isa", [] { return current.load()->name; }, "The instruction set in use.");
  m.def("set_isa", &set_isa, "Use another instruction set (for tests and bug reports).");
  m.def(
      "openmp_threads",
      [] {
#ifdef _OPENMP
        return sk::one_thread ? 1 : omp_get_max_threads();
#else
        return 0;
#endif
      },
      "Threads a kernel may use; 0 when built without OpenMP.");
  m.def("fill", &fill);
  m.def("affine_step", &affine_step);
  m.def("table_step", &table_step);
  m.def("perturb", &perturb);
  m.def("dsm", &dsm);
  m.def("probe", &probe);
}
