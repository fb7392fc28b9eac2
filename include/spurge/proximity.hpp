#pragma once
// proximity: how near the top-scored units of a row are to golden sets (MacU, Eq. 6).
#include "spurge/types.hpp"

namespace spurge::proximity {

struct Shape {
  std::int64_t rows, units;              // R, U
  std::int64_t examples, sets, labels;   // B, G, Y
  std::int64_t words;                    // 32-bit words of a bitmap row: ceil(V / 32)
};

// Row r belongs to example b = r % examples. Its units t are those with ids[b, t] >= 0, n of them, with
// scores a_t. Unit v is in golden set g of label y if bit v % 32 of bitmap[g, y, v / 32] is set.
//
// C = the k best units (all, if n <= k), the smaller index first among equals; for each set G of label[b]:
//   hard = |C ∩ G| / |C| + sum(a_t, t in C ∩ G) / |C ∩ G|      second term 0 where the intersection is empty
//   soft = A / sum(m_t) + sum(m_t g_t a_t) / (A + 1e-6),  A = sum(m_t g_t),  g_t = 1 if unit t is in G
//   m_t  = sigmoid((a_t - tau) / T);  T = max(sharpness * std(a), 1e-3 * mean|a|);
//   tau  = midpoint of the k-th and (k+1)-th score, min(a) - T if n <= k
// A row without units gives 0; a row with a score that is NaN or infinite gives NaN.
// scores [rows, units] f32 or f64; hard, soft [rows, sets] of the same type; ids [examples, units];
// bitmap [sets, labels, words]; label [examples]. Computed in float64. The CPU refuses labels outside
// [0, labels); the CUDA kernel cannot look before it runs, and gives NaN for their rows.
// Deterministic: bitwise for any number of threads, and from run to run on one GPU.
void scores_cpu(void* hard, void* soft, const void* scores, const std::int32_t* ids, const std::int32_t* bitmap,
                const std::int64_t* label, const Shape& shape, std::int64_t k, double sharpness, DType dtype,
                int threads);
void scores_cuda(void* hard, void* soft, const void* scores, const std::int32_t* ids, const std::int32_t* bitmap,
                 const std::int64_t* label, const Shape& shape, std::int64_t k, double sharpness, DType dtype,
                 const CudaPlace& place);

// grad_t = sum over sets of by_soft d soft / d a_t + by_hard d hard / d a_t, [rows, units]. The whole derivative of
// soft: by memberships, threshold and temperature. That of hard holds C: 1 / |C ∩ G| in C ∩ G. Where two scores share
// the k-th place, tau moves with the units that the order of C puts there. 0 at padding and in a row without units;
// NaN at the units of a row with a score that is NaN or infinite. by_hard, by_soft [rows, sets], of the scores' type.
void gradient_cpu(void* grad, const void* by_hard, const void* by_soft, const void* scores, const std::int32_t* ids,
                  const std::int32_t* bitmap, const std::int64_t* label, const Shape& shape, std::int64_t k,
                  double sharpness, DType dtype, int threads);
void gradient_cuda(void* grad, const void* by_hard, const void* by_soft, const void* scores, const std::int32_t* ids,
                   const std::int32_t* bitmap, const std::int64_t* label, const Shape& shape, std::int64_t k,
                   double sharpness, DType dtype, const CudaPlace& place);

}  // namespace spurge::proximity
