// score_kernels._cpu: the kernels of the best instruction set this processor has, on raw pointers.
#include <algorithm>
#include <atomic>
#include <iterator>
#include <optional>
#include <vector>

#include "../bindings.h"
#include "kernels.h"

#ifdef _OPENMP
#include <omp.h>
#endif

// Kernels after fork(). GNU's OpenMP keeps the pool of the thread that forks, whose threads are not
// there in the child: a child's first parallel region would wait for them for ever (torch's own
// kernels do). So the pool is dissolved before a fork, and parent and child make new ones when they
// need them; where it cannot be, as inside a parallel region, the child's kernels run on one
// thread. Other OpenMP libraries than GNU's see to forks themselves.
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

// The best, until set_isa.
std::atomic<const Isa*> current{std::find_if(std::begin(kIsas), std::end(kIsas),
                                             [](const Isa& isa) { return isa.supported(); })};

void set_isa(const std::string& name) {
  for (const Isa& isa : kIsas)
    if (isa.supported() && name == isa.name) {
      current = &isa;
      return;
    }
  std::string known;
  for (const std::string& isa : supported_isas()) known += (known.empty() ? "" : ", ") + isa;
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

int openmp_threads() {
#ifdef _OPENMP
  return sk::one_thread ? 1 : omp_get_max_threads();
#else
  return 0;
#endif
}

// Other Python threads run during a long kernel; for a short one the hand-over costs more.
constexpr uint64_t kHoldGil = 4096;

template <class Args>
void run(void (*kernel)(const Args&), const Args& args) {
  std::optional<py::gil_scoped_release> release;
  sk::require_in_range(args.key, args.rows, args.elements);
  if (args.elements > kHoldGil || args.rows * args.elements > kHoldGil) release.emplace();
  kernel(args);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  survive_forks();
  m.doc() = "score_kernels' native CPU kernels. Private: score_kernels.ops is the checked door.";
  m.def("isas", &supported_isas, "Instruction sets built and supported here, best first.");
  m.def("isa", [] { return current.load()->name; }, "The instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"), "Use another instruction set (for tests).");
  m.def("openmp_threads", &openmp_threads,
        "Threads a kernel may use; 0 when built without OpenMP.");
#define SK_BIND(op, Args) \
  if (kIsas[0].op)        \
    sk::bind<sk::Args>(m, #op, [](const sk::Args& args) { run(current.load()->op, args); });
  SK_OPS(SK_BIND)
}
