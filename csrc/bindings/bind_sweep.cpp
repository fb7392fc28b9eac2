#include <cmath>

#include "bindings/module.hpp"
#include "bindings/tensor.hpp"
#include "spurge/sweep.hpp"

namespace spurge {
namespace {

DType single_or_double(const char* arg, const Tensor& t) {
  const DType dtype = dtype_of(arg, t);
  SPURGE_CHECK(dtype == DType::f32 || dtype == DType::f64, arg, ": dtype must be float32 or float64, got ",
               name(dtype));
  return dtype;
}

void correct_interval(Tensor out, Tensor logits, Tensor shifts, Tensor rows, Tensor labels, double low, double high,
                      int threads, Stream stream) {
  const DType logits_type = single_or_double("logits", logits), shifts_type = single_or_double("shifts", shifts);
  check_rank("logits", logits, 2, "[N, O]");
  check_rank("shifts", shifts, 2, "[N, E]");
  check_dtype("rows", rows, kDLInt, 64, "int64");
  check_dtype("labels", labels, kDLInt, 64, "int64");
  const sweep::Shape shape{logits.size(0), logits.size(1), shifts.size(1)};
  check_shape("shifts", shifts, {shape.samples, shape.edited});
  check_shape("rows", rows, {shape.edited});
  check_shape("labels", labels, {shape.samples});
  check_dtype("out", out, DType::f64);
  check_shape("out", out, {shape.samples, 2});
  check_finite("low", {low});
  check_finite("high", {high});
  SPURGE_CHECK(low <= high, "high: must be at least low, got ", high, " below ", low);

  const Place place = place_of(
      stream, {{"logits", logits}, {"shifts", shifts}, {"rows", rows}, {"labels", labels}, {"out", out}});

  py::gil_scoped_release nogil;  // every Python object was read above
  const auto* const edited = rows.as<const std::int64_t>();
  const auto* const label = labels.as<const std::int64_t>();
  if (place.cuda) {
#ifdef SPURGE_HAS_CUDA
    sweep::correct_interval_cuda(out.as<double>(), logits.data(), shifts.data(), edited, label, low, high, shape,
                                 logits_type, shifts_type, place.on);
#endif
  } else {
    sweep::correct_interval_cpu(out.as<double>(), logits.data(), shifts.data(), edited, label, low, high, shape,
                                logits_type, shifts_type, threads);
  }
}

}  // namespace

void bind_sweep(py::module_& m) {
  using namespace pybind11::literals;
  m.def("correct_interval", &correct_interval, "out"_a, "logits"_a, "shifts"_a, "rows"_a, "labels"_a, "low"_a,
        "high"_a, "threads"_a = 1, "stream"_a = py::none());
}

}  // namespace spurge
