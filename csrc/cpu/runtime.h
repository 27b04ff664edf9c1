// What the kernels need of their surroundings: threads and scratch memory. Compiled once, for no SIMD level.
#pragma once

#include <cstdint>

namespace attn {

// Runs body(begin, end, context) over parts of [0, n), on PyTorch's own threads; on the calling one if n <= grain.
void parallel_for(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
int64_t thread_count();

// Runs body(i, context) for i in [0, n), each on one thread, which takes the next one when it is done: n tasks of unlike
// cost, the largest first. Within body there is one thread: a parallel_for there runs on it.
void for_each_in_turn(int64_t n, void (*body)(int64_t, void*), void* context);

// Bytes of the last level of cache; 32 MiB where the system does not tell.
int64_t last_cache_bytes();

// Memory of one thread that is kept from call to call: fresh pages can cost more than the arithmetic in them.
// Everything taken is valid until release() of the mark that was current when it was taken.
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
