// Runs every kernel that has a barrier on small problems, for ThreadSanitizer to watch:  spurge_races [OP ...]
// It ends with another status than 0 where threads race, or where threads miss a barrier.
#include <cstdio>
#include <exception>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation/cuda_runtime.h"
#include "spurge/association.hpp"
#include "spurge/balance.hpp"
#include "spurge/ig.hpp"
#include "spurge/median.hpp"
#include "spurge/proximity.hpp"
#include "spurge/swarm.hpp"
#include "spurge/sweep.hpp"

namespace spurge {
namespace {

using Doubles = std::vector<double>;
using Floats = std::vector<float>;
using Numbers = std::vector<std::int64_t>;

const CudaPlace place{};
const balance::Newton kNewton{1e-9, 3};
std::mt19937_64 engine(1);

template <class T = double>
std::vector<T> normal(std::int64_t n) {
  std::normal_distribution<double> draw;
  std::vector<T> out(static_cast<std::size_t>(n));
  for (T& x : out) x = static_cast<T>(draw(engine));
  return out;
}

template <class T = double>
std::vector<T> filled(std::int64_t n, T x) {
  return std::vector<T>(static_cast<std::size_t>(n), x);
}

Numbers borders(const Numbers& sizes) {
  Numbers out{0};
  for (std::int64_t n : sizes) out.push_back(out.back() + n);
  return out;
}

void associate(const Numbers& sizes, std::int64_t outputs) {
  const Numbers starts = borders(sizes), classes{2, 0, 3, 1};
  const std::int64_t samples = starts.back(), width = 70, labels = 4;
  const auto features = normal<float>(samples * width), gradients = normal<float>(samples * outputs);
  Doubles sums = filled(outputs * width, 0.0), logs = sums, carry = sums, active = filled(labels * width, 0.0);
  Doubles room = filled(association::associate_workspace(samples, width, outputs), 0.0);
  Floats picked = filled(outputs * width, 0.0f);
  const Doubles scales = filled(4, 0.5);
  association::associate_cuda({sums.data(), logs.data(), carry.data(), picked.data(), active.data(), features.data(),
                               gradients.data(), starts.data(), classes.data(), scales.data(), samples, width, outputs,
                               4, labels, -1, false, true, true, DType::f32, room.data()},
                              place);
}

void association() {
  for (const std::int64_t outputs : {3, 40}) associate({300, 20, 0, 30}, outputs);
  associate({300, 20, 0, 900}, 3);  // in two parts
}

void balance_sweep() {
  for (const balance::SweepShape shape : {balance::SweepShape{1100, 3}, {600, 70}, {300, 300}, {40, 4200}}) {
    const std::int64_t columns = shape.columns;
    const auto covariates = normal<float>(shape.rows * columns);
    const Doubles base = filled(shape.rows, 1.0), dual = normal(columns);
    Doubles scores = base, mean = dual, value(2), room = filled(balance::sweep_workspace(shape), 0.0);
    balance::sweep_cuda(scores.data(), mean.data(), value.data(), room.data(), covariates.data(), base.data(),
                        dual.data(), shape, DType::f32, place);
  }
}

void balance_batch() {
  for (const std::int64_t columns : {2, 13}) {
    const balance::BatchShape shape{2, 150, columns, 9, true};
    const auto covariates = normal<float>(2 * shape.rows * columns);
    const Doubles base = filled(shape.rows, 1.0), targets = filled(2 * columns, 0.1), start = filled(2 * columns, 0.0);
    const Doubles outcomes = normal(shape.rows * shape.outcomes);
    Doubles dual = start, means = filled(2 * shape.outcomes, 0.0), report = filled(2 * balance::kReport, 0.0);
    Doubles room = filled(balance::batch_workspace(shape), 0.0);
    std::vector<std::int32_t> status(2);
    balance::batch_cuda(dual.data(), means.data(), report.data(), status.data(), room.data(), covariates.data(),
                        base.data(), targets.data(), outcomes.data(), start.data(), shape, kNewton, DType::f32, place);
  }
}

void strata_of(const Numbers& sizes, bool interact, bool squared, bool constant) {
  const Numbers starts = borders(sizes);
  const auto strata = static_cast<std::int64_t>(sizes.size());
  const balance::StrataShape shape{1, starts.back(), strata, 9, interact};
  auto values = normal<float>(shape.rows);
  if (constant) values.assign(values.size(), 0.1f);
  const Doubles base = filled(shape.rows, 1.0), masses = filled(strata, 1.0 / static_cast<double>(strata));
  const Doubles means = filled(strata, constant ? double(0.1f) : 0.05), squares{1.1};
  const Doubles outcomes = normal(shape.rows * shape.outcomes), start = filled(strata + 1, 0.0);
  Doubles dual = start, averages = filled(shape.outcomes, 0.0), report = filled(balance::kReport, 0.0);
  Doubles room = filled(balance::strata_workspace(shape), 0.0);
  std::vector<std::int32_t> status(1);
  balance::strata_cuda(dual.data(), averages.data(), report.data(), status.data(), room.data(), values.data(),
                       starts.data(), base.data(), masses.data(), means.data(), squared ? squares.data() : nullptr,
                       outcomes.data(), start.data(), shape, kNewton, DType::f32, place);
}

void balance_strata() {
  for (const Numbers& sizes : {Numbers{300, 280}, Numbers{5, 40, 33, 64, 12, 31, 32, 90, 17, 20}})
    for (const bool interact : {true, false}) {
      for (const bool squared : {true, false}) strata_of(sizes, interact, squared, false);
      strata_of(sizes, interact, false, true);
    }
}

void ig() {
  const std::int64_t examples = 2, tokens = 19, width = 40;
  const auto p = normal<float>(examples * tokens * width), z = p;
  Floats out = filled(examples * width, 0.0f);
  ig::multiply_sum_cuda(out.data(), p.data(), z.data(), nullptr, examples, tokens, width, DType::f32, place);
  const auto scale = normal<float>(examples * tokens);
  Floats magnitude = out, reach = out;
  ig::first_order_cuda(out.data(), magnitude.data(), reach.data(), p.data(), z.data(), scale.data(), nullptr, examples,
                       tokens, width, DType::f32, place);
  ig::node_sum_cuda(out.data(), p.data(), nullptr, 0, width, DType::f32, place);  // the bindings refuse it
  for (std::int64_t i = 0; i < width; ++i)
    if (out[static_cast<std::size_t>(i)] != 0) throw std::runtime_error("the sum of no nodes is not written");
}

void median() {
  const Numbers starts = borders({7, 8, 0, 1, 20}), order = filled<std::int64_t>(starts.back(), 1);
  const median::Shape shape{36, 40, starts.back(), 5};
  const auto features = normal<float>(shape.rows * shape.columns);
  Numbers rows = order;
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<std::int64_t>(i);
  Floats out = filled(shape.segments * shape.columns, 0.0f);
  emulation::policy.most_blocks = 2;  // several segments a block
  for (const auto& chosen : {rows, order})
    median::segment_medians_cuda(out.data(), features.data(), chosen.data(), starts.data(), shape,
                                 median::Transform::raw, DType::f32, place);
  rows.assign(rows.size(), -1);
  median::segment_medians_cuda(out.data(), features.data(), rows.data(), starts.data(), shape, median::Transform::raw,
                               DType::f32, place);
}

void proximity() {
  for (const std::size_t staged : {std::size_t{0}, std::size_t{1} << 20}) {
    emulation::policy.staged = staged;
    const proximity::Shape shape{3, 100, 1, 2, 1, 4};
    const auto scores = normal<float>(shape.rows * shape.units);
    std::vector<std::int32_t> ids = filled<std::int32_t>(shape.units, 0), bits = filled<std::int32_t>(8, 0x0f0f0f0f);
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int32_t>(i);
    const Numbers label{0};
    Floats hard = filled(6, 0.0f), soft = hard, grad = scores;
    proximity::scores_cuda(hard.data(), soft.data(), scores.data(), ids.data(), bits.data(), label.data(), shape, 10,
                           0.25, DType::f32, place);
    proximity::gradient_cuda(grad.data(), hard.data(), soft.data(), scores.data(), ids.data(), bits.data(), label.data(),
                             shape, 10, 0.25, DType::f32, place);
  }
}

void swarm() {
  const std::int64_t particles = 300, dimensions = 9;
  auto position = normal<float>(particles * dimensions), velocity = position, best = position;
  auto fitness = normal<float>(particles), best_fitness = normal<float>(particles);
  std::int64_t leader = 0;
  swarm::best_cuda(&leader, best.data(), best_fitness.data(), position.data(), fitness.data(), particles, dimensions,
                   place);
  swarm::step_cuda(position.data(), velocity.data(), best.data(), best.data(), particles, dimensions,
                   {0.5f, 1.5f, 1.5f, -1.0f, 1.0f, 0.5f, 7, 2}, place);
}

void sweep() {
  for (const std::int64_t outputs : {10, 5000}) {  // in one panel, and in two
    const sweep::Shape shape{20, outputs, 3};
    const auto logits = normal<float>(shape.samples * outputs), shifts = normal<float>(shape.samples * shape.edited);
    const Numbers rows{outputs - 1, 0, 4}, labels = filled<std::int64_t>(shape.samples, outputs / 2);
    Doubles out = filled(2 * shape.samples, 0.0);
    sweep::correct_interval_cuda(out.data(), logits.data(), shifts.data(), rows.data(), labels.data(), 0, 1, shape,
                                 DType::f32, DType::f32, place);
  }
}

const std::map<std::string, std::function<void()>> ops{
    {"association", association}, {"balance_batch", balance_batch}, {"balance_strata", balance_strata},
    {"balance_sweep", balance_sweep}, {"ig", ig}, {"median", median}, {"proximity", proximity}, {"swarm", swarm},
    {"sweep", sweep}};

}  // namespace
}  // namespace spurge

int main(int count, char** names) {
  std::vector<std::string> wanted(names + 1, names + count);
  for (const auto& [name, run] : spurge::ops) {
    bool taken = wanted.empty();
    for (const std::string& other : wanted) taken = taken || name.compare(0, other.size(), other) == 0;
    if (!taken) continue;
    try {
      run();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: %s\n", name.c_str(), error.what());
      return 1;
    }
  }
  return 0;
}
