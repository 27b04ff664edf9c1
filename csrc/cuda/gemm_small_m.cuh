// product and weighted_sum for few queries, defined in gemm_small_m.cu.
#pragma once

#include "kernels.h"

namespace attn {
namespace cuda {

// For op.Tq <= kMaxDecodeQueries and a simplified op.attended (views.cuh).
void gemm_small_m_nt(const Product& op);
void gemm_small_m_nn(const WeightedSum& op);

}  // namespace cuda
}  // namespace attn
