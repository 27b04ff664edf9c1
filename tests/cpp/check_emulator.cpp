// The emulator itself: that barriers, shuffles and clusters do what CUDA's do, and that mistakes show.
#include <cstdio>
#include <string>
#include <vector>

#include "cuda_emulator.h"

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what);
}

// What the launch throws; "" if nothing.
template <class Body>
std::string error_of(unsigned blocks, unsigned threads, const Body& body, int cluster = 1) {
  try {
    emulator::launch(body, blocks, threads, 4096, cluster);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

float* shared() { return reinterpret_cast<float*>(emulator::machine().now->shared); }

void check_barriers() {
  std::vector<int> out(128);
  auto reverse = [&](bool with_barrier) {
    return [&out, with_barrier] {
      shared()[threadIdx.x] = static_cast<float>(threadIdx.x);
      if (with_barrier) __syncthreads();
      out[threadIdx.x] = static_cast<int>(shared()[127 - threadIdx.x]) == 127 - static_cast<int>(threadIdx.x);
    };
  };
  auto all = [&] {
    for (int ok : out)
      if (!ok) return false;
    return true;
  };
  expect(error_of(1, 128, reverse(true)).empty() && all(), "a barrier makes writes visible");
  expect(error_of(1, 128, reverse(false)).empty() && !all(), "a missing barrier shows");
}

void check_shuffles() {
  std::vector<int> sums(64), lanes(64);
  std::vector<unsigned> ballots(64);
  const std::string error = error_of(1, 64, [&] {
    int x = static_cast<int>(threadIdx.x);
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    sums[threadIdx.x] = x;
    lanes[threadIdx.x] = __shfl_sync(~0u, static_cast<int>(threadIdx.x), 3);
    ballots[threadIdx.x] = __ballot_sync(~0u, threadIdx.x % 2 == 0);
  });
  expect(error.empty(), "shuffles run");
  expect(sums[0] == 496 && sums[31] == 496 && sums[63] == 496 + 32 * 32, "a sum over each warp");
  expect(lanes[7] == 3 && lanes[40] == 35, "a lane's value");
  expect(ballots[0] == 0x55555555u && ballots[63] == 0x55555555u, "a ballot");
}

void check_mistakes() {
  expect(!error_of(1, 64,
                   [] {
                     if (threadIdx.x < 32) __syncthreads();
                   })
              .empty(),
         "a barrier that some threads leave out is an error");
  expect(!error_of(1, 32,
                   [] {
                     if (threadIdx.x < 16) __shfl_xor_sync(~0u, 1, 1);
                   })
              .empty(),
         "a shuffle that some lanes leave out is an error");
  expect(!error_of(1, 64, [] { threadIdx.x < 32 ? __syncthreads() : __syncwarp(); }).empty(),
         "different barriers are an error");
  expect(!error_of(1, 48, [] {}).empty() && !error_of(1, 2048, [] {}).empty(), "a block has whole warps, at most 32");
  expect(!error_of(3, 32, [] {}, 2).empty(), "a grid has whole clusters");
}

void check_clusters() {
  std::vector<float> seen(4 * 32);
  const std::string error = error_of(
      4, 32,
      [&] {
        shared()[threadIdx.x] = static_cast<float>(100 * blockIdx.x + threadIdx.x);
        emulator::wait_for(emulator::Wait::cluster);
        const emulator::Machine& m = emulator::machine();
        const emulator::Fiber& other = m.fibers[(1 - m.now->rank) * 32];
        seen[32 * blockIdx.x + threadIdx.x] = reinterpret_cast<const float*>(other.shared)[threadIdx.x];
        emulator::wait_for(emulator::Wait::cluster);
      },
      2);
  expect(error.empty(), "clusters run");
  expect(seen[5] == 105 && seen[32 + 5] == 5 && seen[64 + 5] == 305 && seen[96 + 5] == 205, "the other block's memory");
}

void check_poison() {
  std::vector<int> nan(32);
  error_of(1, 32, [&] { nan[threadIdx.x] = shared()[threadIdx.x] != shared()[threadIdx.x]; });
  expect(nan[0] && nan[31], "shared memory starts as NaN");
}

}  // namespace

int main() {
  check_barriers();
  check_shuffles();
  check_mistakes();
  check_clusters();
  check_poison();
  std::printf(failures == 0 ? "all right\n" : "%d failures\n", failures);
  return failures != 0;
}
