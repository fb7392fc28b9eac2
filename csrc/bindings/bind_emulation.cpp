// How the emulated kernels of _core_emulated run: tests change it, and no result may change with it.
#include "emulation/cuda_runtime.h"

#include <string>

#include "bindings/module.hpp"
#include "core/check.hpp"

namespace spurge {
namespace {

void set_policy(const std::string& order, std::uint64_t seed, int poison, std::int64_t most_blocks,
                std::int64_t staged) {
  using emulation::Order;
  SPURGE_CHECK(order == "forward" || order == "backward" || order == "shuffled",
               "order: must be forward, backward or shuffled, got ", order);
  emulation::policy = {order == "forward" ? Order::forward : order == "backward" ? Order::backward : Order::shuffled,
                       seed, static_cast<unsigned char>(poison), most_blocks, static_cast<std::size_t>(staged)};
}

// As if another library had left an error behind.
void leave_error() { emulation::last_error = cudaErrorInvalidValue; }

}  // namespace

void bind_emulation(py::module_& m) {
  using namespace pybind11::literals;
  m.def("set_policy", &set_policy, "order"_a, "seed"_a, "poison"_a, "most_blocks"_a, "staged"_a);
  m.def("leave_error", &leave_error);
}

}  // namespace spurge
