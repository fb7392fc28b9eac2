#include "bindings/module.hpp"
#include "bindings/tensor.hpp"
#include "spurge/gate.hpp"

namespace spurge {
namespace {

void open_rows(Tensor out, Tensor x, Tensor u, std::vector<double> alphas, int threads, Stream stream) {
  const DType dtype = dtype_of("x", x);
  const auto nodes = static_cast<std::int64_t>(alphas.size());
  check_same_shape("x", x, "u", u);
  check_same_dtype("x", x, "u", u);
  check_same_dtype("x", x, "out", out);
  check_finite("alphas", alphas);
  SPURGE_CHECK(x.rank() >= 1, "x: must have at least 1 dimension [B, ...], got a scalar");
  SPURGE_CHECK(out.size() == nodes * x.size(), "out: must hold ", nodes, " copies of x, got ", shape_of(out));

  const Place place = place_of(stream, {{"x", x}, {"u", u}, {"out", out}});

  py::gil_scoped_release nogil;  // every Python object was read above
  if (place.cuda) {
#ifdef SPURGE_HAS_CUDA
    gate::open_rows_cuda(out.data(), x.data(), u.data(), alphas.data(), nodes, x.size(), dtype, place.on);
#endif
  } else {
    gate::open_rows_cpu(out.data(), x.data(), u.data(), alphas.data(), nodes, x.size(), dtype, threads);
  }
}

void gate_columns(Tensor z, Tensor columns, Tensor gates, int threads, Stream stream) {
  const DType dtype = dtype_of("z", z);
  check_rank("z", z, 3, "[R, T, F]");
  check_rank("columns", columns, 1, "[n]");
  check_rank("gates", gates, 2, "[P, n]");
  check_dtype("columns", columns, kDLInt, 64, "int64");
  check_dtype("gates", gates, DType::f32);
  const std::int64_t particles = gates.size(0), n = columns.size(0), width = z.size(2);
  check_shape("gates", gates, {particles, n});
  SPURGE_CHECK(particles > 0 && z.size(0) % particles == 0, "gates: the ", z.size(0),
               " rows of z must be a multiple of its P = ", particles, " particles");
  const std::int64_t rows = z.size(0) / particles * z.size(1);

  const Place place = place_of(stream, {{"z", z}, {"columns", columns}, {"gates", gates}});

  py::gil_scoped_release nogil;  // every Python object was read above
  if (place.cuda) {
#ifdef SPURGE_HAS_CUDA
    gate::gate_columns_cuda(z.data(), columns.as<const std::int64_t>(), gates.as<const float>(), particles, rows,
                            width, n, dtype, place.on);
#endif
  } else {
    gate::gate_columns_cpu(z.data(), columns.as<const std::int64_t>(), gates.as<const float>(), particles, rows,
                           width, n, dtype, threads);
  }
}

}  // namespace

void bind_gate(py::module_& m) {
  using namespace pybind11::literals;
  m.def("open_rows", &open_rows, "out"_a, "x"_a, "u"_a, "alphas"_a, "threads"_a = 1, "stream"_a = py::none());
  m.def("gate_columns", &gate_columns, "z"_a, "columns"_a, "gates"_a, "threads"_a = 1, "stream"_a = py::none());
}

}  // namespace spurge
