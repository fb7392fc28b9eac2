#include <algorithm>
#include <memory>
#include <vector>

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "ops/association/association.hpp"
#include "ops/association/association_math.hpp"
#include "spurge/association.hpp"

namespace spurge::association {

namespace {

constexpr std::int64_t kFolds = 256;  // classes of a chunk, whose sums are float32
constexpr std::int64_t kRows = 1536;  // outputs whose gradients are packed at once

// Samples of a chunk: many, so that sums and logs are rarely added to memory, as long as packed features stay in the
// second cache while all rows pass by; few, where so few rows pass by that packing is what takes the time.
std::int64_t samples_for(std::int64_t outputs) {
  return std::min<std::int64_t>(2048, kPiece * std::max<std::int64_t>(2, outputs / 16));
}

std::vector<Piece> cut_into_pieces(const Block& block) {
  std::vector<Piece> pieces;
  for (std::int64_t s = 0; s < block.segments; ++s) {
    const std::int64_t label = block.classes[s], last = block.starts[s + 1];
    const std::int64_t own = label < block.outputs ? label : kNoRow;
    const bool here = !block.resumed || s > 0, done = !block.unfinished || s + 1 < block.segments;
    std::int64_t at = block.starts[s];
    do {
      const std::int64_t end = std::min(at + kPiece, last);
      const std::int64_t picked = block.target < 0 ? own : label == block.target ? kEveryRow : kNoRow;
      pieces.push_back({at, end - at, label, picked, block.scales[s], here && at == block.starts[s],
                        done && end == last});
      at = end;
    } while (at < last);
  }
  return pieces;
}

// How many pieces from `first` on make a chunk; it ends with a class where one ends in its second half.
std::size_t chunk_of(const std::vector<Piece>& pieces, std::size_t first, std::int64_t most) {
  std::size_t end = first, border = first;
  std::int64_t samples = 0, folds = 0;
  for (; end < pieces.size(); ++end) {
    samples += pieces[end].length;
    if (end > first && (samples > most || folds == kFolds)) return border > first ? border : end;
    if (!pieces[end].ends) continue;
    ++folds;
    if (2 * samples > most) border = end + 1;
  }
  return end;
}

template <class A>
std::unique_ptr<A[]> scratch(std::int64_t size) {  // not written twice, as a vector would be
  return std::unique_ptr<A[]>(new A[static_cast<std::size_t>(size)]);
}

template <class T>
void associate(const Block& block, int threads) {
  using A = Acc<T>;
  const auto pack_g = SPURGE_SELECT(pack_gradients<A>);
  const auto pack_x = SPURGE_SELECT(pack_features<T>);
  const auto fold_up = SPURGE_SELECT(fold<A>);
  const std::vector<Piece> pieces = cut_into_pieces(block);
  const std::int64_t width = block.width, most = samples_for(block.outputs);
  std::vector<double> own_carry;
  std::vector<Piece> local;
  std::vector<A> factors;

  for (std::size_t first = 0, end = 0; first < pieces.size(); first = end) {
    end = chunk_of(pieces, first, most);
    const std::int64_t begin = pieces[first].begin, samples = pieces[end - 1].begin + pieces[end - 1].length - begin;
    if (!block.unfinished && own_carry.empty() && !pieces[end - 1].ends)
      own_carry.resize(static_cast<std::size_t>(block.outputs * width));
    double* const after = block.unfinished ? block.carry : own_carry.data();
    const double* const before = first == 0 ? block.carry : after;

    local.assign(pieces.begin() + static_cast<std::ptrdiff_t>(first), pieces.begin() + static_cast<std::ptrdiff_t>(end));
    factors.assign(static_cast<std::size_t>(samples), A(1));
    for (Piece& piece : local) {
      piece.begin -= begin;
      if (piece.whole()) std::fill_n(factors.begin() + piece.begin, piece.length, static_cast<A>(piece.scale));
    }
    const auto* const x = static_cast<const T*>(block.features) + begin * width;
    const auto* const g = static_cast<const A*>(block.gradients) + begin * block.outputs;
    const auto count = static_cast<std::int64_t>(local.size());

    std::int64_t row = 0;
    do {
      const std::int64_t rows = std::min(block.outputs - row, kRows);
      const auto packed = scratch<A>(samples * rows);
      parallel_for(samples, kElementsPerThread / std::max<std::int64_t>(rows, 1) + 1, threads,
                   [&](std::int64_t from, std::int64_t to) {
                     pack_g(packed.get(), g + row, block.outputs, rows, factors.data(), samples, from, to);
                   });
      const Chunk<A> chunk{local.data(), count,      samples,    packed.get(), row,   rows,
                           width,        block.sums, block.logs, before,       after, block.picked};
      const auto body = [&](std::int64_t from, std::int64_t to) {
        const auto panels = scratch<A>(samples * kColumns);
        for (std::int64_t m = from; m < to; m += kColumns) {
          const std::int64_t columns = std::min(kColumns, to - m);
          double* const active = row == 0 ? block.activations + m : nullptr;
          pack_x(panels.get(), active, x + m, width, columns, local.data(), count, samples, block.relu);
          fold_up(chunk, panels.get(), m, columns);
        }
      };
      const std::int64_t work = samples * (1 + rows / 64) + 1;  // about a nanosecond each
      parallel_for(width, kElementsPerThread / work + 1, threads, body, kColumns);
      row += rows;
    } while (row < block.outputs);
  }
}

}  // namespace

std::int64_t associate_workspace(std::int64_t samples, std::int64_t width, std::int64_t outputs) {
  const std::int64_t parts = cut_samples(samples, width, outputs).count;
  return parts == 1 ? 0 : parts * (4 * outputs + 2) * width;
}

void associate_cpu(const Block& block, int threads) {
  dispatch_floating(block.dtype, [&](auto tag) { associate<typename decltype(tag)::type>(block, threads); });
}

}  // namespace spurge::association
