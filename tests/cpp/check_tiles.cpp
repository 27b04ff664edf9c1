// Tests the tiles of additive_attention_fwd.cu: blocks fit the shared memory of each kind of device, and a limit that
// is not reached changes nothing.
#include <cstdio>

#include "cuda/additive_attention_fwd.cu"

namespace attn {
namespace cuda {
namespace {

int failures = 0, bound = 0, shapes = 0;

template <typename W, int kQ, int kK>
void check_shape(int64_t B, int64_t Tq, int64_t Tk, int64_t A, int64_t kib) {
  AdditiveScores op{};
  op.B = B, op.Tq = Tq, op.Tk = Tk, op.A = A;
  const ScoresTile<AdditiveScores> tile = choose_tile<W, kQ, kK>(op, {132, 90, kib * 1024}),
                                   free = choose_tile<W, kQ, kK>(op, {132, 90, int64_t(1) << 40});
  const int64_t bytes = shared_bytes<W, kQ, kK, AdditiveScores>(tile.unit_splits, tile.threads_q, tile.threads_k);
  const bool same = tile.threads_q == free.threads_q && tile.threads_k == free.threads_k &&
                    tile.unit_splits == free.unit_splits && tile.split_units == free.split_units &&
                    tile.tiles_q == free.tiles_q && tile.tiles_k == free.tiles_k;
  const bool fits =
      shared_bytes<W, kQ, kK, AdditiveScores>(free.unit_splits, free.threads_q, free.threads_k) <= kib * 1024;
  const bool never_binds = sizeof(W) == 4 && kib == 227;  // float32 on an H100
  bound += !fits;
  ++shapes;
  if (tile.unit_splits > 0 && bytes <= kib * 1024 && same == fits && (fits || !never_binds)) return;
  if (++failures <= 10)
    std::printf("FAILED (%d, %d, %d, %d) of %zu bytes, %d KiB: %d splits, %d bytes\n", int(B), int(Tq), int(Tk), int(A),
                sizeof(W), int(kib), tile.unit_splits, int(bytes));
}

}  // namespace
}  // namespace cuda
}  // namespace attn

int main() {
  using namespace attn::cuda;
  for (const int64_t kib : {227, 163, 99})
    for (const int64_t B : {1, 2, 8, 64})
      for (const int64_t Tq : {9, 40, 100, 128, 300})
        for (const int64_t Tk : {1, 4, 50, 100, 400})
          for (const int64_t A : {16, 100, 512, 1024}) {
            check_shape<float, 8, 4>(B, Tq, Tk, A, kib);
            check_shape<double, 4, 4>(B, Tq, Tk, A, kib);
          }
  if (bound == 0) std::printf("FAILED: no limit binds\n"), ++failures;
  std::printf("%d shapes, %d of them bound by shared memory, %d failures\n", shapes, bound, failures);
  return failures != 0;
}
