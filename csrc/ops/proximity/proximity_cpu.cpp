#include <algorithm>
#include <limits>
#include <vector>

#include "core/dtype.hpp"
#include "core/parallel.hpp"
#include "ops/proximity/proximity.hpp"

namespace spurge::proximity {

namespace {

constexpr std::int64_t kRowsPerThread = 256;  // about 0.1 ms of work

// Up to here the best scores are found one below the other, all lanes at once; beyond, by a selection.
constexpr std::int64_t kFew = 12;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The inner loops of this processor.
struct Loops {
  decltype(&baseline::moments) moments = SPURGE_SELECT(moments);
  decltype(&baseline::squares) squares = SPURGE_SELECT(squares);
  decltype(&baseline::under) under = SPURGE_SELECT(under);
  decltype(&baseline::mark_above) mark_above = SPURGE_SELECT(mark_above);
  decltype(&baseline::memberships) memberships = SPURGE_SELECT(memberships);
  decltype(&baseline::sums_of) sums_of = SPURGE_SELECT(sums_of);
  decltype(&baseline::add_pull) add_pull = SPURGE_SELECT(add_pull);
  decltype(&baseline::add_memberships) add_memberships = SPURGE_SELECT(add_memberships);
};

// What is asked of every row.
struct Question {
  const std::int32_t *ids, *bitmap;
  const std::int64_t* label;
  const Shape& shape;
  std::int64_t k;
  double sharpness;
};

// One row after the other: its real units, in their order, each array padded to kLanes.
class Row {
 public:
  explicit Row(const Question& question)
      : asked_(question), order_(padded(question.shape.units)), index_(order_.size()), id_(order_.size()) {
    for (auto* array : {&a_, &m_, &best_, &members_, &by_membership_, &by_score_}) array->resize(order_.size());
  }

  // Reads row r. False if there is no unit, or a score is NaN or infinite.
  template <class T>
  bool read(const T* scores, std::int64_t r) {
    const Shape& shape = asked_.shape;
    const std::int64_t b = r % shape.examples;
    const std::int32_t* const ids = asked_.ids + b * shape.units;
    label_ = asked_.label[b];
    n_ = 0;
    for (std::int64_t t = 0; t < shape.units; ++t) {
      a_[n_] = static_cast<double>(scores[t]);
      id_[n_] = ids[t];
      index_[n_] = t;
      n_ += ids[t] >= 0;
    }
    pad(a_, 0.0);
    const Moments found = loops_.moments(a_.data(), n_);
    if (n_ == 0 || !std::isfinite(found.size)) return false;
    const auto n = static_cast<double>(n_);
    const double mean = found.sum / n;
    pad(a_, mean);
    const double variance = loops_.squares(a_.data(), mean, n_) / n;
    sigmoid_ = sigmoid(asked_.sharpness, n, mean, variance, found.size / n);
    pad(a_, -kInfinity);
    place_border();
    pad(a_, mean);
    total_ = loops_.memberships(m_.data(), a_.data(), sigmoid_, n_);
    return true;
  }

  // Of a row that could be read.
  double chosen() const { return static_cast<double>(std::min(asked_.k, n_)); }

  // Sums over one set, whose members are looked up.
  Sums sums(std::int64_t set) {
    const std::int32_t* const bits = golden_bits(asked_.bitmap, asked_.shape, set, label_);
    for (std::int64_t i = 0; i < n_; ++i) members_[i] = member(bits, asked_.shape.words, id_[i]);
    pad(members_, 0.0);
    return loops_.sums_of(line(), members_.data(), total_);
  }

  void begin_pulls() {
    std::fill_n(by_membership_.begin(), padded(n_), 0.0);
    std::fill_n(by_score_.begin(), padded(n_), 0.0);
    all_ = 0;
  }
  // Of the set whose sums were taken last.
  void add(const Pull& pull) {
    loops_.add_pull(by_membership_.data(), by_score_.data(), line(), members_.data(), pull);
    all_ += pull.all;
  }
  template <class T>
  void put_pulls(T* grad) {
    const Turns turns = loops_.add_memberships(by_score_.data(), by_membership_.data(), line(), all_, sigmoid_);
    const Rest rest = rest_of(turns.sum, turns.stretched, more());
    by_score_[border_.last.index] += rest.last;
    if (more()) by_score_[border_.next.index] += rest.next;
    for (std::int64_t i = 0; i < n_; ++i)
      grad[index_[i]] = static_cast<T>(by_score_[i] + rest.temperature * sigmoid_.temperature_slope(a_[i]));
  }

  // `value` at the real units.
  template <class T>
  void put_all(T* grad, T value) const {
    for (std::int64_t i = 0; i < n_; ++i) grad[index_[i]] = value;
  }
  bool empty() const { return n_ == 0; }

 private:
  static std::size_t padded(std::int64_t n) { return static_cast<std::size_t>((n + kLanes - 1) / kLanes * kLanes); }
  bool more() const { return n_ > asked_.k; }
  Line line() const { return {n_, a_.data(), m_.data(), best_.data()}; }
  Unit unit(std::int64_t i) const { return {a_[i], i}; }

  void pad(std::vector<double>& array, double x) const {
    std::fill(array.begin() + n_, array.begin() + static_cast<std::ptrdiff_t>(padded(n_)), x);
  }

  // Threshold and the units it is made of, and which units are among the best. Scores are padded with -inf.
  void place_border() {
    const std::int64_t k = std::min(asked_.k, n_);
    if (k <= kFew) step_down(k);
    else select(k);
    const double last = border_.last.score;
    sigmoid_.tau = more() ? 0.5 * last + 0.5 * border_.next.score : last - sigmoid_.t;
    loops_.mark_above(best_.data(), a_.data(), last, n_);
    for (std::int64_t i = 0; i <= border_.last.index; ++i)
      if (a_[i] == last) best_[i] = 1;
  }

  // The k-th score and the one behind it, from the largest down, each time all that are equal.
  void step_down(std::int64_t k) {
    Under found = loops_.under(a_.data(), kInfinity, n_);
    double last = found.largest, before = 0;
    for (;;) {
      found = loops_.under(a_.data(), last, n_);
      if (found.others >= static_cast<double>(k)) break;
      before = found.others;
      last = found.largest;
    }
    border_.last = {last, find(last, 0, k - static_cast<std::int64_t>(before))};
    if (!more()) return;
    if (found.others > static_cast<double>(k)) border_.next = {last, find(last, border_.last.index + 1, 1)};
    else border_.next = {found.largest, find(found.largest, 0, 1)};
  }

  // The so-manieth of the units from some on that have a score.
  std::int64_t find(double score, std::int64_t from, std::int64_t which) const {
    while (a_[from] != score || --which > 0) ++from;
    return from;
  }

  void select(std::int64_t k) {
    Unit* const order = order_.data();
    for (std::int64_t i = 0; i < n_; ++i) order[i] = unit(i);
    if (more()) {
      std::nth_element(order, order + k, order + n_, precedes);
      border_.next = order[k];
    }
    border_.last = *std::max_element(order, order + k, precedes);
  }

  const Loops loops_;
  const Question& asked_;
  std::int64_t n_ = 0, label_ = 0;
  Sigmoid sigmoid_;
  Border border_{};
  double total_ = 0, all_ = 0;
  std::vector<Unit> order_;
  std::vector<std::int64_t> index_;
  std::vector<std::int32_t> id_;
  std::vector<double> a_, m_, best_, members_, by_membership_, by_score_;
};

template <class T>
void score_row(Row& row, T* hard, T* soft, const T* scores, std::int64_t r, std::int64_t sets) {
  if (!row.read(scores, r)) {
    const T value = row.empty() ? T(0) : std::numeric_limits<T>::quiet_NaN();
    std::fill_n(hard, sets, value);
    std::fill_n(soft, sets, value);
    return;
  }
  for (std::int64_t g = 0; g < sets; ++g) {
    const Sums sums = row.sums(g);
    hard[g] = static_cast<T>(hard_value(sums, row.chosen()));
    soft[g] = static_cast<T>(soft_value(sums));
  }
}

template <class T>
void pull_row(Row& row, T* grad, const T* by_hard, const T* by_soft, const T* scores, std::int64_t r,
              const Shape& shape) {
  std::fill_n(grad, shape.units, T(0));
  if (!row.read(scores, r)) return row.put_all(grad, std::numeric_limits<T>::quiet_NaN());
  row.begin_pulls();
  for (std::int64_t g = 0; g < shape.sets; ++g)
    row.add(pull_of(row.sums(g), static_cast<double>(by_hard[g]), static_cast<double>(by_soft[g])));
  row.put_pulls(grad);
}

void check_labels(const std::int64_t* label, const Shape& shape) {
  for (std::int64_t b = 0; b < shape.examples; ++b)
    SPURGE_CHECK(label[b] >= 0 && label[b] < shape.labels, "labels: must lie in [0, ", shape.labels, "), got ",
                 label[b]);
}

// f(row, r) of every row, each thread with a Row of its own.
template <class F>
void each_row(const Question& question, int threads, const F& f) {
  check_labels(question.label, question.shape);
  parallel_for(question.shape.rows, kRowsPerThread, threads, [&](std::int64_t begin, std::int64_t end) {
    Row row(question);
    for (std::int64_t r = begin; r < end; ++r) f(row, r);
  });
}

}  // namespace

void scores_cpu(void* hard, void* soft, const void* scores, const std::int32_t* ids, const std::int32_t* bitmap,
                const std::int64_t* label, const Shape& shape, std::int64_t k, double sharpness, DType dtype,
                int threads) {
  const Question question{ids, bitmap, label, shape, k, sharpness};
  dispatch_32_or_64("scores", dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    each_row(question, threads, [&](Row& row, std::int64_t r) {
      score_row(row, static_cast<T*>(hard) + r * shape.sets, static_cast<T*>(soft) + r * shape.sets,
                static_cast<const T*>(scores) + r * shape.units, r, shape.sets);
    });
  });
}

void gradient_cpu(void* grad, const void* by_hard, const void* by_soft, const void* scores, const std::int32_t* ids,
                  const std::int32_t* bitmap, const std::int64_t* label, const Shape& shape, std::int64_t k,
                  double sharpness, DType dtype, int threads) {
  const Question question{ids, bitmap, label, shape, k, sharpness};
  dispatch_32_or_64("scores", dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    each_row(question, threads, [&](Row& row, std::int64_t r) {
      pull_row(row, static_cast<T*>(grad) + r * shape.units, static_cast<const T*>(by_hard) + r * shape.sets,
               static_cast<const T*>(by_soft) + r * shape.sets, static_cast<const T*>(scores) + r * shape.units, r,
               shape);
    });
  });
}

}  // namespace spurge::proximity
