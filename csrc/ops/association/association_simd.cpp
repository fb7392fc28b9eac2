// A tile of rows by two vectors of columns stays in registers while the samples of a class pass by; its logarithms
// follow from there, and sums and logs reach memory once per chunk. Multiplications are fused with additions where the
// instruction set can: twice the speed, and another last bit than where it can not.
#include "core/simd.hpp"
#include "ops/association/association.hpp"
#include "ops/association/association_math.hpp"

namespace spurge::association::SPURGE_LEVEL {

using spurge::SPURGE_LEVEL::bits_as;
using spurge::SPURGE_LEVEL::fetch;
using spurge::SPURGE_LEVEL::FlushTiny;
using spurge::SPURGE_LEVEL::Vec;

// Of normal numbers the smallest, and the logarithm taken for all below it: 0 times it is 0.
template <class A>
struct Smallest;
template <>
struct Smallest<float> {
  static constexpr float number = 1.17549435e-38f, log = -87.3365447f;
};
template <>
struct Smallest<double> {
  static constexpr double number = 2.2250738585072014e-308, log = -708.0;
};

namespace {

// ---- logarithms of numbers >= 0 --------------------------------------------------------------------------

template <class A>
Vec<A> logarithm(Vec<A> x) {
  A lanes[Vec<A>::n];
  x.store(lanes);
  for (A& e : lanes) e = e < Smallest<A>::number ? Smallest<A>::log : association::logarithm(e);
  return Vec<A>::load(lanes);
}

// kInverse, kLog: of the middle c of each of kTable parts of [1, 2], 1 / c and log(c) for that rounded 1 / c.
// kSeries: log(1 + r) / r, the highest power first.
#if defined(SPURGE_LEVEL_avx512)

constexpr int kRows = 12;  // of a tile
constexpr int kPart = 18;  // the lowest bit of a number that tells its part
constexpr float kSeries[] = {0.33339252f, -0.50004932f, 1.0f};  // log(1 + r) to 3e-9 for |r| <= 1/65
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

#elif defined(SPURGE_LEVEL_avx2)

constexpr int kRows = 6;
constexpr int kPart = 20;
constexpr float kSeries[] = {-0.25080975f, 0.33420064f, -0.49999912f, 0.99999925f};  // to 1e-8 for |r| <= 1/17
alignas(32) constexpr float kInverse[8] = {0.941176474f, 0.842105269f, 0.761904776f, 0.695652187f,
                                           0.639999986f, 0.592592597f, 0.551724136f, 0.516129017f};
alignas(32) constexpr float kLog[8] = {0.0606246181f, 0.171850249f, 0.271933705f, 0.362905473f,
                                       0.446287125f,  0.523248136f, 0.594707131f, 0.66139853f};

#else

constexpr int kRows = 4;

#endif

#ifdef SPURGE_REGISTERS

// Of a mantissa c (1 + r). Infinity stays; what becomes of NaN depends on the instruction set.
SPURGE_HD Vec<float> logarithm(Vec<float> of) {
  using V = Vec<float>;
  const V x = larger(V::all(Smallest<float>::number), of);
  const auto part = bits_as<std::uint32_t>(x) >> kPart;
  const V r = fused(mantissa(x), looked_up(kInverse, part), V::all(-1.0f));
  V series = V::all(kSeries[0]);
  SPURGE_UNROLL
  for (int i = 1; i < static_cast<int>(sizeof kSeries / sizeof *kSeries); ++i)
    series = fused(series, r, V::all(kSeries[i]));
  return fused(series, r, fused(exponent(x), V::all(0.693147181f), looked_up(kLog, part)));
}

#endif

// Rows lie far apart in memory: the processor does not see by itself which one comes next.
constexpr std::int64_t kAhead = 8;
template <class T>
constexpr int kLine = static_cast<int>(64 / sizeof(T));
template <class A>
constexpr int kPanel = 2 * Vec<A>::n;  // columns side by side

// ---- packing --------------------------------------------------------------------------------------------------------

// A few magnitudes times a factor.
template <class A>
SPURGE_HD void pack_few(A* to, const A* from, std::int64_t some, A factor) {
  constexpr int n = Vec<A>::n;
  for (std::int64_t r = 0; r < some; r += n) {
    const std::int64_t left = some - r < n ? some - r : n;
    (magnitude(Vec<A>::load(from + r, left)) * Vec<A>::all(factor)).store(to + r, left);
  }
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
      const V value = V::load(x + p * V::n), size = magnitude(value);
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
