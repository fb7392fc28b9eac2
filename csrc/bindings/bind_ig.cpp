#include "bindings/module.hpp"
#include "bindings/tensor.hpp"
#include "spurge/ig.hpp"

namespace spurge {
namespace {

DType sum_dtype(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

void node_sum(Tensor out, Tensor grads, std::vector<double> weights, int threads, Stream stream) {
  const DType dtype = dtype_of("grads", grads);
  const auto nodes = static_cast<std::int64_t>(weights.size());
  check_dtype("out", out, sum_dtype(dtype));
  check_finite("weights", weights);
  SPURGE_CHECK(nodes >= 1, "weights: need at least 1, got 0");
  SPURGE_CHECK(grads.rank() >= 1 && grads.size(0) % nodes == 0,
               "grads: its first dimension must be a multiple of the ", nodes, " weights, got shape ", shape_of(grads));
  SPURGE_CHECK(grads.size() == nodes * out.size(), "out: must hold one node of grads ", shape_of(grads), ", got ",
               shape_of(out));

  const Place place = place_of(stream, {{"grads", grads}, {"out", out}});

  py::gil_scoped_release nogil;  // every Python object was read above
  if (place.cuda) {
#ifdef SPURGE_HAS_CUDA
    ig::node_sum_cuda(out.data(), grads.data(), weights.data(), nodes, out.size(), dtype, place.on);
#endif
  } else {
    ig::node_sum_cpu(out.data(), grads.data(), weights.data(), nodes, out.size(), dtype, threads);
  }
}

void multiply_sum(Tensor out, Tensor p, Tensor z, std::optional<Tensor> mask, int threads, Stream stream) {
  const DType dtype = dtype_of("p", p);
  check_rank("p", p, 3, "[B, T, F]");
  check_same_shape("p", p, "z", z);
  check_same_dtype("p", p, "z", z);
  const std::int64_t examples = p.size(0), tokens = p.size(1), width = p.size(2);
  check_dtype("out", out, sum_dtype(dtype));
  check_shape("out", out, {examples, width});
  if (mask) {
    check_dtype("mask", *mask, kDLUInt, 8, "uint8");
    check_shape("mask", *mask, {examples, tokens});
  }

  const Place place = place_of(stream, {{"p", p}, {"z", z}, {"out", out}, {"mask", mask ? *mask : p}});

  const auto* const kept = mask ? mask->as<const std::uint8_t>() : nullptr;
  py::gil_scoped_release nogil;  // every Python object was read above
  if (place.cuda) {
#ifdef SPURGE_HAS_CUDA
    ig::multiply_sum_cuda(out.data(), p.data(), z.data(), kept, examples, tokens, width, dtype, place.on);
#endif
  } else {
    ig::multiply_sum_cpu(out.data(), p.data(), z.data(), kept, examples, tokens, width, dtype, threads);
  }
}

}  // namespace

void bind_ig(py::module_& m) {
  using namespace pybind11::literals;
  m.def("node_sum", &node_sum, "out"_a, "grads"_a, "weights"_a, "threads"_a = 1, "stream"_a = py::none());
  m.def("multiply_sum", &multiply_sum, "out"_a, "p"_a, "z"_a, "mask"_a, "threads"_a = 1,
        "stream"_a = py::none());
}

}  // namespace spurge
