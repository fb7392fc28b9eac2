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

// p and z [examples, tokens, width] alike, mask [examples, tokens] of bytes.
DType check_products(const Tensor& p, const Tensor& z, const std::optional<Tensor>& mask) {
  const DType dtype = dtype_of("p", p);
  check_rank("p", p, 3, "[B, T, F]");
  check_same_shape("p", p, "z", z);
  check_same_dtype("p", p, "z", z);
  if (mask) {
    check_dtype("mask", *mask, kDLUInt, 8, "uint8");
    check_shape("mask", *mask, {p.size(0), p.size(1)});
  }
  return dtype;
}

void check_sums(const char* arg, const Tensor& out, const Tensor& p, DType dtype) {
  check_dtype(arg, out, sum_dtype(dtype));
  check_shape(arg, out, {p.size(0), p.size(2)});
}

const std::uint8_t* bytes_of(const std::optional<Tensor>& mask) {
  return mask ? mask->as<const std::uint8_t>() : nullptr;
}

void multiply_sum(Tensor out, Tensor p, Tensor z, std::optional<Tensor> mask, int threads, Stream stream) {
  const DType dtype = check_products(p, z, mask);
  check_sums("out", out, p, dtype);

  const Place place = place_of(stream, {{"p", p}, {"z", z}, {"out", out}, {"mask", mask ? *mask : p}});

  const std::int64_t examples = p.size(0), tokens = p.size(1), width = p.size(2);
  py::gil_scoped_release nogil;  // every Python object was read above
  if (place.cuda) {
#ifdef SPURGE_HAS_CUDA
    ig::multiply_sum_cuda(out.data(), p.data(), z.data(), bytes_of(mask), examples, tokens, width, dtype, place.on);
#endif
  } else {
    ig::multiply_sum_cpu(out.data(), p.data(), z.data(), bytes_of(mask), examples, tokens, width, dtype, threads);
  }
}

void first_order(Tensor total, Tensor magnitude, Tensor reach, Tensor p, Tensor z, Tensor scale,
                 std::optional<Tensor> mask, int threads, Stream stream) {
  const DType dtype = check_products(p, z, mask);
  check_dtype("scale", scale, sum_dtype(dtype));
  check_shape("scale", scale, {p.size(0), p.size(1)});
  check_sums("total", total, p, dtype);
  check_sums("magnitude", magnitude, p, dtype);
  check_sums("reach", reach, p, dtype);

  const Place place = place_of(stream, {{"p", p},
                                        {"z", z},
                                        {"scale", scale},
                                        {"mask", mask ? *mask : p},
                                        {"total", total},
                                        {"magnitude", magnitude},
                                        {"reach", reach}});

  const std::int64_t examples = p.size(0), tokens = p.size(1), width = p.size(2);
  py::gil_scoped_release nogil;  // every Python object was read above
  if (place.cuda) {
#ifdef SPURGE_HAS_CUDA
    ig::first_order_cuda(total.data(), magnitude.data(), reach.data(), p.data(), z.data(), scale.data(),
                         bytes_of(mask), examples, tokens, width, dtype, place.on);
#endif
  } else {
    ig::first_order_cpu(total.data(), magnitude.data(), reach.data(), p.data(), z.data(), scale.data(),
                        bytes_of(mask), examples, tokens, width, dtype, threads);
  }
}

}  // namespace

void bind_ig(py::module_& m) {
  using namespace pybind11::literals;
  m.def("node_sum", &node_sum, "out"_a, "grads"_a, "weights"_a, "threads"_a = 1, "stream"_a = py::none());
  m.def("multiply_sum", &multiply_sum, "out"_a, "p"_a, "z"_a, "mask"_a, "threads"_a = 1,
        "stream"_a = py::none());
  m.def("first_order", &first_order, "total"_a, "magnitude"_a, "reach"_a, "p"_a, "z"_a, "scale"_a, "mask"_a,
        "threads"_a = 1, "stream"_a = py::none());
}

}  // namespace spurge
