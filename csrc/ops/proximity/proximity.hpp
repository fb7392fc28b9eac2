#pragma once
// Inner loops of the CPU kernels, over the units of one row; proximity_simd.cpp is compiled once per instruction set.
#include <cstdint>

#include "core/isa.hpp"
#include "ops/proximity/proximity_math.hpp"

namespace spurge::proximity {

// Sums run in so many lanes, whatever the instruction set, so that all give the same bits. Arrays are padded to a
// multiple of them.
constexpr std::int64_t kLanes = 8;

// A row's n units: scores (their mean at padding), memberships and whether among the best (0 at padding).
struct Line {
  std::int64_t n;
  const double *a, *m, *best;
};

struct Moments {
  double sum, size;  // of scores, of their magnitudes
};

// Of scores below some border: the largest, and how many there are not.
struct Under {
  double largest, others;
};

struct Turns {
  double sum, stretched;  // see rest_of
};

SPURGE_EACH_LEVEL(
    Moments moments(const double* a, std::int64_t n);  // zeros at padding
    double squares(const double* a, double mean, std::int64_t n);
    Under under(const double* a, double border, std::int64_t n);               // -inf at padding
    void mark_above(double* marks, const double* a, double border, std::int64_t n);  // 1 where it is larger, else 0
    double memberships(double* m, const double* a, const Sigmoid& sigmoid, std::int64_t n);  // their sum
    Sums sums_of(const Line& line, const double* members, double total);
    // Adds what a set pulls to what memberships and scores are pulled by.
    void add_pull(double* by_membership, double* by_score, const Line& line, const double* members, const Pull& pull);
    // By scores, what their own memberships add; `all` is Pull::all of all sets together.
    Turns add_memberships(double* by_score, const double* by_membership, const Line& line, double all,
                          const Sigmoid& sigmoid);)

}  // namespace spurge::proximity
