// Tests the emulator itself: barriers, shuffles and clusters work as in CUDA, and mistakes are detected.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda_arithmetic.h"
#include "cuda_emulator.h"

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what);
}

// The message of the exception that the launch throws; "" if it throws none.
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

// Orders in which warps get ahead of each other, or blocks are reordered, detect mistakes that warps in lockstep do
// not.
void check_orders() {
  const auto in_order = [](const char* order, auto run) {
    setenv("ATTN_EMULATOR_ORDER", order, 1);
    const bool right = run();
    unsetenv("ATTN_EMULATOR_ORDER");
    return right;
  };
  // A warp reads what its neighbour wrote, and writes again. Without a barrier in between, a late warp reads the next
  // value.
  const auto neighbours = [&](bool with_barrier) {
    std::vector<int> wrong(128);
    const std::string error = error_of(1, 128, [&] {
      for (int i = 0; i < 4; ++i) {
        shared()[threadIdx.x] = static_cast<float>(i);
        __syncthreads();
        wrong[threadIdx.x] += shared()[(threadIdx.x + 32) % 128] != static_cast<float>(i);
        for (int n = 0; n < 3; ++n) __syncwarp();
        if (with_barrier) __syncthreads();
      }
    });
    int all = 0;
    for (int n : wrong) all += n;
    return error.empty() && all == 0;
  };
  // The same across the blocks of a cluster. The last block runs alone, after the others have got ahead of it.
  const auto cluster = [&](bool with_barrier) {
    std::vector<int> wrong(4 * 32);
    const std::string error = error_of(
        4, 32,
        [&] {
          const emulator::Machine& m = emulator::machine();
          for (int i = 0; i < 3; ++i) {
            shared()[threadIdx.x] = static_cast<float>(i);
            emulator::wait_for(emulator::Wait::cluster);
            const int next = (m.now->rank + 1) % 4;
            __syncthreads();
            wrong[32 * blockIdx.x + threadIdx.x] +=
                reinterpret_cast<const float*>(m.fibers[next * 32].shared)[threadIdx.x] != static_cast<float>(i);
            for (int n = 0; n < 3; ++n) __syncthreads();
            if (with_barrier) emulator::wait_for(emulator::Wait::cluster);
          }
        },
        4);
    int all = 0;
    for (int n : wrong) all += n;
    return error.empty() && all == 0;
  };
  // A block reads what the previous block wrote.
  const auto blocks = [&] {
    std::vector<int> done(8);
    int wrong = 0;
    error_of(8, 32, [&] {
      if (threadIdx.x > 0) return;
      wrong += blockIdx.x > 0 && !done[blockIdx.x - 1];
      done[blockIdx.x] = 1;
    });
    return wrong == 0;
  };
  for (const char* order : {"turns", "first", "last", "random", "random:1", "random:2"}) {
    expect(in_order(order, [&] { return neighbours(true); }), "neighbours with a barrier, in any order");
    expect(in_order(order, [&] { return cluster(true); }), "a cluster with a barrier, in any order");
  }
  expect(in_order("turns", [&] { return neighbours(false); }), "warps in step hide that a barrier is missing");
  for (const char* order : {"first", "last"}) {
    expect(!in_order(order, [&] { return neighbours(false); }), "a warp that gets ahead shows a missing barrier");
    expect(!in_order(order, [&] { return cluster(false); }), "a block that gets ahead shows a missing barrier");
  }
  int found[3] = {};
  for (int seed = 0; seed < 20; ++seed) {
    const std::string order = "random:" + std::to_string(seed);
    found[0] += !in_order(order.c_str(), [&] { return neighbours(false); });
    found[1] += !in_order(order.c_str(), [&] { return cluster(false); });
    found[2] += !in_order(order.c_str(), blocks);
  }
  expect(found[0] > 5 && found[1] > 5 && found[2] > 5, "many random orders show what is missing");
  expect(in_order("first", blocks) && !in_order("last", blocks), "a block that needs the one before it shows");
  expect(!in_order("backwards", [&] { return neighbours(true); }), "an unknown order is an error");
}

void check_shared_memory_limit() {
  setenv("ATTN_EMULATOR_SHARED_MEMORY", "4095", 1);
  expect(!error_of(1, 32, [] {}).empty(), "more shared memory than the device has is an error");
  setenv("ATTN_EMULATOR_SHARED_MEMORY", "4096", 1);
  expect(error_of(1, 32, [] {}).empty(), "as much shared memory as the device has");
  unsetenv("ATTN_EMULATOR_SHARED_MEMORY");
}

// The error of the approximate instructions is within the limit that PTX gives, close to it, and of both signs.
void check_arithmetic() {
  double most[2] = {}, least[2] = {};
  for (int i = 1; i < 10000; ++i) {
    const float x = 0.37f * static_cast<float>(i) / 100;
    const double errors[] = {emulator::rcp_approx_ftz(x) * double(x) - 1,
                             emulator::ex2_approx_ftz(x) / std::exp2(double(x)) - 1};
    for (int k = 0; k < 2; ++k) {
      const double error = errors[k] / (k == 0 ? 0x1p-23 : 0x1p-22);
      most[k] = std::fmax(most[k], error), least[k] = std::fmin(least[k], error);
    }
  }
  for (int k = 0; k < 2; ++k)
    expect(most[k] > 0.9 && most[k] < 1.51 && least[k] < -0.9 && least[k] > -1.51, "errors of instructions");
  expect(emulator::rcp_approx_ftz(1e-40f) == INFINITY && emulator::rcp_approx_ftz(2e38f) == 0, "rcp flushes to zero");
  expect(emulator::ex2_approx_ftz(-127) == 0 && emulator::ex2_approx_ftz(0) == 1, "ex2 flushes to zero");
  expect(std::isnan(emulator::rcp_approx_ftz(NAN)) && std::isnan(emulator::ex2_approx_ftz(NAN)), "NaN stays");
  expect(emulator::ex2_approx_ftz(INFINITY) == INFINITY && emulator::rcp_approx_ftz(-INFINITY) == 0, "infinity");
  expect(emulator::tanhf(20) == 1 && emulator::tanhf(-9.5f) == -1, "tanh has its limits");
  float ones[16], small[16];
  for (int k = 0; k < 16; ++k) ones[k] = 1, small[k] = 0x1p-25f;
  expect(emulator::tensor_core_sum(0, ones, ones, 16) == 16, "a sum of tensor cores");
  expect(emulator::tensor_core_sum(1, ones, small, 16) == 1, "tensor cores cut off what lies below the largest");
  for (float& x : small) x = -0x1p-24f;
  expect(emulator::tensor_core_sum(1, ones, small, 8) == 1 - 0x1p-21f, "one bit more than float32 has");
  ones[3] = INFINITY;
  expect(emulator::tensor_core_sum(1, ones, ones, 16) == INFINITY, "infinity in tensor cores");
}

}  // namespace

int main() {
  check_barriers();
  check_shuffles();
  check_mistakes();
  check_clusters();
  check_poison();
  check_orders();
  check_shared_memory_limit();
  check_arithmetic();
  std::printf(failures == 0 ? "all right\n" : "%d failures\n", failures);
  return failures != 0;
}
