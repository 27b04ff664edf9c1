// Threads and scratch memory for the kernels. Compiled once, not per SIMD level.
#pragma once

#include <cstdint>

namespace attn {

// Runs body(begin, end, context) over parts of [0, n) on PyTorch's threads; on the calling thread if n <= grain.
void parallel_for(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
int64_t thread_count();

// Runs body(i, context) for i in [0, n) with dynamic scheduling, for tasks of unequal cost. The largest tasks should
// come first. A nested parallel_for runs on the thread of its task.
void for_each_in_turn(int64_t n, void (*body)(int64_t, void*), void* context);

// Bytes of the last-level cache; 32 MiB if unknown.
int64_t last_cache_bytes();

// Scratch memory of one thread, reused between calls: page faults on fresh memory can cost more than the arithmetic.
// An allocation is valid until release() of the mark that was current when it was made.
class Scratch {
 public:
  void* alloc(int64_t bytes);  // aligned to 64 bytes
  int64_t mark() const { return used_; }
  void release(int64_t mark);
  ~Scratch();

 private:
  struct Block;
  void pop();
  Block* blocks_ = nullptr;
  int64_t used_ = 0;
  int64_t peak_ = 0;
};

Scratch& thread_scratch();

class ScratchScope {
 public:
  explicit ScratchScope(Scratch& scratch) : scratch_(scratch), mark_(scratch.mark()) {}
  ~ScratchScope() { scratch_.release(mark_); }
  ScratchScope(const ScratchScope&) = delete;

 private:
  Scratch& scratch_;
  int64_t mark_;
};

}  // namespace attn
