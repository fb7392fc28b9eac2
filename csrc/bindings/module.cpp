#include "bindings/module.hpp"

#include <string>

#include "core/isa.hpp"

namespace spurge {
namespace {

py::dict build_config() {
  py::list levels;
  for (Isa level : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (compiled(level)) levels.append(name(level));
  py::dict config;
  config["version"] = SPURGE_VERSION;
#if defined(__clang__)
  config["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  config["compiler"] = "gcc " __VERSION__;
#elif defined(_MSC_VER)
  config["compiler"] = "msvc " + std::to_string(_MSC_VER);
#endif
  config["isa_compiled"] = levels;
  config["isa_selected"] = name(selected_isa());
#ifdef SPURGE_HAS_CUDA
  config["cuda"] = SPURGE_CUDA_VERSION;
  config["cuda_archs"] = SPURGE_CUDA_ARCHS;
#else
  config["cuda"] = py::none();
  config["cuda_archs"] = py::none();
#endif
  return config;
}

}  // namespace
}  // namespace spurge

#ifdef SPURGE_EMULATED
namespace spurge {
void bind_emulation(py::module_& m);
}
#define SPURGE_MODULE _core_emulated
#else
#define SPURGE_MODULE _core
#endif

PYBIND11_MODULE(SPURGE_MODULE, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Framework-free kernels. Use spurge.ops instead of this module.";
  spurge::bind_association(m);
  spurge::bind_balance(m);
  spurge::bind_gate(m);
  spurge::bind_ig(m);
  spurge::bind_median(m);
  spurge::bind_proximity(m);
  spurge::bind_swarm(m);
  spurge::bind_sweep(m);
#ifdef SPURGE_EMULATED
  spurge::bind_emulation(m);
#endif
  m.def("build_config", &spurge::build_config, "What was compiled in, and what runs.");
#ifdef SPURGE_HAS_CUDA
  m.attr("built_with_cuda") = true;
#else
  m.attr("built_with_cuda") = false;
#endif
}
