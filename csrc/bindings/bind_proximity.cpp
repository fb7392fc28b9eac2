#include <cmath>

#include "bindings/module.hpp"
#include "bindings/tensor.hpp"
#include "spurge/proximity.hpp"

namespace spurge {
namespace {

// What both ops read.
struct Inputs {
  Tensor scores, ids, bitmap, labels;
  std::int64_t k;
  double sharpness;

  proximity::Shape checked() const {
    check_rank("scores", scores, 2, "[R, U]");
    check_rank("ids", ids, 2, "[B, U]");
    check_rank("bitmap", bitmap, 3, "[G, Y, words]");
    check_dtype("ids", ids, kDLInt, 32, "int32");
    check_dtype("bitmap", bitmap, kDLInt, 32, "int32");
    check_dtype("labels", labels, kDLInt, 64, "int64");
    const proximity::Shape s{scores.size(0), scores.size(1), ids.size(0),
                             bitmap.size(0), bitmap.size(1), bitmap.size(2)};
    check_shape("ids", ids, {s.examples, s.units});
    check_shape("labels", labels, {s.examples});
    SPURGE_CHECK(s.examples > 0 ? s.rows % s.examples == 0 : s.rows == 0, "scores: the rows must be a multiple of the ",
                 s.examples, " examples, got ", s.rows, " rows");
    SPURGE_CHECK(k >= 1, "k: must be at least 1, got ", k);
    SPURGE_CHECK(std::isfinite(sharpness) && sharpness > 0, "sharpness: must be positive and finite, got ", sharpness);
    return s;
  }
};

void proximity_scores(Tensor hard, Tensor soft, Tensor scores, Tensor ids, Tensor bitmap, Tensor labels, std::int64_t k,
                      double sharpness, int threads, Stream stream) {
  const DType dtype = dtype_of("scores", scores);
  const proximity::Shape s = Inputs{scores, ids, bitmap, labels, k, sharpness}.checked();
  for (const Named& a : {Named{"hard", hard}, Named{"soft", soft}}) {
    check_shape(a.name, a.tensor, {s.rows, s.sets});
    check_dtype(a.name, a.tensor, dtype);
  }
  const Place place = place_of(
      stream,
      {{"scores", scores}, {"ids", ids}, {"bitmap", bitmap}, {"labels", labels}, {"hard", hard}, {"soft", soft}});

  py::gil_scoped_release nogil;  // every Python object was read above
  const auto* const words = bitmap.as<const std::int32_t>();
  if (place.cuda) {
#ifdef SPURGE_HAS_CUDA
    proximity::scores_cuda(hard.data(), soft.data(), scores.data(), ids.as<const std::int32_t>(), words,
                           labels.as<const std::int64_t>(), s, k, sharpness, dtype, place.on);
#endif
  } else {
    proximity::scores_cpu(hard.data(), soft.data(), scores.data(), ids.as<const std::int32_t>(), words,
                          labels.as<const std::int64_t>(), s, k, sharpness, dtype, threads);
  }
}

void proximity_gradient(Tensor grad, Tensor by_hard, Tensor by_soft, Tensor scores, Tensor ids, Tensor bitmap,
                        Tensor labels, std::int64_t k, double sharpness, int threads, Stream stream) {
  const DType dtype = dtype_of("scores", scores);
  const proximity::Shape s = Inputs{scores, ids, bitmap, labels, k, sharpness}.checked();
  check_shape("grad", grad, {s.rows, s.units});
  check_shape("by_hard", by_hard, {s.rows, s.sets});
  check_shape("by_soft", by_soft, {s.rows, s.sets});
  for (const Named& a : {Named{"grad", grad}, Named{"by_hard", by_hard}, Named{"by_soft", by_soft}})
    check_dtype(a.name, a.tensor, dtype);
  const Place place = place_of(stream, {{"scores", scores},
                                        {"ids", ids},
                                        {"bitmap", bitmap},
                                        {"labels", labels},
                                        {"grad", grad},
                                        {"by_hard", by_hard},
                                        {"by_soft", by_soft}});

  py::gil_scoped_release nogil;  // every Python object was read above
  const auto* const words = bitmap.as<const std::int32_t>();
  if (place.cuda) {
#ifdef SPURGE_HAS_CUDA
    proximity::gradient_cuda(grad.data(), by_hard.data(), by_soft.data(), scores.data(), ids.as<const std::int32_t>(),
                             words, labels.as<const std::int64_t>(), s, k, sharpness, dtype, place.on);
#endif
  } else {
    proximity::gradient_cpu(grad.data(), by_hard.data(), by_soft.data(), scores.data(), ids.as<const std::int32_t>(),
                            words, labels.as<const std::int64_t>(), s, k, sharpness, dtype, threads);
  }
}

}  // namespace

void bind_proximity(py::module_& m) {
  using namespace pybind11::literals;
  m.def("proximity", &proximity_scores, "hard"_a, "soft"_a, "scores"_a, "ids"_a, "bitmap"_a, "labels"_a, "k"_a,
        "sharpness"_a, "threads"_a = 1, "stream"_a = py::none());
  m.def("proximity_gradient", &proximity_gradient, "grad"_a, "by_hard"_a, "by_soft"_a, "scores"_a, "ids"_a, "bitmap"_a,
        "labels"_a, "k"_a, "sharpness"_a, "threads"_a = 1, "stream"_a = py::none());
}

}  // namespace spurge
