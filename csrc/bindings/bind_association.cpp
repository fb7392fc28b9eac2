#include "bindings/module.hpp"
#include "bindings/tensor.hpp"
#include "spurge/association.hpp"

namespace spurge {
namespace {

// On a GPU nobody can look without waiting: there the kernel answers with NaN.
void check_segments(const Tensor& starts, const Tensor& classes, std::int64_t samples, std::int64_t labels) {
  const auto* const s = starts.as<const std::int64_t>();
  const auto* const c = classes.as<const std::int64_t>();
  const std::int64_t segments = classes.size(0);
  SPURGE_CHECK(s[0] == 0, "starts: must begin with 0, got ", s[0]);
  SPURGE_CHECK(s[segments] == samples, "starts: must end with the ", samples, " samples, got ", s[segments]);
  std::vector<bool> seen(static_cast<std::size_t>(labels));
  for (std::int64_t i = 0; i < segments; ++i) {
    SPURGE_CHECK(s[i] <= s[i + 1], "starts: must ascend, got ", s[i], " and then ", s[i + 1], " at ", i + 1);
    SPURGE_CHECK(c[i] >= 0 && c[i] < labels, "classes: expected values in [0, ", labels, "), got ", c[i], " at ", i);
    SPURGE_CHECK(!seen[static_cast<std::size_t>(c[i])], "classes: must be distinct, got ", c[i], " again at ", i);
    seen[static_cast<std::size_t>(c[i])] = true;
  }
}

void associate(Tensor sums, Tensor logs, Tensor carry, Tensor picked, Tensor activations, Tensor features,
               Tensor gradients, Tensor starts, Tensor classes, Tensor scales, std::int64_t target, bool relu,
               bool resumed, bool unfinished, std::optional<Tensor> workspace, int threads, Stream stream) {
  const DType dtype = dtype_of("features", features);
  check_rank("features", features, 2, "[N, M]");
  check_rank("gradients", gradients, 2, "[N, O]");
  const std::int64_t samples = features.size(0), width = features.size(1), outputs = gradients.size(1);
  check_shape("gradients", gradients, {samples, outputs});
  check_dtype("gradients", gradients, dtype == DType::f64 ? DType::f64 : DType::f32);
  check_rank("classes", classes, 1, "[S]");
  const std::int64_t segments = classes.size(0);
  check_shape("starts", starts, {segments + 1});
  check_shape("scales", scales, {segments});
  check_dtype("starts", starts, kDLInt, 64, "int64");
  check_dtype("classes", classes, kDLInt, 64, "int64");
  check_rank("activations", activations, 2, "[C, M]");
  const std::int64_t labels = activations.size(0);
  check_shape("activations", activations, {labels, width});
  for (const Named& a : {Named{"sums", sums}, Named{"logs", logs}, Named{"picked", picked}})
    check_shape(a.name, a.tensor, {outputs, width});
  const bool carries = resumed || unfinished;
  if (carries || carry.size() != 0) check_shape("carry", carry, {outputs, width});
  for (const Named& a : {Named{"sums", sums}, Named{"logs", logs}, Named{"carry", carry},
                         Named{"activations", activations}, Named{"scales", scales}})
    check_dtype(a.name, a.tensor, DType::f64);
  check_dtype("picked", picked, DType::f32);
  SPURGE_CHECK(target >= -1 && target < labels, "target: expected -1 or a class below ", labels, ", got ", target);
  SPURGE_CHECK(segments > 0 || samples == 0, "starts: must end with the ", samples, " samples, got no segment");
  SPURGE_CHECK(!carries || segments > 0, "classes: need at least 1 where a segment is resumed or unfinished, got 0");

  const Place place = place_of(stream, {{"features", features}, {"sums", sums}, {"logs", logs}, {"carry", carry},
                                        {"picked", picked}, {"activations", activations}, {"gradients", gradients},
                                        {"starts", starts}, {"classes", classes}, {"scales", scales},
                                        {"workspace", workspace ? *workspace : scales}});
  if (!place.cuda) check_segments(starts, classes, samples, labels);
  const std::int64_t room = place.cuda ? association::associate_workspace(samples, width, outputs) : 0;
  SPURGE_CHECK(workspace || room == 0, "workspace: needs ", room, " numbers, got none");
  if (workspace) check_workspace(*workspace, room);

  association::Block block{};
  block.sums = sums.as<double>();
  block.logs = logs.as<double>();
  block.carry = carries ? carry.as<double>() : nullptr;
  block.picked = picked.as<float>();
  block.activations = activations.as<double>();
  block.features = features.data();
  block.gradients = gradients.data();
  block.starts = starts.as<const std::int64_t>();
  block.classes = classes.as<const std::int64_t>();
  block.scales = scales.as<const double>();
  block.samples = samples;
  block.width = width;
  block.outputs = outputs;
  block.segments = segments;
  block.labels = labels;
  block.target = target;
  block.relu = relu;
  block.resumed = resumed;
  block.unfinished = unfinished;
  block.dtype = dtype;
  block.workspace = room ? workspace->as<double>() : nullptr;

  py::gil_scoped_release nogil;  // every Python object was read above
  if (place.cuda) {
#ifdef SPURGE_HAS_CUDA
    association::associate_cuda(block, place.on);
#endif
  } else {
    association::associate_cpu(block, threads);
  }
}

}  // namespace

void bind_association(py::module_& m) {
  using namespace pybind11::literals;
  m.def("associate", &associate, "sums"_a, "logs"_a, "carry"_a, "picked"_a, "activations"_a, "features"_a,
        "gradients"_a, "starts"_a, "classes"_a, "scales"_a, "target"_a = -1, "relu"_a = false, "resumed"_a = false,
        "unfinished"_a = false, "workspace"_a = py::none(), "threads"_a = 1, "stream"_a = py::none());
  m.def("associate_workspace", &association::associate_workspace, "samples"_a, "width"_a, "outputs"_a);
}

}  // namespace spurge
