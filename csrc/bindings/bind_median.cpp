#include "bindings/module.hpp"
#include "bindings/tensor.hpp"
#include "spurge/median.hpp"

namespace spurge {
namespace {

median::Transform transform_of(const std::string& name) {
  using median::Transform;
  if (name == "raw") return Transform::raw;
  if (name == "magnitude") return Transform::magnitude;
  if (name == "positive") return Transform::positive;
  SPURGE_CHECK(name == "negative", "transform: must be raw, magnitude, positive or negative, got ", name);
  return Transform::negative;
}

void segment_medians(Tensor out, Tensor features, Tensor order, Tensor starts, const std::string& transform,
                     int threads, Stream stream) {
  const DType dtype = dtype_of("features", features);
  check_rank("features", features, 2, "[N, M]");
  check_rank("order", order, 1, "[n]");
  check_rank("starts", starts, 1, "[S + 1]");
  check_dtype("order", order, kDLInt, 64, "int64");
  check_dtype("starts", starts, kDLInt, 64, "int64");
  SPURGE_CHECK(starts.size(0) >= 1, "starts: must have at least 1 element, got 0");
  const median::Shape shape{features.size(0), features.size(1), order.size(0), starts.size(0) - 1};
  check_dtype("out", out, dtype == DType::f64 ? DType::f64 : DType::f32);
  check_shape("out", out, {shape.segments, shape.columns});
  const median::Transform taken = transform_of(transform);

  const Place place = place_of(stream, {{"features", features}, {"order", order}, {"starts", starts}, {"out", out}});

  py::gil_scoped_release nogil;  // every Python object was read above
  const auto* const rows = order.as<const std::int64_t>();
  const auto* const borders = starts.as<const std::int64_t>();
  if (place.cuda) {
#ifdef SPURGE_HAS_CUDA
    median::segment_medians_cuda(out.data(), features.data(), rows, borders, shape, taken, dtype, place.on);
#endif
  } else {
    median::segment_medians_cpu(out.data(), features.data(), rows, borders, shape, taken, dtype, threads);
  }
}

}  // namespace

void bind_median(py::module_& m) {
  using namespace pybind11::literals;
  m.def("segment_medians", &segment_medians, "out"_a, "features"_a, "order"_a, "starts"_a, "transform"_a,
        "threads"_a = 1, "stream"_a = py::none());
}

}  // namespace spurge
