// A small job without Python:  small_job FOLDER [cpu|cuda]
//
// 1. Integrated gradients of neurons from activations and gradients that were saved block by block, block_0/..., and
//    summed over all examples.
// 2. Gates for the strongest neurons by a particle swarm with an objective of one's own: halve what they add, and stay
//    near 1.
// 3. The accuracy of a linear layer at every rate of an edit, from its logits and what rate 1 adds to them.
//
// small_job.py makes such a folder, and does the same in Python.
#include <spurge/ig.hpp>
#include <spurge/swarm.hpp>
#include <spurge/sweep.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <limits>
#include <numeric>

#include "arrays.hpp"

namespace {

using spurge::DType;
using Doubles = std::vector<double>;
using Floats = std::vector<float>;

constexpr int kThreads = 2;

struct Device {
  bool gpu = false;
  spurge::CudaPlace place;  // device 0, the default stream
};

// A kernel where the device is.
#ifdef SPURGE_HAS_CUDA
constexpr bool kHasCuda = true;
#define RUN(device, kernel, ...) \
  ((device).gpu ? spurge::kernel##_cuda(__VA_ARGS__, (device).place) : spurge::kernel##_cpu(__VA_ARGS__, kThreads))
#else
constexpr bool kHasCuda = false;
#define RUN(device, kernel, ...) spurge::kernel##_cpu(__VA_ARGS__, kThreads)
#endif

template <class T>
std::int64_t length(const Array<T>& array) {
  return static_cast<std::int64_t>(array.values.size());
}

// ---- 1: attributions -------------------------------------------------------------------------------------------------

// Of the neurons in one block: the mean gradient over the path, times the activation, over the tokens that count.
void add_block(Doubles& total, const std::string& folder, const Doubles& weights, const Device& device) {
  const auto gradients = read_npy<float>(folder + "/gradients.npy");      // [nodes, examples, tokens, neurons]
  const auto activations = read_npy<float>(folder + "/activations.npy");  // [examples, tokens, neurons]
  const auto mask = read_npy<std::uint8_t>(folder + "/mask.npy");         // [examples, tokens]
  const std::int64_t examples = activations.shape.at(0), tokens = activations.shape.at(1);
  const std::int64_t neurons = activations.shape.at(2), nodes = static_cast<std::int64_t>(weights.size());
  const std::int64_t size = examples * tokens * neurons;
  if (length(gradients) != nodes * size || length(mask) != examples * tokens)
    throw std::runtime_error(folder + ": gradients, activations and mask do not fit");

  Buffer<float> g(gradients.values, device.gpu), z(activations.values, device.gpu), mean(size, device.gpu);
  Buffer<std::uint8_t> kept(mask.values, device.gpu);
  Buffer<float> found(examples * neurons, device.gpu);
  RUN(device, ig::node_sum, mean.data(), g.data(), weights.data(), nodes, size, DType::f32);
  RUN(device, ig::multiply_sum, found.data(), mean.data(), z.data(), kept.data(), examples, tokens, neurons,
      DType::f32);

  total.resize(static_cast<std::size_t>(neurons));
  const Floats each = found.read();
  for (std::size_t i = 0; i < each.size(); ++i) total[i % total.size()] += each[i];
}

Doubles attributions(const std::string& folder, const Device& device) {
  const Doubles weights{5.0 / 18, 8.0 / 18, 5.0 / 18};  // three Gauss-Legendre nodes on [0, 1]
  Doubles total;
  for (int b = 0; std::filesystem::exists(folder + "/block_" + std::to_string(b)); ++b)
    add_block(total, folder + "/block_" + std::to_string(b), weights, device);
  if (total.empty()) throw std::runtime_error(folder + ": no block_0");
  return total;
}

std::vector<std::size_t> strongest(const Doubles& total, std::size_t most) {
  std::vector<std::size_t> order(total.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return std::abs(total[a]) > std::abs(total[b]); });
  order.resize(std::min(most, order.size()));
  return order;
}

// ---- 2: gates --------------------------------------------------------------------------------------------------------

// Halve what the neurons add, and stay near 1.
double objective(const float* gates, const Doubles& adds) {
  double left = 0, all = 0, moved = 0;
  for (std::size_t j = 0; j < adds.size(); ++j) {
    left += gates[j] * adds[j];
    all += adds[j];
    moved += (1.0 - gates[j]) * (1.0 - gates[j]);
  }
  return -(left - 0.5 * all) * (left - 0.5 * all) - 0.01 * moved;
}

struct Found {
  Floats gates;
  float fitness;
};

Found search(const Doubles& adds, const Device& device) {
  constexpr std::int64_t particles = 24;
  constexpr std::uint32_t iterations = 40;
  const auto dimensions = static_cast<std::int64_t>(adds.size());
  spurge::swarm::Step step{0.7298f, 1.49618f, 1.49618f, 0.0f, 1.0f, 0.25f, 7, 0};
  const auto filled = [&](float x) { return Floats(static_cast<std::size_t>(particles * dimensions), x); };

  Buffer<float> position(filled(1), device.gpu), velocity(filled(0), device.gpu), best(filled(1), device.gpu);
  Buffer<float> best_fitness(Floats(particles, -std::numeric_limits<float>::infinity()), device.gpu);
  Buffer<float> fitness(particles, device.gpu);
  Buffer<std::int64_t> leader(1, device.gpu);
  Floats values(particles), places = filled(1);
  Buffer<float> nothing(Floats(adds.size(), 0.0f), device.gpu);  // all begin at 1, and first step this way
  for (std::uint32_t i = 0; i <= iterations; ++i) {
    for (std::int64_t p = 0; p < particles; ++p)
      values[static_cast<std::size_t>(p)] = static_cast<float>(objective(places.data() + p * dimensions, adds));
    fitness.write(values);
    RUN(device, swarm::best, leader.data(), best.data(), best_fitness.data(), position.data(), fitness.data(),
               particles, dimensions);
    if (i == iterations) break;
    step.iteration = i;
    const float* towards = i == 0 ? nothing.data() : best.data() + leader.read()[0] * dimensions;
    RUN(device, swarm::step, position.data(), velocity.data(), best.data(), towards, particles, dimensions, step);
    places = position.read();
  }
  const std::int64_t first = leader.read()[0];
  const Floats all = best.read();
  return {Floats(all.begin() + first * dimensions, all.begin() + (first + 1) * dimensions),
          best_fitness.read()[static_cast<std::size_t>(first)]};
}

// ---- 3: rates --------------------------------------------------------------------------------------------------------

// Right predictions at each of `rates`.
std::vector<int> right(const std::string& folder, const Doubles& rates, const Device& device) {
  const auto logits = read_npy<float>(folder + "/logits.npy");          // [samples, outputs]
  const auto shifts = read_npy<float>(folder + "/shifts.npy");          // [samples, edited]
  const auto rows = read_npy<std::int64_t>(folder + "/rows.npy");       // [edited]
  const auto labels = read_npy<std::int64_t>(folder + "/labels.npy");   // [samples]
  const spurge::sweep::Shape shape{logits.shape.at(0), logits.shape.at(1), shifts.shape.at(1)};
  if (shifts.shape[0] != shape.samples || rows.shape.at(0) != shape.edited || labels.shape.at(0) != shape.samples)
    throw std::runtime_error(folder + ": logits, shifts, rows and labels do not fit");

  Buffer<float> z(logits.values, device.gpu), s(shifts.values, device.gpu);
  Buffer<std::int64_t> edited(rows.values, device.gpu), wanted(labels.values, device.gpu);
  Buffer<double> intervals(2 * shape.samples, device.gpu);
  RUN(device, sweep::correct_interval, intervals.data(), z.data(), s.data(), edited.data(), wanted.data(),
             rates.front(), rates.back(), shape, DType::f32, DType::f32);

  const Doubles found = intervals.read();
  std::vector<int> counts(rates.size());
  for (std::size_t n = 0; n < found.size(); n += 2)
    for (std::size_t r = 0; r < rates.size(); ++r) counts[r] += found[n] <= rates[r] && rates[r] <= found[n + 1];
  return counts;
}

void run(const std::string& folder, const Device& device) {
  const Doubles total = attributions(folder, device);
  const auto chosen = strongest(total, 16);
  Doubles adds;
  for (std::size_t neuron : chosen) adds.push_back(total[neuron]);
  const Found found = search(adds, device);
  for (std::size_t j = 0; j < chosen.size(); ++j)
    std::printf("neuron %zu attribution %.9g gate %.9g\n", chosen[j], total[chosen[j]], found.gates[j]);
  std::printf("fitness %.9g\n", found.fitness);

  Doubles rates;
  for (int i = 0; i <= 20; ++i) rates.push_back(i / 10.0);
  const std::vector<int> counts = right(folder, rates, device);
  for (std::size_t r = 0; r < rates.size(); ++r) std::printf("rate %.1f right %d\n", rates[r], counts[r]);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string where = argc == 3 ? argv[2] : "cpu";
  if ((argc != 2 && argc != 3) || (where != "cpu" && where != "cuda")) {
    std::fprintf(stderr, "usage: small_job FOLDER [cpu|cuda]\n");
    return 2;
  }
  try {
    if (where == "cuda" && !kHasCuda) throw std::runtime_error("this spurge was built without CUDA kernels");
    Device device;
    device.gpu = where == "cuda";
    run(argv[1], device);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "small_job: %s\n", error.what());
    return 1;
  }
}
