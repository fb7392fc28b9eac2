#include "core/simd.hpp"
#include "ops/median/median.hpp"

namespace spurge::median::SPURGE_LEVEL {

using spurge::SPURGE_LEVEL::bits_as;
using spurge::SPURGE_LEVEL::fetch_to_second;
using spurge::SPURGE_LEVEL::Mask;
using spurge::SPURGE_LEVEL::Vec;

// ---- kTile neighbours of a row, as keys ------------------------------------------------------------------

template <class K>
struct Row {
  using V = Vec<K>;
  static constexpr int parts = kTile / V::n;
  V v[parts];

  SPURGE_HD static Row load(const K* p) {
    Row row;
    SPURGE_UNROLL
    for (int i = 0; i < parts; ++i) row.v[i] = V::load(p + i * V::n);
    return row;
  }
  SPURGE_HD void store(K* p) const {
    SPURGE_UNROLL
    for (int i = 0; i < parts; ++i) v[i].store(p + i * V::n);
  }
  SPURGE_HD static void exchange(Row& a, Row& b) {
    SPURGE_UNROLL
    for (int i = 0; i < parts; ++i) {
      const V x = a.v[i], y = b.v[i];
      a.v[i] = smaller(x, y);
      b.v[i] = larger(x, y);
    }
  }
  SPURGE_HD void add_less(const Row& x, const Row& than) {
    SPURGE_UNROLL
    for (int i = 0; i < parts; ++i) v[i] = counted(v[i], x.v[i] < than.v[i]);
  }

  // least: of what is >= low; most: of what is <= high. Where neither is the case?
  SPURGE_HD static Mask<K> bound(V x, V low, V high, V& least, V& most) {
    const Mask<K> below = x < low, above = high < x;
    least = select(below, least, smaller(x, least));
    most = select(above, most, larger(x, most));
    return below | above;
  }
  // True if a lane is both.
  SPURGE_HD static bool bound(const Row& x, const Row& low, const Row& high, Row& least, Row& most) {
    Mask<K> outside = bound(x.v[0], low.v[0], high.v[0], least.v[0], most.v[0]);
    SPURGE_UNROLL
    for (int i = 1; i < parts; ++i)
      outside = outside & bound(x.v[i], low.v[i], high.v[i], least.v[i], most.v[i]);
    return !every(outside);
  }
};

// ---- from a row of the matrix to keys --------------------------------------------------------------------

// What a transform does to the bits: kept ones, flipped ones, and the smallest value.
template <class A>
struct Recipe {
  using K = Key<A>;
  Vec<K> keep, flip;
  Vec<A> floor;
  explicit Recipe(Transform t)
      : keep(Vec<K>::all(t == Transform::magnitude ? kMagnitude<K> : K(-1))),
        flip(Vec<K>::all(t == Transform::negative ? ~kMagnitude<K> : K(0))),
        floor(Vec<A>::all(t == Transform::raw ? -static_cast<A>(value_of(kInfinity)) : A(0))) {}
};

template <class K>
SPURGE_HD Vec<K> folded(Vec<K> bits) {
  return bits ^ ((bits >> kSign<K>) & Vec<K>::all(kMagnitude<K>));
}

// True if there is a NaN.
template <class T>
SPURGE_HD bool put_keys(Key<T>* to, const T* p, const Recipe<Acc<T>>& recipe) {
  using A = Acc<T>;
  using V = Vec<A>;
  Mask<A> nan = {};
  SPURGE_UNROLL
  for (int k = 0; k < kTile; k += V::n) {
    const V v = bits_as<A>((bits_as<Key<T>>(V::load(p + k)) & recipe.keep) ^ recipe.flip);
    const V x = larger(recipe.floor, v) + V::all(A(0));  // NaN stays, and -0 becomes 0
    folded(bits_as<Key<T>>(x)).store(to + k);
    nan = nan | is_nan(x);
  }
  return any(nan);
}

// Keys of n rows, kTile columns of which `columns` exist (the others read as 0). True if there is a NaN. More rows
// follow, up to rows[last].
template <class T>
bool gather(Key<T>* tile, const T* features, std::int64_t stride, const std::int64_t* rows, std::int64_t n,
            std::int64_t last, std::int64_t columns, Transform transform) {
  constexpr std::int64_t ahead = 24;  // rows on their way: more than the memory takes to answer
  const Recipe<Acc<T>> recipe(transform);
  T few[kTile] = {};
  bool nan = false;
  for (std::int64_t i = 0; i < n; ++i) {
    fetch_to_second(features + rows[i + ahead < last ? i + ahead : last] * stride);
    const T* row = features + rows[i] * stride;
    if (columns < kTile) {
      for (std::int64_t k = 0; k < columns; ++k) few[k] = row[k];
      row = few;
    }
    nan |= put_keys(tile + i * kTile, row, recipe);
  }
  return nan;
}

constexpr std::int64_t kBlock = 32;  // rows

// ---- selection -------------------------------------------------------------------------------------

constexpr std::int64_t kSmall = 256;     // segments up to here are sorted at once: bounds have their price
constexpr std::int64_t kSorted = 64;     // rows that are sorted when bounds have closed in
constexpr std::int64_t kSample = 64;     // rows whose ranks kSampleLow from either end give the first bounds
constexpr std::int64_t kSampleLow = 20;  // three standard deviations of a sample's median from the middle
constexpr int kPatience = 8;             // rounds after which bounds are drawn to the nearest keys in any case

template <class K>
constexpr K kHighest = kMagnitude<K>;
template <class K>
constexpr K kLowest = -kHighest<K> - 1;

template <class K>
SPURGE_HD void exchange_rows(K* tile, std::int64_t i, std::int64_t j) {
  Row<K> a = Row<K>::load(tile + i * kTile), b = Row<K>::load(tile + j * kTile);
  Row<K>::exchange(a, b);
  a.store(tile + i * kTile);
  b.store(tile + j * kTile);
}

// Batcher's merge exchange (Knuth 5.2.2 M): sorts each column of n rows.
template <class K>
void sort_rows(K* tile, std::int64_t n) {
  if (n < 2) return;
  std::int64_t top = 1;
  while (2 * top < n) top *= 2;
  for (std::int64_t p = top; p > 0; p /= 2)
    for (std::int64_t q = top, r = 0, d = p;; d = q - p, q /= 2, r = p) {
      for (std::int64_t run = r; run < n - d; run += 2 * p)  // of rows i with (i & p) == r
        for (std::int64_t i = run; i < run + p && i < n - d; ++i) exchange_rows(tile, i, i + d);
      if (q == p) break;
    }
}

template <class K>
void count_less(K* counts, const K* tile, std::int64_t n, const K* than) {
  const Row<K> pivot = Row<K>::load(than);
  const K zeros[kTile] = {};
  Row<K> sum = Row<K>::load(zeros);
  for (std::int64_t i = 0; i < n; ++i) sum.add_less(Row<K>::load(tile + i * kTile), pivot);
  sum.store(counts);
}

// Drops the rows without a key in [low, high], in place; returns how many are left. least: the smallest key of at
// least low, most: the largest of at most high.
template <class K>
std::int64_t narrow(K* tile, std::int64_t n, const K* low, const K* high, K* least, K* most) {
  const Row<K> from = Row<K>::load(low), to = Row<K>::load(high);
  Row<K> l = Row<K>::load(least), m = Row<K>::load(most);
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const Row<K> x = Row<K>::load(tile + i * kTile);
    x.store(tile + kept * kTile);
    kept += Row<K>::bound(x, from, to, l, m);
  }
  l.store(least);
  m.store(most);
  return kept;
}

// Within 4 %, and without errno, which would keep loops from being vectorised.
SPURGE_HD float root(float x) { return float_of_bits((bits_of_float(x) >> 1) + 0x1fbd1df5u); }

// A key that has about `share` of the keys in [low, high] below it, if values lie evenly.
template <class K>
SPURGE_HD K between(K low, K high, float share) {
  const auto a = value_of(low), b = value_of(high);
  return key_of(a + static_cast<decltype(a)>(share) * (b - a));
}

template <class K>
SPURGE_HD K halfway(K low, K high) {
  using U = Unsigned<K>;
  return static_cast<K>(static_cast<U>(low) + (static_cast<U>(high) - static_cast<U>(low)) / 2 + 1);
}

// The search for the middle two keys of each column. While they are not known, both lie in [low, high]; a column
// with a pivot between them has low > high, and they are the nearest keys on its two sides. Loops over the columns
// have no branches, so that the compiler makes vectors of them.
template <class K>
struct Search {
  K* tile;
  std::int64_t n;        // rows left
  const K lower, upper;  // ranks of the middle two among all rows
  K low[kTile], high[kTile];
  K less[kTile], not_more[kTile];  // keys below low and up to high, of all rows
  K gone[kTile] = {};              // keys below low, of the rows that were dropped
  K known[kTile] = {};             // 1 where the middle two are; low > high there, so that no row is kept for it
  K first[kTile] = {}, second[kTile] = {};

  Search(K* keys, std::int64_t rows) : tile(keys), n(rows), lower(K((rows - 1) / 2)), upper(K(rows / 2)) {
    for (int k = 0; k < kTile; ++k) {
      low[k] = kLowest<K>;
      high[k] = kHighest<K>;
      less[k] = 0;
      not_more[k] = static_cast<K>(rows);
    }
  }

  // Counts the keys below each column's pivot, and moves the bounds.
  void cut(const K* wanted) {
    K pivot[kTile], counts[kTile];
    for (int k = 0; k < kTile; ++k) {
      const K least = low[k] < high[k] ? low[k] + 1 : high[k];
      const K p = wanted[k] < high[k] ? wanted[k] : high[k];
      pivot[k] = p > least ? p : least;
    }
    count_less(counts, tile, n, pivot);
    for (int k = 0; k < kTile; ++k) {
      const bool open = low[k] <= high[k];
      const K below = counts[k] + gone[k];
      const bool rise = open & (below <= upper), fall = open & (below > lower);  // both: the pivot is between
      low[k] = rise ? pivot[k] : low[k];
      less[k] = rise ? below : less[k];
      high[k] = fall ? pivot[k] - 1 : high[k];
      not_more[k] = fall ? below : not_more[k];
    }
    for (int k = 0; k < kTile; ++k) settle(k, low[k] == high[k], low[k], low[k]);
  }

  SPURGE_HD void settle(int k, bool found, K a, K b) {
    first[k] = found ? a : first[k];
    second[k] = found ? b : second[k];
    known[k] = found ? 1 : known[k];
    low[k] = found ? 1 : low[k];
    high[k] = found ? 0 : high[k];
  }

  // Drops the rows that no column needs, and draws the bounds to the nearest keys.
  void drop() {
    K least[kTile], most[kTile], counts[kTile];
    for (int k = 0; k < kTile; ++k) {
      least[k] = kHighest<K>;
      most[k] = kLowest<K>;
    }
    n = narrow(tile, n, low, high, least, most);
    for (int k = 0; k < kTile; ++k) {
      const bool open = low[k] <= high[k];
      settle(k, (known[k] == 0) & (!open | (least[k] == most[k])), most[k], least[k]);
      low[k] = known[k] ? low[k] : least[k];
      high[k] = known[k] ? high[k] : most[k];
    }
    count_less(counts, tile, n, low);
    for (int k = 0; k < kTile; ++k) gone[k] = less[k] - counts[k];
  }

  void finish() {
    sort_rows(tile, n);
    for (int k = 0; k < kTile; ++k) {
      if (known[k]) continue;
      first[k] = tile[(lower - gone[k]) * kTile + k];
      second[k] = tile[(upper - gone[k]) * kTile + k];
    }
  }

  // Pivots that should have the middle on both sides in turn, at a distance that shrinks with the keys left.
  void aim(K* pivot, float side) const {
    for (int k = 0; k < kTile; ++k) {
      const float inside = static_cast<float>(not_more[k] - less[k]);
      const float share = (static_cast<float>(upper - less[k]) + side * root(inside)) / inside;
      pivot[k] = between(low[k], high[k], share);
    }
  }

  void run() {
    if (n <= kSmall) return finish();
    K sample[kSample * kTile], pivot[kTile];
    for (std::int64_t i = 0; i < kSample; ++i) Row<K>::load(tile + i * n / kSample * kTile).store(sample + i * kTile);
    sort_rows(sample, kSample);
    cut(sample + kSampleLow * kTile);
    for (int k = 0; k < kTile; ++k) {
      const K key = sample[(kSample - 1 - kSampleLow) * kTile + k];
      pivot[k] = key + (key < kHighest<K>);  // above it: finds at once that most keys are equal
    }
    cut(pivot);
    for (int round = 0, since = 0;; ++round) {
      K spread = 0, unknown = 0;
      for (int k = 0; k < kTile; ++k) {
        unknown += 1 - known[k];
        spread += low[k] <= high[k] ? not_more[k] - less[k] : 0;
      }
      if (unknown == 0) return;
      if (spread == 0 || 2 * static_cast<std::int64_t>(spread) < n || ++since > kPatience) {
        drop();
        since = 0;
        if (n <= kSorted) return finish();
      }
      if (round % 3 == 2) {
        for (int k = 0; k < kTile; ++k) pivot[k] = halfway(low[k], high[k]);  // closes in on any distribution
      } else {
        aim(pivot, round % 3 ? -1.0f : 1.0f);
      }
      cut(pivot);
    }
  }
};

template <class T>
void medians(Acc<T>* out, Key<T>* scratch, const T* features, std::int64_t stride, const std::int64_t* rows,
             std::int64_t n, std::int64_t columns, Transform transform) {
  bool nan = false;
  for (std::int64_t i = 0; i < n; i += kBlock)  // neighbouring tiles while a row's page is at hand
    for (std::int64_t m = 0; m < columns; m += kTile) {
      const std::int64_t some = columns - m < kTile ? columns - m : kTile, count = n - i < kBlock ? n - i : kBlock;
      nan |= gather(scratch + m * n + i * kTile, features + m, stride, rows + i, count, n - i - 1, some, transform);
    }
  for (std::int64_t m = 0; m < columns; m += kTile) {
    Key<T>* const tile = scratch + m * n;
    bool spoilt[kTile] = {};
    for (std::int64_t i = 0; nan && i < n * kTile; ++i) {
      const Acc<T> v = value_of(tile[i]);
      spoilt[i % kTile] |= v != v;
    }
    Search<Key<T>> search(tile, n);
    search.run();
    const auto not_a_number = static_cast<Acc<T>>(float_of_bits(0x7fc00000u));
    for (std::int64_t k = 0; k < kTile && m + k < columns; ++k)
      out[m + k] = spoilt[k] ? not_a_number : middle(value_of(search.first[k]), value_of(search.second[k]));
  }
}

#define SPURGE_INSTANTIATE(T)                                                                                  \
  template void medians<T>(Acc<T>*, Key<T>*, const T*, std::int64_t, const std::int64_t*, std::int64_t, \
                           std::int64_t, Transform);
SPURGE_INSTANTIATE(float)
SPURGE_INSTANTIATE(double)
SPURGE_INSTANTIATE(bf16)
SPURGE_INSTANTIATE(f16)
#undef SPURGE_INSTANTIATE

}  // namespace spurge::median::SPURGE_LEVEL
