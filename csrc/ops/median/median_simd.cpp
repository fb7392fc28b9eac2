#include "core/simd.hpp"
#include "ops/median/median.hpp"

namespace spurge::median::SPURGE_LEVEL {

using spurge::SPURGE_LEVEL::get_one;

// ---- kTile neighbours of a row, as keys ------------------------------------------------------------
// Row<K>: load, store, smaller and larger of two, whether any lane lies within bounds, and Row<K>::Counts.

template <class K>
struct Row {
  K v[kTile];
  SPURGE_HD static Row load(const K* p) {
    Row r;
    for (int k = 0; k < kTile; ++k) r.v[k] = p[k];
    return r;
  }
  SPURGE_HD void store(K* p) const {
    for (int k = 0; k < kTile; ++k) p[k] = v[k];
  }
  SPURGE_HD static void exchange(Row& a, Row& b) {
    for (int k = 0; k < kTile; ++k) {
      const K x = a.v[k], y = b.v[k];
      a.v[k] = x < y ? x : y;
      b.v[k] = x < y ? y : x;
    }
  }
  SPURGE_HD void add_less(const Row& x, const Row& than) {
    for (int k = 0; k < kTile; ++k) v[k] += x.v[k] < than.v[k];
  }
  // least: of what is >= low; most: of what is <= high; true if a lane is both
  SPURGE_HD static bool bound(const Row& x, const Row& low, const Row& high, Row& least, Row& most) {
    K any = 0;
    for (int k = 0; k < kTile; ++k) {
      const K up = -K(x.v[k] >= low.v[k]), down = -K(x.v[k] <= high.v[k]);
      const K l = x.v[k] < least.v[k] ? x.v[k] : least.v[k], m = x.v[k] > most.v[k] ? x.v[k] : most.v[k];
      least.v[k] = (l & up) | (least.v[k] & ~up);
      most.v[k] = (m & down) | (most.v[k] & ~down);
      any |= up & down;
    }
    return any;
  }
};

#ifdef SPURGE_LEVEL_avx512

template <>
struct Row<std::int32_t> {
  __m512i v;
  SPURGE_HD static Row load(const std::int32_t* p) { return {_mm512_loadu_si512(p)}; }
  SPURGE_HD void store(std::int32_t* p) const { _mm512_storeu_si512(p, v); }
  SPURGE_HD static void exchange(Row& a, Row& b) {
    const __m512i x = a.v;
    a.v = _mm512_min_epi32(x, b.v);
    b.v = _mm512_max_epi32(x, b.v);
  }
  SPURGE_HD void add_less(const Row& x, const Row& than) {
    v = _mm512_mask_sub_epi32(v, _mm512_cmplt_epi32_mask(x.v, than.v), v, _mm512_set1_epi32(-1));
  }
  SPURGE_HD static bool bound(const Row& x, const Row& low, const Row& high, Row& least, Row& most) {
    const __mmask16 up = _mm512_cmpge_epi32_mask(x.v, low.v), down = _mm512_cmple_epi32_mask(x.v, high.v);
    least.v = _mm512_mask_min_epi32(least.v, up, least.v, x.v);
    most.v = _mm512_mask_max_epi32(most.v, down, most.v, x.v);
    return up & down;
  }
};

template <>
struct Row<std::int64_t> {
  __m512i a, b;
  SPURGE_HD static Row load(const std::int64_t* p) { return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 8)}; }
  SPURGE_HD void store(std::int64_t* p) const { _mm512_storeu_si512(p, a), _mm512_storeu_si512(p + 8, b); }
  SPURGE_HD static void exchange(Row& x, Row& y) {
    const Row old = x;
    x = {_mm512_min_epi64(old.a, y.a), _mm512_min_epi64(old.b, y.b)};
    y = {_mm512_max_epi64(old.a, y.a), _mm512_max_epi64(old.b, y.b)};
  }
  SPURGE_HD void add_less(const Row& x, const Row& than) {
    const __m512i minus = _mm512_set1_epi64(-1);
    a = _mm512_mask_sub_epi64(a, _mm512_cmplt_epi64_mask(x.a, than.a), a, minus);
    b = _mm512_mask_sub_epi64(b, _mm512_cmplt_epi64_mask(x.b, than.b), b, minus);
  }
  SPURGE_HD static bool bound(const Row& x, const Row& low, const Row& high, Row& least, Row& most) {
    const __mmask8 up_a = _mm512_cmpge_epi64_mask(x.a, low.a), down_a = _mm512_cmple_epi64_mask(x.a, high.a);
    const __mmask8 up_b = _mm512_cmpge_epi64_mask(x.b, low.b), down_b = _mm512_cmple_epi64_mask(x.b, high.b);
    least.a = _mm512_mask_min_epi64(least.a, up_a, least.a, x.a);
    least.b = _mm512_mask_min_epi64(least.b, up_b, least.b, x.b);
    most.a = _mm512_mask_max_epi64(most.a, down_a, most.a, x.a);
    most.b = _mm512_mask_max_epi64(most.b, down_b, most.b, x.b);
    return (up_a & down_a) | (up_b & down_b);
  }
};

#elif defined(SPURGE_LEVEL_avx2)

template <>
struct Row<std::int32_t> {
  __m256i a, b;
  SPURGE_HD static __m256i get(const std::int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  SPURGE_HD static Row load(const std::int32_t* p) { return {get(p), get(p + 8)}; }
  SPURGE_HD void store(std::int32_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), b);
  }
  SPURGE_HD static void exchange(Row& x, Row& y) {
    const Row old = x;
    x = {_mm256_min_epi32(old.a, y.a), _mm256_min_epi32(old.b, y.b)};
    y = {_mm256_max_epi32(old.a, y.a), _mm256_max_epi32(old.b, y.b)};
  }
  SPURGE_HD void add_less(const Row& x, const Row& than) {
    a = _mm256_sub_epi32(a, _mm256_cmpgt_epi32(than.a, x.a));
    b = _mm256_sub_epi32(b, _mm256_cmpgt_epi32(than.b, x.b));
  }
  SPURGE_HD static __m256i bound_half(__m256i x, __m256i low, __m256i high, __m256i& least, __m256i& most) {
    const __m256i below = _mm256_cmpgt_epi32(low, x), above = _mm256_cmpgt_epi32(x, high);
    least = _mm256_blendv_epi8(_mm256_min_epi32(least, x), least, below);
    most = _mm256_blendv_epi8(_mm256_max_epi32(most, x), most, above);
    return _mm256_or_si256(below, above);
  }
  SPURGE_HD static bool bound(const Row& x, const Row& low, const Row& high, Row& least, Row& most) {
    const __m256i out = _mm256_and_si256(bound_half(x.a, low.a, high.a, least.a, most.a),
                                         bound_half(x.b, low.b, high.b, least.b, most.b));
    return _mm256_movemask_epi8(out) != -1;
  }
};

#endif

// ---- from a row of the matrix to keys ----------------------------------------------------------------

template <class T>
SPURGE_HD Key<T> one_key(const T* p, Transform transform, bool& nan) {
  const Acc<T> v = transformed(get_one(p), transform);
  nan |= v != v;
  return key_of(v);
}

#if defined(SPURGE_LEVEL_avx512)

SPURGE_HD __m512 get_tile(const float* p) { return _mm512_loadu_ps(p); }
SPURGE_HD __m512 get_tile(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SPURGE_HD __m512 get_tile(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// What a transform does to the bits: kept ones, flipped ones, and the smallest value.
struct Recipe {
  __m512i keep, flip;
  __m512 floor;
  explicit Recipe(Transform t)
      : keep(_mm512_set1_epi32(t == Transform::magnitude ? kMagnitude32 : -1)),
        flip(_mm512_set1_epi32(t == Transform::negative ? ~kMagnitude32 : 0)),
        floor(_mm512_set1_ps(t == Transform::raw ? -value_of(kInfinity) : 0.0f)) {}
};

template <class T>
SPURGE_HD bool put_keys(std::int32_t* to, const T* p, const Recipe& recipe) {
  const __m512i bits = _mm512_castps_si512(get_tile(p));
  const __m512 v = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_and_si512(bits, recipe.keep), recipe.flip));
  const __m512 x = _mm512_add_ps(_mm512_max_ps(recipe.floor, v), _mm512_setzero_ps());  // max keeps a NaN on its right
  const __m512i sign = _mm512_srai_epi32(_mm512_castps_si512(x), 31);
  const __m512i key =
      _mm512_xor_si512(_mm512_castps_si512(x), _mm512_and_si512(sign, _mm512_set1_epi32(kMagnitude32)));
  _mm512_storeu_si512(to, key);
  return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
}
#define SPURGE_KEYS

#elif defined(SPURGE_LEVEL_avx2)

SPURGE_HD __m256 get_tile(const float* p) { return _mm256_loadu_ps(p); }
SPURGE_HD __m256 get_tile(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SPURGE_HD __m256 get_tile(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

struct Recipe {
  __m256i keep, flip;
  __m256 floor;
  explicit Recipe(Transform t)
      : keep(_mm256_set1_epi32(t == Transform::magnitude ? kMagnitude32 : -1)),
        flip(_mm256_set1_epi32(t == Transform::negative ? ~kMagnitude32 : 0)),
        floor(_mm256_set1_ps(t == Transform::raw ? -value_of(kInfinity) : 0.0f)) {}
};

template <class T>
SPURGE_HD bool put_keys(std::int32_t* to, const T* p, const Recipe& recipe) {
  int nan = 0;
  for (int k = 0; k < kTile; k += 8) {
    const __m256i bits = _mm256_castps_si256(get_tile(p + k));
    const __m256 v = _mm256_castsi256_ps(_mm256_xor_si256(_mm256_and_si256(bits, recipe.keep), recipe.flip));
    const __m256 x = _mm256_add_ps(_mm256_max_ps(recipe.floor, v), _mm256_setzero_ps());
    const __m256i sign = _mm256_srai_epi32(_mm256_castps_si256(x), 31);
    const __m256i key =
        _mm256_xor_si256(_mm256_castps_si256(x), _mm256_and_si256(sign, _mm256_set1_epi32(kMagnitude32)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), key);
    nan |= _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  }
  return nan;
}
#define SPURGE_KEYS

#endif

// Keys of n rows, kTile columns of which `columns` exist (the others read as 0). True if there is a NaN. More rows
// follow, up to rows[last].
template <class T>
bool gather(Key<T>* tile, const T* features, std::int64_t stride, const std::int64_t* rows, std::int64_t n,
            [[maybe_unused]] std::int64_t last, std::int64_t columns, Transform transform) {
  bool nan = false;
#ifdef SPURGE_KEYS
  if constexpr (sizeof(Key<T>) == 4)
    if (columns == kTile) {
      constexpr std::int64_t ahead = 24;  // rows on their way: more than the memory takes to answer
      const Recipe recipe(transform);
      for (std::int64_t i = 0; i < n; ++i) {
        __builtin_prefetch(features + rows[i + ahead < last ? i + ahead : last] * stride, 0, 2);
        nan |= put_keys(tile + i * kTile, features + rows[i] * stride, recipe);
      }
      return nan;
    }
#endif
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t k = 0; k < kTile; ++k)
      tile[i * kTile + k] = k < columns ? one_key(features + rows[i] * stride + k, transform, nan) : 0;
  return nan;
}
#undef SPURGE_KEYS

constexpr std::int64_t kBlock = 32;  // rows

// ---- selection -------------------------------------------------------------------------------------

constexpr std::int64_t kSmall = 256;     // segments up to here are sorted at once: bounds have their price
constexpr std::int64_t kSorted = 64;     // rows that are sorted when bounds have closed in
constexpr std::int64_t kSample = 64;     // rows whose ranks kSampleLow from either end give the first bounds
constexpr std::int64_t kSampleLow = 20;  // three standard deviations of a sample's median from the middle
constexpr int kPatience = 8;             // rounds after which bounds are drawn to the nearest keys in any case

template <class K>
struct Limits {
  static constexpr K lowest = -kMagnitude32 - 1, highest = kMagnitude32;
};
template <>
struct Limits<std::int64_t> {
  static constexpr std::int64_t lowest = -kMagnitude64 - 1, highest = kMagnitude64;
};
template <class K>
struct Unsigned {
  using type = std::uint32_t;
};
template <>
struct Unsigned<std::int64_t> {
  using type = std::uint64_t;
};

// Batcher's merge exchange (Knuth 5.2.2 M): sorts each column of n rows.
template <class K>
void sort_rows(K* tile, std::int64_t n) {
  if (n < 2) return;
  std::int64_t top = 1;
  while (2 * top < n) top *= 2;
  for (std::int64_t p = top; p > 0; p /= 2)
    for (std::int64_t q = top, r = 0, d = p;; d = q - p, q /= 2, r = p) {
      for (std::int64_t i = 0; i < n - d; ++i) {
        if ((i & p) != r) continue;
        Row<K> a = Row<K>::load(tile + i * kTile), b = Row<K>::load(tile + (i + d) * kTile);
        Row<K>::exchange(a, b);
        a.store(tile + i * kTile);
        b.store(tile + (i + d) * kTile);
      }
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
  using U = typename Unsigned<K>::type;
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
      low[k] = Limits<K>::lowest;
      high[k] = Limits<K>::highest;
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
      least[k] = Limits<K>::highest;
      most[k] = Limits<K>::lowest;
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
      pivot[k] = key + (key < Limits<K>::highest);  // above it: finds at once that most keys are equal
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
