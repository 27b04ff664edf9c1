// Runs CUDA kernels on the CPU, for tests: the parts of CUDA that csrc/cuda uses, in standard C++ with one fiber per
// thread.
//
// A fiber runs until it reaches a barrier (of its warp, its block or its cluster). So a missing barrier is detected,
// and a barrier that not all threads reach is an error instead of a deadlock. One block, or cluster, runs at a time. An
// Order (below) decides which fiber and which block runs next; hardware may use any order. Dynamic shared memory is
// initialised with NaN.
//
// Three environment variables, read at each launch, control the emulation:
//
//   ATTN_EMULATOR_ORDER            "turns", "first", "last", "random" or "random:7", with a seed: see Order
//   ATTN_EMULATOR_SHARED_MEMORY    bytes of shared memory that a block may have; by default as many as on an H100
//   ATTN_EMULATOR_TANH             "nan": every tanh in float32 is NaN, so that a result shows whether it needs one
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_arithmetic.h"

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

// turns: all fibers run one step each, to their next barrier, in an order that is shuffled for each turn. Then the
//   barriers are released. No warp gets ahead of the others by more than one step. Blocks run in a shuffled order.
// first: the first warp that can run does so, as far as possible, so the other warps are late. Blocks run in order.
// last: the last warp that can run does so, and the last block runs first.
// random: a random warp that can run takes one step. Warps get ahead of each other by any number of steps. Blocks are
//   shuffled.
enum class Order { turns, first, last, random };

enum class Wait { none, warp, block, cluster, done };

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
  Wait wait = Wait::none;
  dim3 thread, block;
  int rank = 0;  // the rank of its block in the cluster
  int parity = 0;
  char* shared = nullptr;
};

// The state of the running launch. Each thread of the host runs one launch at a time.
struct Machine {
  dim3 grid_size, block_size;
  int cluster_size = 1;
  std::int64_t shared_bytes = 0;
  std::vector<Fiber> fibers;         // the fibers of a cluster
  std::vector<char> stacks, shared;  // reused by later launches
  std::vector<std::uint64_t> slots;  // two per fiber, for the values of shuffles
  Fiber* now = nullptr;
  jmp_buf scheduler;
  ucontext_t scheduler_context;
  std::function<void()> body;
  std::uint32_t random = 12345;
  Order order = Order::turns;
  int multiprocessors = 132;    // of the emulated device
  const char* fault = nullptr;  // the error that ended the launch

  std::uint32_t next_random() {
    random ^= random << 13, random ^= random >> 17, random ^= random << 5;
    return random;
  }
};

inline Machine& machine() {
  static thread_local Machine m;
  return m;
}

// Bytes of shared memory that a block may have.
inline std::int64_t shared_memory_limit() {
  const char* bytes = std::getenv("ATTN_EMULATOR_SHARED_MEMORY");
  return bytes == nullptr ? 227 * 1024 : std::atoll(bytes);
}

// Sets the order of a launch.
inline void read_order(Machine& m) {
  const char* variable = std::getenv("ATTN_EMULATOR_ORDER");
  const std::string order = variable == nullptr ? "turns" : variable, random = "random:";
  if (order == "turns") {
    m.order = Order::turns;
  } else if (order == "first") {
    m.order = Order::first;
  } else if (order == "last") {
    m.order = Order::last;
  } else if (order == "random") {
    m.order = Order::random;
  } else if (order.compare(0, random.size(), random) == 0) {
    m.order = Order::random;
    m.random = 2654435761u * static_cast<std::uint32_t>(std::atoi(order.c_str() + random.size())) | 1;
  } else {
    throw std::invalid_argument("emulator: ATTN_EMULATOR_ORDER is turns, first, last, random or random:SEED, not " +
                                order);
  }
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

// Ends the launch with an error, as hardware would.
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

// Releases the fibers first .. first + n if all unfinished ones wait for `what`.
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

// Creates a fiber for each thread of a cluster, at the start of the kernel.
inline void start_cluster(Machine& m, unsigned first_block) {
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
}

// Sets order to a permutation of 0 .. n - 1, by the Order of the launch.
inline void sort(Machine& m, std::size_t n, std::vector<std::size_t>& order) {
  order.resize(n);
  for (std::size_t i = 0; i < n; ++i) order[i] = m.order == Order::last ? n - 1 - i : i;
  if (m.order == Order::turns || m.order == Order::random)
    for (std::size_t i = n; i > 1; --i) std::swap(order[i - 1], order[m.next_random() % i]);
}

// Runs one step of those fibers first .. first + n that can run. Returns whether there were any.
inline bool step_all(Machine& m, std::size_t first, std::size_t n) {
  static thread_local std::vector<std::size_t> order;
  bool any = false;
  sort(m, n, order);
  for (std::size_t i : order) {
    if (m.fibers[first + i].wait != Wait::none) continue;
    any = true;
    step(m, m.fibers[first + i]);
    if (m.fault != nullptr) throw std::logic_error(std::exchange(m.fault, nullptr));
  }
  return any;
}

// Depending on the Order, runs all fibers one step, one warp one step, or one warp as far as possible. Returns whether
// any fiber ran.
inline bool advance(Machine& m) {
  const std::size_t threads = m.block_size.x, n = m.fibers.size();
  if (m.order == Order::turns) {
    const bool any = step_all(m, 0, n);
    for (std::size_t warp = 0; warp < n; warp += 32) release(m, warp, 32, Wait::warp);
    for (std::size_t block = 0; block < n; block += threads) release(m, block, threads, Wait::block);
    return any;
  }
  static thread_local std::vector<std::size_t> order;
  sort(m, n / 32, order);
  for (std::size_t warp : order) {
    bool any = false;
    while (step_all(m, 32 * warp, 32)) {
      any = true;
      if (!release(m, 32 * warp, 32, Wait::warp) || m.order == Order::random) break;
    }
    if (!any) continue;
    release(m, 32 * warp / threads * threads, threads, Wait::block);
    return true;
  }
  return false;
}

inline void run_cluster(Machine& m, unsigned first_block) {
  start_cluster(m, first_block);
  while (true) {
    while (advance(m)) {
    }
    bool finished = true;
    for (const Fiber& fiber : m.fibers) finished &= fiber.wait == Wait::done;
    if (finished) return;
    if (!release(m, 0, m.fibers.size(), Wait::cluster))
      throw std::logic_error("emulator: threads wait for each other at different barriers");
  }
}

inline void launch(std::function<void()> body, unsigned blocks, unsigned threads, std::int64_t shared_bytes,
                   int cluster) {
  Machine& m = machine();
  if (threads % 32 != 0 || threads > 1024) throw std::logic_error("emulator: a block has whole warps, at most 32");
  if (shared_bytes > shared_memory_limit()) throw std::logic_error("emulator: more shared memory than the device has");
  if (blocks % cluster != 0) throw std::logic_error("emulator: a grid has whole clusters");
  m.grid_size = {blocks, 1, 1};
  m.block_size = {threads, 1, 1};
  m.cluster_size = cluster;
  m.shared_bytes = shared_bytes;
  m.body = std::move(body);
  read_order(m);
  const char* tanh = std::getenv("ATTN_EMULATOR_TANH");
  tanh_is_nan = tanh != nullptr && std::strcmp(tanh, "nan") == 0;
  std::vector<std::size_t> order;
  sort(m, blocks / cluster, order);
  for (std::size_t first : order) run_cluster(m, static_cast<unsigned>(first) * cluster);
}

// Exchanges a value per thread of the warp, by lane, after all threads have given theirs.
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
