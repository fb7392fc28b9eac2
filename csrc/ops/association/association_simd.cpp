// A tile of rows by two vectors of columns stays in registers while the samples of a class pass by; its logarithms
// follow from there, and sums and logs reach memory once per chunk. Multiplications are fused with additions where the
// instruction set can: twice the speed, and another last bit than where it can not.
#include "ops/association/association.hpp"
#include "ops/association/association_math.hpp"

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__clang__)
#define SPURGE_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define SPURGE_UNROLL _Pragma("GCC unroll 16")
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns of its own avx512fintrin.h
#else
#define SPURGE_UNROLL
#endif

namespace spurge::association::SPURGE_LEVEL {

namespace {

// Numbers below the smallest normal one cost a hundred times as much as others, and there can be many: gradients of
// samples that the model is sure of. Here they are 0.
class FlushTiny {
 public:
#if defined(__SSE2__)
  FlushTiny() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~FlushTiny() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

// ---- Vec<A>: one register, or on unknown machines something that the compiler makes registers of -------------------

template <class A>
struct Vec {
  static constexpr int n = 4;
  A v[n];
  static Vec all(A x) {
    Vec to;
    for (A& e : to.v) e = x;
    return to;
  }
  static Vec load(const A* p) {
    Vec to;
    for (int i = 0; i < n; ++i) to.v[i] = p[i];
    return to;
  }
  template <class T>
  static Vec widened(const T* p) {
    Vec to;
    for (int i = 0; i < n; ++i) to.v[i] = widen(p[i]);
    return to;
  }
  void store(A* p) const {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
  friend Vec magnitude(Vec x) {
    for (A& e : x.v) e = e < 0 ? -e : e;
    return x;
  }
  friend Vec positive(Vec x) {  // NaN stays NaN
    for (A& e : x.v) e = e < 0 ? A(0) : e;
    return x;
  }
  friend Vec operator+(Vec a, Vec b) {
    for (int i = 0; i < n; ++i) a.v[i] += b.v[i];
    return a;
  }
  friend Vec fused(Vec a, Vec b, Vec sum) {
    for (int i = 0; i < n; ++i) sum.v[i] += a.v[i] * b.v[i];
    return sum;
  }
};

#if defined(SPURGE_LEVEL_avx512)

constexpr int kRows = 12;

template <>
struct Vec<float> {
  static constexpr int n = 16;
  __m512 v;
  static Vec all(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec widened(const float* p) { return load(p); }
  static Vec widened(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Vec widened(const bf16* p) {
    const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  friend Vec magnitude(Vec x) { return {_mm512_abs_ps(x.v)}; }
  friend Vec positive(Vec x) { return {_mm512_max_ps(_mm512_setzero_ps(), x.v)}; }  // NaN: the second one
  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec fused(Vec a, Vec b, Vec sum) { return {_mm512_fmadd_ps(a.v, b.v, sum.v)}; }
};

template <>
struct Vec<double> {
  static constexpr int n = 8;
  __m512d v;
  static Vec all(double x) { return {_mm512_set1_pd(x)}; }
  static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Vec widened(const double* p) { return load(p); }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  friend Vec magnitude(Vec x) { return {_mm512_abs_pd(x.v)}; }
  friend Vec positive(Vec x) { return {_mm512_max_pd(_mm512_setzero_pd(), x.v)}; }
  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend Vec fused(Vec a, Vec b, Vec sum) { return {_mm512_fmadd_pd(a.v, b.v, sum.v)}; }
};

// 1 / c, and log(c) for that rounded 1 / c, at the middle c of each of 32 parts of [1, 2]
alignas(64) constexpr float kInverse[32] = {
    0.984615386f, 0.955223858f, 0.927536249f, 0.901408434f, 0.876712322f, 0.853333354f, 0.83116883f,  0.810126603f,
    0.790123463f, 0.771084309f, 0.752941191f, 0.735632181f, 0.719101131f, 0.703296721f, 0.688172042f, 0.673684239f,
    0.659793794f, 0.646464646f, 0.633663356f, 0.621359229f, 0.609523833f, 0.598130822f, 0.587155938f, 0.576576591f,
    0.566371679f, 0.556521714f, 0.547008574f, 0.537815154f, 0.528925598f, 0.520325184f, 0.512000024f, 0.503937006f};
alignas(64) constexpr float kLog[32] = {
    0.015504186f, 0.0458095595f, 0.0752234012f, 0.10379681f,  0.131576359f, 0.158605009f, 0.184922338f, 0.210564747f,
    0.235566065f, 0.259957552f,  0.283768147f,  0.307025045f, 0.32975328f,  0.351976395f, 0.373716414f, 0.394993752f,
    0.41582793f,  0.436236769f,  0.456237435f,  0.475845903f, 0.495077223f, 0.513945758f, 0.532464862f, 0.55064708f,
    0.568504751f, 0.58604908f,   0.603290796f,  0.620240331f, 0.636907518f, 0.653301299f, 0.669430614f, 0.685303986f};

// log of numbers >= 0, those below the smallest normal one taken for it: infinity and NaN stay, 0 times it is 0.
// The mantissa is c (1 + r) with |r| <= 1/65; the polynomial is log(1 + r) to 3e-9.
SPURGE_HD Vec<float> logarithm(Vec<float> of) {
  const __m512 x = _mm512_max_ps(_mm512_set1_ps(1.17549435e-38f), of.v);
  const __m512 e = _mm512_getexp_ps(x), m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  const __m512i part = _mm512_srli_epi32(_mm512_castps_si512(x), 18);
  const __m512 inverse = _mm512_permutex2var_ps(_mm512_load_ps(kInverse), part, _mm512_load_ps(kInverse + 16));
  const __m512 middle = _mm512_permutex2var_ps(_mm512_load_ps(kLog), part, _mm512_load_ps(kLog + 16));
  const __m512 r = _mm512_fmsub_ps(m, inverse, _mm512_set1_ps(1.0f));
  __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(0.33339252f), _mm512_set1_ps(-0.50004932f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return {_mm512_fmadd_ps(p, r, _mm512_fmadd_ps(e, _mm512_set1_ps(0.693147181f), middle))};
}

#elif defined(SPURGE_LEVEL_avx2)

constexpr int kRows = 6;

template <>
struct Vec<float> {
  static constexpr int n = 8;
  __m256 v;
  static Vec all(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec widened(const float* p) { return load(p); }
  static Vec widened(const f16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static Vec widened(const bf16* p) {
    const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  friend Vec magnitude(Vec x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)}; }
  friend Vec positive(Vec x) { return {_mm256_max_ps(_mm256_setzero_ps(), x.v)}; }  // NaN: the second one
  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec fused(Vec a, Vec b, Vec sum) { return {_mm256_fmadd_ps(a.v, b.v, sum.v)}; }
};

template <>
struct Vec<double> {
  static constexpr int n = 4;
  __m256d v;
  static Vec all(double x) { return {_mm256_set1_pd(x)}; }
  static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static Vec widened(const double* p) { return load(p); }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  friend Vec magnitude(Vec x) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), x.v)}; }
  friend Vec positive(Vec x) { return {_mm256_max_pd(_mm256_setzero_pd(), x.v)}; }
  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend Vec fused(Vec a, Vec b, Vec sum) { return {_mm256_fmadd_pd(a.v, b.v, sum.v)}; }
};

// 1 / c, and log(c) for that rounded 1 / c, at the middle c of each of 8 parts of [1, 2]
alignas(32) constexpr float kInverse[8] = {0.941176474f, 0.842105269f, 0.761904776f, 0.695652187f,
                                           0.639999986f, 0.592592597f, 0.551724136f, 0.516129017f};
alignas(32) constexpr float kLog[8] = {0.0606246181f, 0.171850249f, 0.271933705f, 0.362905473f,
                                       0.446287125f,  0.523248136f, 0.594707131f, 0.66139853f};

// log of numbers >= 0, those below the smallest normal one taken for it: infinity stays, NaN becomes some number, 0
// times it is 0. The mantissa is c (1 + r) with |r| <= 1/17; the polynomial is log(1 + r) to 1e-8.
SPURGE_HD Vec<float> logarithm(Vec<float> of) {
  const __m256i bits = _mm256_castps_si256(_mm256_max_ps(_mm256_set1_ps(1.17549435e-38f), of.v));
  const __m256i one = _mm256_set1_epi32(0x3f800000), fraction = _mm256_set1_epi32(0x7fffff);
  const __m256 e = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127)));
  const __m256 m = _mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(bits, fraction), one));
  const __m256i part = _mm256_srli_epi32(bits, 20);  // of which the permutation takes the lowest 3 bits
  const __m256 inverse = _mm256_permutevar8x32_ps(_mm256_load_ps(kInverse), part);
  const __m256 middle = _mm256_permutevar8x32_ps(_mm256_load_ps(kLog), part);
  const __m256 r = _mm256_fmsub_ps(m, inverse, _mm256_set1_ps(1.0f));
  __m256 p = _mm256_fmadd_ps(r, _mm256_set1_ps(-0.25080975f), _mm256_set1_ps(0.33420064f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(-0.49999912f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.99999925f));
  return {_mm256_fmadd_ps(p, r, _mm256_fmadd_ps(e, _mm256_set1_ps(0.693147181f), middle))};
}

#else

constexpr int kRows = 4;

SPURGE_HD Vec<float> logarithm(Vec<float> x) {
  for (float& e : x.v) e = e < 1.17549435e-38f ? -87.3365447f : association::logarithm(e);
  return x;
}

#endif

SPURGE_HD Vec<double> logarithm(Vec<double> x) {
  double values[Vec<double>::n];
  x.store(values);
  for (double& e : values) e = e < 2.2250738585072014e-308 ? -708.0 : association::logarithm(e);
  return Vec<double>::load(values);
}

// Rows lie far apart in memory: the processor does not see by itself which one comes next.
constexpr std::int64_t kAhead = 8;
template <class T>
constexpr int kLine = static_cast<int>(64 / sizeof(T));
SPURGE_HD void fetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}

template <class A>
constexpr int kPanel = 2 * Vec<A>::n;  // columns side by side

// ---- packing --------------------------------------------------------------------------------------------------------

// A few magnitudes times a factor.
template <class A>
SPURGE_HD void pack_few(A* to, const A* from, std::int64_t some, A factor) {
#if defined(SPURGE_LEVEL_avx512)
  if constexpr (sizeof(A) == 4) {
    const __mmask16 those = static_cast<__mmask16>((1u << some) - 1);
    const __m512 x = _mm512_mul_ps(_mm512_abs_ps(_mm512_maskz_loadu_ps(those, from)), _mm512_set1_ps(factor));
    return _mm512_mask_storeu_ps(to, those, x);
  }
#endif
  for (std::int64_t r = 0; r < some; ++r) to[r] = (from[r] < 0 ? -from[r] : from[r]) * factor;
}

// Rows of tile t: as even as can be, kRows at most.
SPURGE_HD std::int64_t tiles_of(std::int64_t rows) { return (rows + kRows - 1) / kRows; }
SPURGE_HD std::int64_t tile_start(std::int64_t rows, std::int64_t t) { return rows * t / tiles_of(rows); }

}  // namespace

template <class A>
void pack_gradients(A* to, const A* from, std::int64_t outputs, std::int64_t rows, const A* factors,
                    std::int64_t samples, std::int64_t begin, std::int64_t end) {
  const FlushTiny flush;
  const std::int64_t tiles = tiles_of(rows);
  for (std::int64_t n = begin; n < end; ++n) {
    const A* const g = from + n * outputs;
    for (std::int64_t t = 0, first = 0, next = 0; t < tiles; ++t, first = next) {
      next = tile_start(rows, t + 1);
      pack_few(to + first * samples + n * (next - first), g + first, next - first, factors[n]);
    }
  }
}

namespace {

// P panels side by side for one piece; sums [P panels] are the activations.
template <int P, class T>
void pack_panels(Acc<T>* to, Acc<T>* sums, const T* from, std::int64_t stride, const Piece& piece,
                 std::int64_t samples, bool relu) {
  using V = Vec<Acc<T>>;
  constexpr int panel = kPanel<Acc<T>>;
  V totals[2 * P];
  SPURGE_UNROLL
  for (int p = 0; p < 2 * P; ++p) totals[p] = V::all(Acc<T>(0));
  for (std::int64_t n = 0; n < piece.length; ++n) {
    const T* const x = from + n * stride;
    Acc<T>* const at = to + (piece.begin + n) * panel;
    for (int k = 0; k < P * panel; k += kLine<T>) fetch(x + kAhead * stride + k);
    SPURGE_UNROLL
    for (int p = 0; p < 2 * P; ++p) {
      const V value = V::widened(x + p * V::n), size = magnitude(value);
      size.store(at + p / 2 * samples * panel + p % 2 * V::n);
      totals[p] = totals[p] + (relu ? positive(value) : size);
    }
  }
  SPURGE_UNROLL
  for (int p = 0; p < 2 * P; ++p) totals[p].store(sums + p * V::n);
}

}  // namespace

template <class T>
void pack_features(Acc<T>* to, double* activations, const T* from, std::int64_t stride, std::int64_t columns,
                   const Piece* pieces, std::int64_t count, std::int64_t samples, bool relu) {
  constexpr int panel = kPanel<Acc<T>>, wide = 4 * panel;
  const FlushTiny flush;
  for (std::int64_t i = 0; i < count; ++i) {
    const Piece& piece = pieces[i];
    const T* const first = from + piece.begin * stride;
    Acc<T> sums[kColumns + panel];
    std::int64_t k = 0;
    for (; k + wide <= columns; k += wide)
      pack_panels<4>(to + k * samples, sums + k, first + k, stride, piece, samples, relu);
    for (; k + panel <= columns; k += panel)
      pack_panels<1>(to + k * samples, sums + k, first + k, stride, piece, samples, relu);
    if (k < columns) {
      T last[kPiece][panel] = {};
      for (std::int64_t n = 0; n < piece.length; ++n)
        for (std::int64_t j = k; j < columns; ++j) last[n][j - k] = first[n * stride + j];
      pack_panels<1>(to + k * samples, sums + k, last[0], panel, piece, samples, relu);
    }
    if (!activations) continue;
    double* const active = activations + piece.label * stride;
    for (k = 0; k < columns; ++k) active[k] += piece.scale * static_cast<double>(sums[k]);
  }
}

namespace {

// ---- one tile -------------------------------------------------------------------------------------------------------

template <int R, class A>
struct Tile {
  static constexpr int columns = kPanel<A>;
  A values[R][columns];  // on their way between registers and the rest
  A sums[R][columns], logs[R][columns];
  double part[R][columns];  // of a class that takes several pieces
};

// Of a full panel the compiler knows the size, and makes it a few moves.
template <int Panel>
SPURGE_HD void copy_columns(double* to, const double* from, std::int64_t columns) {
  if (columns == Panel)
    for (int k = 0; k < Panel; ++k) to[k] = from[k];
  else
    for (std::int64_t k = 0; k < columns; ++k) to[k] = from[k];
}

template <int R, class A>
void keep(const Chunk<A>& chunk, const Piece& piece, const Tile<R, A>& tile, std::int64_t row, std::int64_t column,
          std::int64_t columns) {
  for (int r = 0; r < R; ++r) {
    if (piece.picked != kEveryRow && piece.picked != row + r) continue;
    float* const to = chunk.picked + (row + r) * chunk.width + column;
    for (std::int64_t k = 0; k < columns; ++k) to[k] = static_cast<float>(tile.values[r][k]);
  }
}

// Adds the piece in values to the class's sum so far; leaves the scaled whole in values where the class ends.
template <int R, class A>
void join(const Chunk<A>& chunk, const Piece* piece, Tile<R, A>& tile, std::int64_t row, std::int64_t column,
          std::int64_t columns) {
  constexpr int panel = kPanel<A>;
  const bool from_before = piece == chunk.pieces && !piece->begins;
  const bool goes_on = piece == chunk.pieces + chunk.count - 1 && !piece->ends;
  for (int r = 0; r < R; ++r) {
    const std::int64_t at = (row + r) * chunk.width + column;
    double* const part = tile.part[r];
    if (from_before)
      copy_columns<panel>(part, chunk.before + at, columns);
    else if (piece->begins)
      for (int k = 0; k < panel; ++k) part[k] = 0;
    for (int k = 0; k < panel; ++k) part[k] += static_cast<double>(tile.values[r][k]);
    if (goes_on) copy_columns<panel>(chunk.after + at, part, columns);
    if (piece->ends)
      for (int k = 0; k < panel; ++k) tile.values[r][k] = static_cast<A>(part[k] * piece->scale);
  }
}

template <int R, class A>
void fold_tile(const Chunk<A>& chunk, const A* gradients, const A* features, std::int64_t row, std::int64_t column,
               std::int64_t columns) {
  using V = Vec<A>;
  constexpr int panel = kPanel<A>;
  alignas(64) Tile<R, A> tile = {};
  for (const Piece* piece = chunk.pieces; piece != chunk.pieces + chunk.count; ++piece) {
    V a[R], b[R];
    SPURGE_UNROLL
    for (int r = 0; r < R; ++r) a[r] = b[r] = V::all(A(0));
    const A* g = gradients + piece->begin * R;
    const A* x = features + piece->begin * panel;
    for (std::int64_t n = piece->length; n > 0; --n, g += R, x += panel) {
      const V left = V::load(x), right = V::load(x + V::n);
      SPURGE_UNROLL
      for (int r = 0; r < R; ++r) {
        const V factor = V::all(g[r]);
        a[r] = fused(factor, left, a[r]);
        b[r] = fused(factor, right, b[r]);
      }
    }
    if (!piece->whole() || piece->picked != kNoRow) {
      SPURGE_UNROLL
      for (int r = 0; r < R; ++r) a[r].store(tile.values[r]), b[r].store(tile.values[r] + V::n);
      if (!piece->whole()) join<R>(chunk, piece, tile, row, column, columns);
      if (!piece->ends) continue;
      if (piece->picked != kNoRow) keep<R>(chunk, *piece, tile, row, column, columns);
      SPURGE_UNROLL
      for (int r = 0; r < R; ++r) a[r] = V::load(tile.values[r]), b[r] = V::load(tile.values[r] + V::n);
    }
    SPURGE_UNROLL
    for (int r = 0; r < R; ++r) {
      (V::load(tile.sums[r]) + a[r]).store(tile.sums[r]);
      fused(a[r], logarithm(a[r]), V::load(tile.logs[r])).store(tile.logs[r]);
      (V::load(tile.sums[r] + V::n) + b[r]).store(tile.sums[r] + V::n);
      fused(b[r], logarithm(b[r]), V::load(tile.logs[r] + V::n)).store(tile.logs[r] + V::n);
    }
  }
  for (int r = 0; r < R; ++r) {
    const std::int64_t at = (row + r) * chunk.width + column;
    double *const sums = chunk.sums + at, *const logs = chunk.logs + at;
    for (std::int64_t k = 0; k < columns; ++k) sums[k] += static_cast<double>(tile.sums[r][k]);
    for (std::int64_t k = 0; k < columns; ++k) logs[k] += static_cast<double>(tile.logs[r][k]);
  }
}

template <int R, class A>
void fold_rows(std::int64_t some, const Chunk<A>& chunk, const A* gradients, const A* features, std::int64_t row,
               std::int64_t column, std::int64_t columns) {
  if (some == R) return fold_tile<R>(chunk, gradients, features, row, column, columns);
  if constexpr (R > 1) fold_rows<R - 1>(some, chunk, gradients, features, row, column, columns);
}

}  // namespace

template <class A>
void fold(const Chunk<A>& chunk, const A* features, std::int64_t column, std::int64_t columns) {
  constexpr int panel = kPanel<A>;
  const FlushTiny flush;
  const std::int64_t tiles = tiles_of(chunk.rows);
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::int64_t first = tile_start(chunk.rows, t), some = tile_start(chunk.rows, t + 1) - first;
    for (std::int64_t k = 0; k < columns; k += panel) {
      const std::int64_t left = columns - k;
      fold_rows<kRows>(some, chunk, chunk.gradients + first * chunk.samples, features + k * chunk.samples,
                       chunk.row + first, column + k, left < panel ? left : panel);
    }
  }
}

#define SPURGE_INSTANTIATE(T)                                                                                     \
  template void pack_features<T>(Acc<T>*, double*, const T*, std::int64_t, std::int64_t, const Piece*, std::int64_t, \
                                 std::int64_t, bool);
SPURGE_INSTANTIATE(float)
SPURGE_INSTANTIATE(double)
SPURGE_INSTANTIATE(bf16)
SPURGE_INSTANTIATE(f16)
#undef SPURGE_INSTANTIATE
#define SPURGE_INSTANTIATE(A)                                                                                   \
  template void pack_gradients<A>(A*, const A*, std::int64_t, std::int64_t, const A*, std::int64_t, std::int64_t, \
                                  std::int64_t);                                                                \
  template void fold<A>(const Chunk<A>&, const A*, std::int64_t, std::int64_t);
SPURGE_INSTANTIATE(float)
SPURGE_INSTANTIATE(double)
#undef SPURGE_INSTANTIATE

}  // namespace spurge::association::SPURGE_LEVEL
