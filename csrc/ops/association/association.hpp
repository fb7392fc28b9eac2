#pragma once
// Inner loops of the CPU kernel; association_simd.cpp is compiled once per instruction set.
#include <cstdint>

#include "core/half.hpp"
#include "core/isa.hpp"

namespace spurge::association {

constexpr std::int64_t kPiece = 256;  // samples that float32 adds up
constexpr std::int64_t kColumns = 128;  // packed at a time

constexpr std::int64_t kNoRow = -1, kEveryRow = -2;

// A run of samples of one class, or as much of one as float32 should add up.
struct Piece {
  std::int64_t begin, length;  // samples of the chunk
  std::int64_t label;
  std::int64_t picked;  // kNoRow, kEveryRow, or the one row to keep
  double scale;
  bool begins, ends;  // is there no sample of the class before it, or after it?

  SPURGE_HD bool whole() const { return begins && ends; }
};

// Consecutive pieces, and the rows [row, row + rows) of the outputs.
template <class A>
struct Chunk {
  const Piece* pieces;
  std::int64_t count, samples;
  const A* gradients;  // packed
  std::int64_t row, rows, width;
  double *sums, *logs;    // [all rows, width], like the others
  const double* before;   // sums of the first piece's class so far, where it does not begin here
  double* after;          // the same of the last one's, where it does not end here
  float* picked;
};

SPURGE_EACH_LEVEL(
    // Magnitudes of the rows of gradients [all samples, outputs] that belong to the chunk, times a factor per sample,
    // for the samples [begin, end): tile after tile, sample after sample, the rows of a tile side by side.
    template <class A> void pack_gradients(A* to, const A* from, std::int64_t outputs, std::int64_t rows,
                                           const A* factors, std::int64_t samples, std::int64_t begin,
                                           std::int64_t end);
    // Magnitudes of up to kColumns columns, panel after panel, sample after sample, the columns of a panel side by
    // side, the last panel filled up with zeros. Adds to activations [labels, stride] unless it is null.
    template <class T> void pack_features(Acc<T>* to, double* activations, const T* from, std::int64_t stride,
                                          std::int64_t columns, const Piece* pieces, std::int64_t count,
                                          std::int64_t samples, bool relu);
    // The columns [column, column + columns), packed in features.
    template <class A> void fold(const Chunk<A>& chunk, const A* features, std::int64_t column,
                                 std::int64_t columns);)

}  // namespace spurge::association
