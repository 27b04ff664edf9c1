// CUDA kernels on the CPU, for tests: what csrc/cuda uses of CUDA, in standard C++ with one fiber for each thread.
//
// The fibers of a block, or of all blocks of a cluster, take turns: each runs until it comes to a barrier (of its warp,
// its block or its cluster), and the next turn comes when all have. Their order is shuffled anew in each turn, so that a
// missing barrier shows, and a barrier that not all threads reach is an error instead of a hang. One block, or cluster,
// runs at a time; blocks run in a shuffled order. Dynamic shared memory and every block's part of it start as NaN.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulator {

enum class Wait { none, warp, block, cluster, done };

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
  Wait wait = Wait::none;
  dim3 thread, block;
  int rank = 0;  // of its block in the cluster
  int parity = 0;
  char* shared = nullptr;
};

// What runs now, one launch at a time on each thread of the system.
struct Machine {
  dim3 grid_size, block_size;
  int cluster_size = 1;
  std::int64_t shared_bytes = 0;
  std::vector<Fiber> fibers;         // of a cluster
  std::vector<char> stacks, shared;  // kept from launch to launch
  std::vector<std::uint64_t> slots;  // two for each fiber: what shuffles exchange
  Fiber* now = nullptr;
  jmp_buf scheduler;
  ucontext_t scheduler_context;
  std::function<void()> body;
  std::uint32_t random = 12345;
  int multiprocessors = 132;    // what kernels are chosen for
  const char* fault = nullptr;  // what ended the launch

  std::uint32_t next_random() {
    random ^= random << 13, random ^= random >> 17, random ^= random << 5;
    return random;
  }
};

inline Machine& machine() {
  static thread_local Machine m;
  return m;
}

constexpr std::int64_t kStack = 64 << 10;

inline void entry() {
  Machine& m = machine();
  m.body();
  m.now->wait = Wait::done;
  _longjmp(machine().scheduler, 1);
}

__attribute__((noinline)) inline void wait_for(Wait what) {
  Machine& m = machine();
  m.now->wait = what;
  if (_setjmp(m.now->resume) == 0) _longjmp(m.scheduler, 1);
}

// Where hardware ends the launch with an error.
[[noreturn]] __attribute__((noinline)) inline void fault(const char* what) {
  machine().fault = what;
  machine().now->wait = Wait::done;
  _longjmp(machine().scheduler, 1);
}

inline void check_aligned(const void* address, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) fault("emulator: a misaligned address");
}

__attribute__((noinline)) inline void step(Machine& m, Fiber& fiber) {
  m.now = &fiber;
  if (_setjmp(m.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

// Releases the fibers first .. first + n if all that still run wait for `what`.
inline bool release(Machine& m, std::size_t first, std::size_t n, Wait what) {
  std::size_t waiting = 0, done = 0;
  for (std::size_t i = first; i < first + n; ++i) {
    waiting += m.fibers[i].wait == what;
    done += m.fibers[i].wait == Wait::done;
  }
  if (waiting == 0 || waiting + done < n) return false;
  if (done > 0) throw std::logic_error("emulator: a barrier or shuffle after some of its threads have returned");
  for (std::size_t i = first; i < first + n; ++i) m.fibers[i].wait = Wait::none;
  return true;
}

inline void run_cluster(Machine& m, unsigned first_block) {
  const std::size_t threads = m.block_size.x, n = threads * m.cluster_size;
  m.fibers.assign(n, Fiber());
  m.slots.assign(2 * n, 0);
  if (m.stacks.size() < n * kStack) m.stacks.resize(n * kStack);
  const std::int64_t each = (m.shared_bytes + 127) / 128 * 128;
  m.shared.assign(each * m.cluster_size + 128, static_cast<char>(0xff));
  char* shared = m.shared.data();
  shared += (128 - reinterpret_cast<std::uintptr_t>(shared) % 128) % 128;
  for (std::size_t i = 0; i < n; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.rank = static_cast<int>(i / threads);
    fiber.thread = {static_cast<unsigned>(i % threads), 0, 0};
    fiber.block = {first_block + static_cast<unsigned>(fiber.rank), 0, 0};
    fiber.shared = shared + each * fiber.rank;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = m.stacks.data() + i * kStack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
  }
  std::vector<std::size_t> order(n);
  for (std::size_t i = 0; i < n; ++i) order[i] = i;
  while (true) {
    for (std::size_t i = n; i > 1; --i) std::swap(order[i - 1], order[m.next_random() % i]);
    for (std::size_t i : order)
      if (m.fibers[i].wait == Wait::none && m.fault == nullptr) step(m, m.fibers[i]);
    if (m.fault != nullptr) throw std::logic_error(std::exchange(m.fault, nullptr));
    bool released = false, finished = true;
    for (std::size_t warp = 0; warp < n; warp += 32) released |= release(m, warp, 32, Wait::warp);
    for (std::size_t block = 0; block < n; block += threads) released |= release(m, block, threads, Wait::block);
    released |= release(m, 0, n, Wait::cluster);
    for (const Fiber& fiber : m.fibers) finished &= fiber.wait == Wait::done;
    if (finished) return;
    if (!released) throw std::logic_error("emulator: threads wait for each other at different barriers");
  }
}

inline void launch(std::function<void()> body, unsigned blocks, unsigned threads, std::int64_t shared_bytes,
                   int cluster) {
  Machine& m = machine();
  if (threads % 32 != 0 || threads > 1024) throw std::logic_error("emulator: a block has whole warps, at most 32");
  if (shared_bytes > 227 * 1024) throw std::logic_error("emulator: more shared memory than an H100 has");
  if (blocks % cluster != 0) throw std::logic_error("emulator: a grid has whole clusters");
  m.grid_size = {blocks, 1, 1};
  m.block_size = {threads, 1, 1};
  m.cluster_size = cluster;
  m.shared_bytes = shared_bytes;
  m.body = std::move(body);
  std::vector<unsigned> order(blocks / cluster);
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i) * cluster;
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[m.next_random() % i]);
  for (unsigned first : order) run_cluster(m, first);
}

// What every thread of the warp gave, by lane; only after all have.
template <typename T, class Choose>
T exchange(T value, const Choose& choose) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  Machine& m = machine();
  Fiber* self = m.now;
  const std::size_t index = self - m.fibers.data(), warp = index / 32 * 32;
  self->parity ^= 1;
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  m.slots[2 * index + self->parity] = bits;
  wait_for(Wait::warp);
  return choose(
      [&](int lane) {
        T theirs;
        std::memcpy(&theirs, &m.slots[2 * (warp + (lane & 31)) + self->parity], sizeof(T));
        return theirs;
      },
      static_cast<int>(index - warp));
}

}  // namespace emulator

#define threadIdx (emulator::machine().now->thread)
#define blockIdx (emulator::machine().now->block)
#define blockDim (emulator::machine().block_size)
#define gridDim (emulator::machine().grid_size)

inline void __syncthreads() { emulator::wait_for(emulator::Wait::block); }
inline void __syncwarp(unsigned = ~0u) { emulator::wait_for(emulator::Wait::warp); }
inline void __threadfence() {}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::exchange(value, [&](auto of, int lane) { return of(lane ^ mask); });
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulator::exchange(value, [&](auto of, int) { return of(source); });
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  return emulator::exchange(predicate, [&](auto of, int) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(of(lane) != 0) << lane;
    return bits;
  });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == ~0u; }

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address += value;
  return old;
}
