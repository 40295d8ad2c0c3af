// Runs CUDA sources on a CPU, unchanged: every thread of a block is a fiber, and a launch runs its
// blocks one after the other. For tests of what kernels compute; it says nothing about their speed.
//
//   SK_FIBER_ORDER   forward, reverse or random: in which order fibers run between barriers
//
// Fibers give way to each other only at __syncthreads and the warp shuffles, and both are checked:
// all threads of the block, or all lanes of a warp named in the mask, must wait at the same place
// in the source with the same arguments, else the launch fails with cudaErrorLaunchFailure. A
// launch also fails where a thread reads or writes four elements at once at an unaligned address
// (-fsanitize=alignment) or leaves an array (-fsanitize=address): those builds abort.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block runs at a time, so that a block's shared memory is one static variable.
#define __shared__ static

struct uint3 {
  uint32_t x, y, z;
};
struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(uint32_t x, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// Those of the fiber that runs.
inline dim3 gridDim, blockDim;
inline uint3 blockIdx, threadIdx;

namespace fibers {

constexpr size_t kStack = 64 * 1024;
constexpr uint32_t kWarpSize = 32;

// Where in the source a fiber waits, and for whom.
struct Wait {
  const char* file;
  int line;
  uint32_t mask, argument, width;
  bool warp;
  bool operator==(const Wait& o) const {
    return file == o.file && line == o.line && mask == o.mask && argument == o.argument &&
           width == o.width && warp == o.warp;
  }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint3 thread;
  bool done = false, waiting = false;
  Wait wait;
  double value;
};

struct Machine {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  std::function<void()> body;
  std::mt19937 random{12345};
  std::string failure;
};

inline Machine machine;
inline std::string last_failure;

inline void enter() {
  machine.body();
  machine.current->done = true;
}

inline void give_way(const Wait& wait) {
  machine.current->wait = wait;
  machine.current->waiting = true;
  swapcontext(&machine.current->context, &machine.scheduler);
}

inline std::string place(const Wait& w) {
  return std::string(w.warp ? "a shuffle at " : "__syncthreads at ") + w.file + ":" +
         std::to_string(w.line);
}

// Whether fibers [first, last) that `mask` names all wait for the same thing.
inline bool meet(size_t first, size_t last, uint32_t mask, const Wait& wait) {
  for (size_t i = first; i < last; ++i) {
    const Fiber& f = machine.fibers[i];
    if (wait.warp && !(mask >> (i - first) & 1u)) continue;
    if (f.done || !f.waiting) {
      machine.failure = place(wait) + ": a thread never came";
      return false;
    }
    if (!(f.wait == wait)) {
      machine.failure = place(wait) + ": a thread waits at " + place(f.wait) + " instead";
      return false;
    }
  }
  return true;
}

// Lets go on what has met; false if nothing can.
inline bool release() {
  std::vector<Fiber>& all = machine.fibers;
  bool any = false;
  for (size_t first = 0; first < all.size(); first += kWarpSize) {
    const size_t last = std::min(all.size(), first + kWarpSize);
    std::vector<size_t> ready;
    for (size_t i = first; i < last; ++i) {
      Fiber& f = all[i];
      if (!f.waiting || !f.wait.warp) continue;
      if (!(f.wait.mask >> (i - first) & 1u)) {
        machine.failure = place(f.wait) + ": the calling lane is not in the mask";
        return false;
      }
      if (!meet(first, last, f.wait.mask, f.wait)) return false;
      ready.push_back(i);
    }
    std::vector<double> values(last - first);
    for (const size_t i : ready) values[i - first] = all[i].value;
    for (const size_t i : ready) {
      Fiber& f = all[i];
      const uint32_t lane = uint32_t(i - first), from = lane + f.wait.argument;
      // Down: lanes past the end of their segment keep their own.
      const bool inside = lane % f.wait.width + f.wait.argument < f.wait.width;
      f.value = inside && from < values.size() ? values[from] : values[lane];
      f.waiting = false;
      any = true;
    }
  }
  if (any) return true;
  const Wait* wait = nullptr;
  for (const Fiber& f : all)
    if (f.waiting) wait = &f.wait;
  if (!wait || !meet(0, all.size(), 0, *wait)) return false;
  for (Fiber& f : all) f.waiting = false;
  return true;
}

inline void run_block() {
  std::vector<Fiber>& all = machine.fibers;
  const char* order = std::getenv("SK_FIBER_ORDER");
  const std::string name = order ? order : "forward";
  std::vector<size_t> turn(all.size());
  std::iota(turn.begin(), turn.end(), 0);
  for (size_t i = 0; i < all.size(); ++i) {
    Fiber& f = all[i];
    f.done = f.waiting = false;
    f.thread = {uint32_t(i) % blockDim.x, uint32_t(i) / blockDim.x % blockDim.y,
                uint32_t(i) / (blockDim.x * blockDim.y)};
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = &machine.scheduler;
    makecontext(&f.context, enter, 0);
  }
  for (;;) {
    if (name == "reverse") std::reverse(turn.begin(), turn.end());
    if (name == "random") std::shuffle(turn.begin(), turn.end(), machine.random);
    bool left = false;
    for (const size_t i : turn) {
      if (all[i].done) continue;
      machine.current = &all[i];
      threadIdx = all[i].thread;
      swapcontext(&machine.scheduler, &all[i].context);
      left = left || !all[i].done;
    }
    if (name == "reverse") std::reverse(turn.begin(), turn.end());
    if (!left) return;
    if (!release()) return;
  }
}

inline cudaError_t run(const dim3& grid, const dim3& block, std::function<void()> body) {
  gridDim = grid;
  blockDim = block;
  machine.body = std::move(body);
  machine.failure.clear();
  machine.fibers.resize(size_t(block.x) * block.y * block.z);
  for (Fiber& f : machine.fibers)
    if (!f.stack) f.stack.reset(new char[kStack]);
  for (uint32_t y = 0; y < grid.y; ++y)
    for (uint32_t x = 0; x < grid.x; ++x) {
      blockIdx = {x, y, 0};
      run_block();
      if (!machine.failure.empty()) {
        last_failure = machine.failure;
        return cudaErrorLaunchFailure;
      }
    }
  return cudaSuccess;
}

template <class T>
inline T shuffle_down(const char* file, int line, uint32_t mask, T value, uint32_t apart,
                      uint32_t width = kWarpSize) {
  machine.current->value = double(value);
  give_way({file, line, mask, apart, width, true});
  return T(machine.current->value);
}

}  // namespace fibers

#define __syncthreads() fibers::give_way({__FILE__, __LINE__, 0, 0, 0, false})
#define __shfl_down_sync(...) fibers::shuffle_down(__FILE__, __LINE__, __VA_ARGS__)

template <class... Parameters, class... Arguments>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config,
                                      void (*kernel)(Parameters...), Arguments&&... arguments) {
  const dim3 b = config->blockDim, g = config->gridDim;
  if (b.x * b.y * b.z == 0 || b.x * b.y * b.z > 1024 || g.x == 0 || g.y == 0 || g.y > 65535)
    return cudaErrorInvalidValue;
  std::tuple<Parameters...> held(arguments...);
  return fibers::run(g, b, [kernel, held] { std::apply(kernel, held); });
}

inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return fibers::last_failure.c_str();
  return error == cudaErrorInvalidValue ? "invalid value" : "no error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
// One, so that grids stay small and kernels go round their loops.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 1, cudaSuccess;
}
