#include <cmath>

#include "bindings/module.hpp"
#include "bindings/tensor.hpp"
#include "spurge/swarm.hpp"

namespace spurge {
namespace {

void swarm_step(Tensor position, Tensor velocity, Tensor best, Tensor leader, double inertia, double cognitive,
                double social, double low, double high, double max_velocity, std::int64_t seed, std::int64_t iteration,
                int threads, Stream stream) {
  check_rank("position", position, 2, "[P, D]");
  const std::int64_t particles = position.size(0), dimensions = position.size(1);
  check_shape("velocity", velocity, {particles, dimensions});
  check_shape("best", best, {particles, dimensions});
  check_shape("leader", leader, {dimensions});
  for (const Named& a : {Named{"position", position}, Named{"velocity", velocity}, Named{"best", best},
                         Named{"leader", leader}})
    check_dtype(a.name, a.tensor, DType::f32);
  for (const auto& [name, value] : {std::pair{"inertia", inertia}, {"cognitive", cognitive}, {"social", social},
                                    {"low", low}, {"high", high}})
    SPURGE_CHECK(std::isfinite(value), name, ": must be finite, got ", value);
  SPURGE_CHECK(low < high, "low: must be below high = ", high, ", got ", low);
  SPURGE_CHECK(max_velocity > 0, "max_velocity: must be positive, got ", max_velocity);
  SPURGE_CHECK(seed >= 0, "seed: must lie in [0, 2^63), got ", seed);
  SPURGE_CHECK(iteration >= 0 && iteration <= 0xFFFFFFFF, "iteration: must lie in [0, 2^32), got ", iteration);
  swarm::Step step{};
  step.inertia = static_cast<float>(inertia);
  step.cognitive = static_cast<float>(cognitive);
  step.social = static_cast<float>(social);
  step.low = static_cast<float>(low);
  step.high = static_cast<float>(high);
  step.max_velocity = static_cast<float>(max_velocity);
  step.seed = static_cast<std::uint64_t>(seed);
  step.iteration = static_cast<std::uint32_t>(iteration);

  const Place place =
      place_of(stream, {{"position", position}, {"velocity", velocity}, {"best", best}, {"leader", leader}});

  py::gil_scoped_release nogil;  // every Python object was read above
  auto* const x = position.as<float>();
  auto* const v = velocity.as<float>();
  if (place.cuda) {
#ifdef SPURGE_HAS_CUDA
    swarm::step_cuda(x, v, best.as<const float>(), leader.as<const float>(), particles, dimensions, step, place.on);
#endif
  } else {
    swarm::step_cpu(x, v, best.as<const float>(), leader.as<const float>(), particles, dimensions, step, threads);
  }
}

void swarm_best(Tensor leader, Tensor best, Tensor best_fitness, Tensor position, Tensor fitness, int threads,
                Stream stream) {
  check_rank("best", best, 2, "[P, D]");
  const std::int64_t particles = best.size(0), dimensions = best.size(1);
  SPURGE_CHECK(particles >= 1, "best: need at least 1 particle, got 0");
  check_rank("leader", leader, 0, "[]");
  check_dtype("leader", leader, kDLInt, 64, "int64");
  check_shape("best_fitness", best_fitness, {particles});
  check_shape("position", position, {particles, dimensions});
  check_shape("fitness", fitness, {particles});
  for (const Named& a : {Named{"best", best}, Named{"best_fitness", best_fitness}, Named{"position", position},
                         Named{"fitness", fitness}})
    check_dtype(a.name, a.tensor, DType::f32);

  const Place place = place_of(stream, {{"best", best},
                                        {"best_fitness", best_fitness},
                                        {"position", position},
                                        {"fitness", fitness},
                                        {"leader", leader}});

  py::gil_scoped_release nogil;  // every Python object was read above
  auto* const index = leader.as<std::int64_t>();
  if (place.cuda) {
#ifdef SPURGE_HAS_CUDA
    swarm::best_cuda(index, best.as<float>(), best_fitness.as<float>(), position.as<const float>(),
                     fitness.as<const float>(), particles, dimensions, place.on);
#endif
  } else {
    swarm::best_cpu(index, best.as<float>(), best_fitness.as<float>(), position.as<const float>(),
                    fitness.as<const float>(), particles, dimensions, threads);
  }
}

}  // namespace

void bind_swarm(py::module_& m) {
  using namespace pybind11::literals;
  m.def("swarm_step", &swarm_step, "position"_a, "velocity"_a, "best"_a, "leader"_a, "inertia"_a, "cognitive"_a,
        "social"_a, "low"_a, "high"_a, "max_velocity"_a, "seed"_a, "iteration"_a, "threads"_a = 1,
        "stream"_a = py::none());
  m.def("swarm_best", &swarm_best, "leader"_a, "best"_a, "best_fitness"_a, "position"_a, "fitness"_a, "threads"_a = 1,
        "stream"_a = py::none());
}

}  // namespace spurge
