#include "bindings/module.hpp"
#include "bindings/tensor.hpp"
#include "spurge/balance.hpp"

namespace spurge {
namespace {

void check_doubles(const char* arg, const Tensor& t, const std::vector<std::int64_t>& shape) {
  check_dtype(arg, t, DType::f64);
  check_shape(arg, t, shape);
}

balance::Newton newton_of(double tolerance, std::int64_t steps) {
  check_finite("tolerance", {tolerance});
  SPURGE_CHECK(tolerance > 0, "tolerance: must be positive, got ", tolerance);
  SPURGE_CHECK(steps >= 0 && steps < std::int64_t{1} << 31, "steps: must lie in [0, 2^31), got ", steps);
  return {tolerance, static_cast<std::int32_t>(steps)};
}

void balance_sweep(Tensor scores, Tensor mean, Tensor value, Tensor workspace, Tensor covariates, Tensor base,
                   Tensor dual, int threads, Stream stream) {
  const DType dtype = dtype_of("covariates", covariates);
  check_rank("covariates", covariates, 2, "[N, K]");
  const balance::SweepShape shape{covariates.size(0), covariates.size(1)};
  check_doubles("base", base, {shape.rows});
  check_doubles("dual", dual, {shape.columns});
  check_doubles("scores", scores, {shape.rows});
  check_doubles("mean", mean, {shape.columns});
  check_doubles("value", value, {2});

  const Place place = place_of(stream, {{"covariates", covariates},
                                        {"base", base},
                                        {"dual", dual},
                                        {"scores", scores},
                                        {"mean", mean},
                                        {"value", value},
                                        {"workspace", workspace}});
  check_workspace(workspace, place.cuda ? balance::sweep_workspace(shape) : 0);

  py::gil_scoped_release nogil;  // every Python object was read above
  if (place.cuda) {
#ifdef SPURGE_HAS_CUDA
    balance::sweep_cuda(scores.as<double>(), mean.as<double>(), value.as<double>(), workspace.as<double>(),
                        covariates.data(), base.as<const double>(), dual.as<const double>(), shape, dtype, place.on);
#endif
  } else {
    balance::sweep_cpu(scores.as<double>(), mean.as<double>(), value.as<double>(), covariates.data(),
                       base.as<const double>(), dual.as<const double>(), shape, dtype, threads);
  }
}

void balance_batch(Tensor dual, Tensor means, Tensor report, Tensor status, Tensor workspace, Tensor covariates,
                   Tensor base, Tensor targets, Tensor outcomes, Tensor start, double tolerance, std::int64_t steps,
                   int threads, Stream stream) {
  const DType dtype = dtype_of("covariates", covariates);
  check_rank("covariates", covariates, 3, "[P, N, K]");
  check_rank("outcomes", outcomes, 2, "[N, V]");
  const bool shared = base.rank() == 1;
  const balance::BatchShape shape{covariates.size(0), covariates.size(1), covariates.size(2), outcomes.size(1), shared};
  check_doubles("base", base, shared ? std::vector<std::int64_t>{shape.rows}
                                     : std::vector<std::int64_t>{shape.problems, shape.rows});
  check_doubles("targets", targets, {shape.problems, shape.columns});
  check_doubles("outcomes", outcomes, {shape.rows, shape.outcomes});
  check_doubles("start", start, {shape.problems, shape.columns});
  check_doubles("dual", dual, {shape.problems, shape.columns});
  check_doubles("means", means, {shape.problems, shape.outcomes});
  check_doubles("report", report, {shape.problems, balance::kReport});
  check_dtype("status", status, kDLInt, 32, "int32");
  check_shape("status", status, {shape.problems});
  const balance::Newton settings = newton_of(tolerance, steps);

  const Place place = place_of(stream, {{"covariates", covariates},
                                        {"base", base},
                                        {"targets", targets},
                                        {"outcomes", outcomes},
                                        {"start", start},
                                        {"dual", dual},
                                        {"means", means},
                                        {"report", report},
                                        {"status", status},
                                        {"workspace", workspace}});
  check_workspace(workspace, place.cuda ? balance::batch_workspace(shape) : 0);

  py::gil_scoped_release nogil;  // every Python object was read above
  const auto* const weights = base.as<const double>();
  const auto* const wanted = targets.as<const double>();
  const auto* const answers = outcomes.as<const double>();
  const auto* const first = start.as<const double>();
  if (place.cuda) {
#ifdef SPURGE_HAS_CUDA
    balance::batch_cuda(dual.as<double>(), means.as<double>(), report.as<double>(), status.as<std::int32_t>(),
                        workspace.as<double>(), covariates.data(), weights, wanted, answers, first, shape, settings,
                        dtype, place.on);
#endif
  } else {
    balance::batch_cpu(dual.as<double>(), means.as<double>(), report.as<double>(), status.as<std::int32_t>(),
                       covariates.data(), weights, wanted, answers, first, shape, settings, dtype, threads);
  }
}

void balance_strata(Tensor dual, Tensor averages, Tensor report, Tensor status, Tensor workspace, Tensor values,
                    Tensor starts, Tensor base, Tensor masses, Tensor means, std::optional<Tensor> squares,
                    Tensor outcomes, Tensor start, bool interact, double tolerance, std::int64_t steps, int threads,
                    Stream stream) {
  const DType dtype = dtype_of("values", values);
  check_rank("values", values, 2, "[U, N]");
  check_rank("masses", masses, 1, "[S]");
  check_rank("outcomes", outcomes, 2, "[N, V]");
  SPURGE_CHECK(masses.size(0) >= 1, "masses: must have at least 1 element, got 0");
  const balance::StrataShape shape{values.size(0), values.size(1), masses.size(0), outcomes.size(1), interact};
  check_dtype("starts", starts, kDLInt, 64, "int64");
  check_shape("starts", starts, {shape.strata + 1});
  check_doubles("base", base, {shape.rows});
  check_doubles("masses", masses, {shape.strata});
  check_doubles("means", means, {shape.units, shape.strata});
  if (squares) check_doubles("squares", *squares, {shape.units});
  check_doubles("outcomes", outcomes, {shape.rows, shape.outcomes});
  check_doubles("start", start, {shape.units, shape.strata + 1});
  check_doubles("dual", dual, {shape.units, shape.strata + 1});
  check_doubles("averages", averages, {shape.units, shape.outcomes});
  check_doubles("report", report, {shape.units, balance::kReport});
  check_dtype("status", status, kDLInt, 32, "int32");
  check_shape("status", status, {shape.units});
  const balance::Newton settings = newton_of(tolerance, steps);

  const Tensor& bent = squares ? *squares : base;
  const Place place = place_of(stream, {{"values", values},
                                        {"starts", starts},
                                        {"base", base},
                                        {"masses", masses},
                                        {"means", means},
                                        {"squares", bent},
                                        {"outcomes", outcomes},
                                        {"start", start},
                                        {"dual", dual},
                                        {"averages", averages},
                                        {"report", report},
                                        {"status", status},
                                        {"workspace", workspace}});
  check_workspace(workspace, place.cuda ? balance::strata_workspace(shape) : 0);

  py::gil_scoped_release nogil;  // every Python object was read above
  const auto* const borders = starts.as<const std::int64_t>();
  const auto* const weights = base.as<const double>();
  const auto* const sizes = masses.as<const double>();
  const auto* const wanted = means.as<const double>();
  const auto* const square = squares ? squares->as<const double>() : nullptr;
  const auto* const answers = outcomes.as<const double>();
  const auto* const first = start.as<const double>();
  if (place.cuda) {
#ifdef SPURGE_HAS_CUDA
    balance::strata_cuda(dual.as<double>(), averages.as<double>(), report.as<double>(), status.as<std::int32_t>(),
                         workspace.as<double>(), values.data(), borders, weights, sizes, wanted, square, answers,
                         first, shape, settings, dtype, place.on);
#endif
  } else {
    balance::strata_cpu(dual.as<double>(), averages.as<double>(), report.as<double>(), status.as<std::int32_t>(),
                        values.data(), borders, weights, sizes, wanted, square, answers, first, shape, settings, dtype,
                        threads);
  }
}

// Numbers of workspace that the GPU needs.
std::int64_t sweep_workspace(std::int64_t rows, std::int64_t columns) {
  return balance::sweep_workspace({rows, columns});
}

std::int64_t batch_workspace(std::int64_t problems, std::int64_t rows, std::int64_t columns) {
  return balance::batch_workspace({problems, rows, columns, 0, true});
}

std::int64_t strata_workspace(std::int64_t units, std::int64_t rows, std::int64_t strata) {
  return balance::strata_workspace({units, rows, strata, 0, true});
}

}  // namespace

void bind_balance(py::module_& m) {
  using namespace pybind11::literals;
  m.def("balance_sweep", &balance_sweep, "scores"_a, "mean"_a, "value"_a, "workspace"_a, "covariates"_a, "base"_a,
        "dual"_a, "threads"_a = 1, "stream"_a = py::none());
  m.def("balance_batch", &balance_batch, "dual"_a, "means"_a, "report"_a, "status"_a, "workspace"_a, "covariates"_a,
        "base"_a, "targets"_a, "outcomes"_a, "start"_a, "tolerance"_a, "steps"_a, "threads"_a = 1,
        "stream"_a = py::none());
  m.def("balance_strata", &balance_strata, "dual"_a, "averages"_a, "report"_a, "status"_a, "workspace"_a, "values"_a,
        "starts"_a, "base"_a, "masses"_a, "means"_a, "squares"_a, "outcomes"_a, "start"_a, "interact"_a,
        "tolerance"_a, "steps"_a, "threads"_a = 1, "stream"_a = py::none());
  m.def("balance_sweep_workspace", &sweep_workspace, "rows"_a, "columns"_a);
  m.def("balance_batch_workspace", &batch_workspace, "problems"_a, "rows"_a, "columns"_a);
  m.def("balance_strata_workspace", &strata_workspace, "units"_a, "rows"_a, "strata"_a);
}

}  // namespace spurge
