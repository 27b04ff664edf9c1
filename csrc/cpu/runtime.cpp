#include "runtime.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "../out_of_memory.h"

namespace attn {

namespace {
thread_local bool on_one_thread = false;

struct OneThread {
  const bool outer = on_one_thread;
  OneThread() { on_one_thread = true; }
  ~OneThread() { on_one_thread = outer; }
};
}  // namespace

void parallel_for(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (n <= 0) return;
  if (n <= grain || on_one_thread) return body(0, n, context);
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

int64_t thread_count() { return on_one_thread ? 1 : torch::stable::get_num_threads(); }

void for_each_in_turn(int64_t n, void (*body)(int64_t, void*), void* context) {
  std::atomic<int64_t> next{0};
  const int64_t threads = thread_count();
  torch::stable::parallel_for(0, n < threads ? n : threads, 1, [&](int64_t, int64_t) {
    const OneThread scope;
    for (int64_t i; (i = next.fetch_add(1)) < n;) body(i, context);
  });
}

namespace {
// The largest cache of the first processor as reported by Linux; 0 if unknown. sysconf() is not used: on AMD it adds up
// all caches of the package.
int64_t largest_cache() {
  int64_t largest = 0;
  for (int i = 0; i < 8; ++i) {
    const std::string path = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/size";
    std::FILE* file = std::fopen(path.c_str(), "r");
    if (file == nullptr) break;
    long long kibibytes = 0;
    if (std::fscanf(file, "%lldK", &kibibytes) == 1 && kibibytes * 1024 > largest) largest = kibibytes * 1024;
    std::fclose(file);
  }
  return largest;
}
}  // namespace

int64_t last_cache_bytes() {
  static const int64_t bytes = [] {
    const int64_t found = largest_cache();
    return found > 0 ? found : int64_t{32} << 20;
  }();
  return bytes;
}

namespace {
constexpr int64_t kAlignment = 64;
constexpr int64_t kSmallestBlock = 1 << 20;
constexpr int64_t kKept = 32 << 20;  // memory above this limit is freed after the call

// Tests set this variable to find reads of uninitialised memory: 0xff bytes are NaN in every dtype.
bool poison() {
  static const bool on = std::getenv("ATTN_KERNELS_POISON") != nullptr;
  return on;
}
}  // namespace

// A stack of blocks. `start` is the number of bytes that were in use when the block was added: the block holds the
// allocations after them.
struct Scratch::Block {
  Block* below;
  char* memory;
  int64_t size;
  int64_t start;
};

void* Scratch::alloc(int64_t bytes) {
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (blocks_ == nullptr || used_ - blocks_->start + bytes > blocks_->size) {
    int64_t size = blocks_ == nullptr && peak_ > kSmallestBlock ? peak_ : kSmallestBlock;
    if (bytes > size) size = bytes;
    char* memory = static_cast<char*>(std::aligned_alloc(kAlignment, size));
    Block* block = memory == nullptr ? nullptr : new (std::nothrow) Block{blocks_, memory, size, used_};
    if (block == nullptr) {
      std::free(memory);
      out_of_memory(size);
    }
    blocks_ = block;
  }
  char* p = blocks_->memory + (used_ - blocks_->start);
  used_ += bytes;
  if (used_ > peak_) peak_ = used_;
  if (poison()) std::memset(p, 0xff, bytes);
  return p;
}

void Scratch::pop() {
  Block* top = blocks_;
  blocks_ = top->below;
  std::free(top->memory);
  delete top;
}

void Scratch::release(int64_t mark) {
  used_ = mark;
  while (blocks_ != nullptr && blocks_->below != nullptr && blocks_->start >= mark) pop();
  if (mark > 0 || blocks_ == nullptr) return;
  // Between calls one block is kept, large enough for the needs of the last calls. A very large block is freed.
  if (peak_ > kKept) {
    pop();
    peak_ = 0;
  } else if (blocks_->size < peak_) {
    pop();
  }
}

Scratch::~Scratch() {
  while (blocks_ != nullptr) pop();
}

Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace attn
