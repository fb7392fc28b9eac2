#pragma once
// One function per op family, each in its own bind_<stem>.cpp.
#include <pybind11/pybind11.h>

namespace spurge {
namespace py = pybind11;

void bind_association(py::module_& m);
void bind_balance(py::module_& m);
void bind_gate(py::module_& m);
void bind_ig(py::module_& m);
void bind_median(py::module_& m);
void bind_proximity(py::module_& m);
void bind_swarm(py::module_& m);
void bind_sweep(py::module_& m);

}  // namespace spurge
