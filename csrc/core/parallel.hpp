#pragma once
// Fork-safe on purpose: threads live only inside the call, so there is no pool to inherit.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace spurge {

// A thread costs about 10 us to start and join. Below this many elements each, one thread does better: elements
// of about a nanosecond, and those that are only streamed through (0.1 ns from a cache, 0.4 ns from memory).
constexpr std::int64_t kElementsPerThread = 1 << 16;
constexpr std::int64_t kStreamedPerThread = 1 << 18;

// p threads take n * c / p + p * 10 us, which is least at p = sqrt(n * c / 10 us): about 1.6 sqrt(n / grain).
inline std::int64_t useful_threads(std::int64_t n, std::int64_t grain) {
  const double grains = static_cast<double>(n) / static_cast<double>(std::max<std::int64_t>(grain, 1));
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(std::min(grains, 1.6 * std::sqrt(grains))));
}

// Ranges over single elements begin at multiples of this: more than the lanes of any vector loop.
constexpr std::int64_t kLaneAlign = 64;

// Calls body(begin, end) on disjoint ranges that cover [0, n), in at most `threads` threads with at
// least `grain` items each. Ranges begin at multiples of `align`, so that vector loops cut the data
// into the same lanes for any number of threads. A body must not let ranges change a result.
template <class Body>
void parallel_for(std::int64_t n, std::int64_t grain, int threads, const Body& body, std::int64_t align = 1) {
  if (n <= 0) return;
  const std::int64_t parts = std::min<std::int64_t>(std::max(threads, 1), useful_threads(n, grain));
  if (parts == 1) return body(std::int64_t{0}, n);

  const auto cut = [&](std::int64_t k) { return k == parts ? n : n / align * k / parts * align; };
  std::vector<std::exception_ptr> error(static_cast<std::size_t>(parts));
  const auto run = [&](std::int64_t k) noexcept {
    try {
      body(cut(k), cut(k + 1));
    } catch (...) {
      error[static_cast<std::size_t>(k)] = std::current_exception();
    }
  };
  std::vector<std::thread> crew;
  crew.reserve(static_cast<std::size_t>(parts - 1));
  std::int64_t started = 1;
  try {
    for (; started < parts; ++started) crew.emplace_back(run, started);
  } catch (...) {  // no more threads to be had: this one does the rest
  }
  run(0);
  for (std::int64_t k = started; k < parts; ++k) run(k);
  for (auto& thread : crew) thread.join();
  for (auto& e : error)
    if (e) std::rethrow_exception(e);
}

}  // namespace spurge
