// product and weighted_sum for few queries: few_rows.cu.
#pragma once

#include "kernels.h"

namespace attn {
namespace cuda {

// For op.Tq <= kFewQueries and a simplified op.attended (arrays.cuh).
void few_rows_product(const Product& op);
void few_rows_weighted_sum(const WeightedSum& op);

}  // namespace cuda
}  // namespace attn
