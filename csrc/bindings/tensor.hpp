#pragma once
// Tensor: a borrowed DLPack view of any array argument. Alive exactly as long as the call.
//   tier 1  type(x).__dlpack_c_exchange_api__   torch >= 2.10: no Python frame, no allocation
//   tier 2  x.__dlpack__()                      NumPy, CuPy, JAX, older torch
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/check.hpp"
#include "core/dtype.hpp"
#include "dlpack/dlpack.h"

namespace spurge {
namespace py = pybind11;

struct Tensor {
  DLTensor view{};
  const DLPackExchangeAPI* api = nullptr;
  std::shared_ptr<DLManagedTensor> owner;  // tier 2 only

  bool on_cuda() const { return view.device.device_type == kDLCUDA; }
  int rank() const { return view.ndim; }
  std::int64_t size(int axis) const { return view.shape[axis]; }
  std::int64_t size() const {
    std::int64_t n = 1;
    for (int i = 0; i < view.ndim; ++i) n *= view.shape[i];
    return n;
  }
  bool contiguous() const {
    if (!view.strides || size() == 0) return true;
    std::int64_t expect = 1;
    for (int i = view.ndim - 1; i >= 0; expect *= view.shape[i--])
      if (view.shape[i] != 1 && view.strides[i] != expect) return false;
    return true;
  }
  void* data() const { return static_cast<char*>(view.data) + view.byte_offset; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data());
  }
};

// ---- what to say -------------------------------------------------------------------------------

inline std::string shape_text(const std::int64_t* shape, int rank) {
  std::string s = "(";
  for (int i = 0; i < rank; ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + (rank == 1 ? ",)" : ")");
}

inline std::string shape_of(const Tensor& t) { return shape_text(t.view.shape, t.view.ndim); }

inline std::string dtype_text(const Tensor& t) {
  const auto d = t.view.dtype;
  const char* kind = d.code == kDLFloat     ? "float"
                     : d.code == kDLBfloat  ? "bfloat"
                     : d.code == kDLInt     ? "int"
                     : d.code == kDLUInt    ? "uint"
                     : d.code == kDLBool    ? "bool"
                     : d.code == kDLComplex ? "complex"
                                            : "unknown";
  return d.code == kDLBool ? kind : kind + std::to_string(d.bits);
}

inline std::string device_text(const Tensor& t) {
  return t.on_cuda() ? "cuda:" + std::to_string(t.view.device.device_id) : "cpu";
}

// ---- checks: each names the argument, the rule and what came -------------------------------------

inline DType dtype_of(const char* arg, const Tensor& t) {
  const auto d = t.view.dtype;
  if (d.lanes == 1 && d.code == kDLFloat && d.bits == 32) return DType::f32;
  if (d.lanes == 1 && d.code == kDLFloat && d.bits == 64) return DType::f64;
  if (d.lanes == 1 && d.code == kDLFloat && d.bits == 16) return DType::f16;
  if (d.lanes == 1 && d.code == kDLBfloat && d.bits == 16) return DType::bf16;
  fail(arg, ": dtype must be float32, bfloat16, float16 or float64, got ", dtype_text(t));
}

inline void check_dtype(const char* arg, const Tensor& t, DType want) {
  SPURGE_CHECK(dtype_of(arg, t) == want, arg, ": dtype must be ", name(want), ", got ", dtype_text(t));
}

// code: kDLInt, kDLUInt or kDLBool
inline void check_dtype(const char* arg, const Tensor& t, DLDataTypeCode code, int bits, const char* want) {
  const auto d = t.view.dtype;
  SPURGE_CHECK(d.lanes == 1 && d.code == code && d.bits == bits, arg, ": dtype must be ", want, ", got ",
               dtype_text(t));
}

inline void check_rank(const char* arg, const Tensor& t, int rank, const char* letters) {
  SPURGE_CHECK(t.rank() == rank, arg, ": must have ", rank, " dimensions ", letters, ", got shape ", shape_of(t));
}

inline void check_shape(const char* arg, const Tensor& t, const std::vector<std::int64_t>& want) {
  bool same = t.rank() == static_cast<int>(want.size());
  for (int i = 0; same && i < t.rank(); ++i) same = t.size(i) == want[static_cast<std::size_t>(i)];
  SPURGE_CHECK(same, arg, ": shape must be ", shape_text(want.data(), static_cast<int>(want.size())), ", got ",
               shape_of(t));
}

// What a kernel works in.
inline void check_workspace(const Tensor& workspace, std::int64_t needed) {
  check_dtype("workspace", workspace, DType::f64);
  SPURGE_CHECK(workspace.size() >= needed, "workspace: needs ", needed, " numbers, got ", workspace.size());
}

inline void check_same_shape(const char* a, const Tensor& x, const char* b, const Tensor& y) {
  bool same = x.rank() == y.rank();
  for (int i = 0; same && i < x.rank(); ++i) same = x.size(i) == y.size(i);
  SPURGE_CHECK(same, a, " and ", b, " must have the same shape, got ", shape_of(x), " and ", shape_of(y));
}

inline void check_same_dtype(const char* a, const Tensor& x, const char* b, const Tensor& y) {
  SPURGE_CHECK(dtype_of(a, x) == dtype_of(b, y), a, " and ", b, " must have the same dtype, got ", dtype_text(x),
               " and ", dtype_text(y));
}

inline void check_finite(const char* arg, const std::vector<double>& numbers) {
  for (double x : numbers) SPURGE_CHECK(std::isfinite(x), arg, ": must be finite, got ", x);
}

// ---- where the work runs -------------------------------------------------------------------------

struct Place {
  bool cuda = false;
  CudaPlace on{};  // valid where cuda
};

using Stream = std::optional<std::uintptr_t>;  // a cudaStream_t; frameworks without the exchange API pass it

struct Named {
  const char* name;
  const Tensor& tensor;
};

// One device for all, contiguous all of them. The stream is the one that the caller's framework is
// working on right now, unless it was given.
inline Place place_of(const Stream& stream, std::initializer_list<Named> arguments) {
  const Named& first = *arguments.begin();
  for (const Named& a : arguments) {
    const auto d = a.tensor.view.device, f = first.tensor.view.device;
    SPURGE_CHECK(d.device_type == kDLCPU || d.device_type == kDLCUDA, a.name, ": must be on cpu or cuda");
    SPURGE_CHECK(d.device_type == f.device_type && d.device_id == f.device_id, first.name, " and ", a.name,
                 " must be on the same device, got ", device_text(first.tensor), " and ", device_text(a.tensor));
    SPURGE_CHECK(a.tensor.contiguous(), a.name, ": must be contiguous; call .contiguous() first");
  }
  Place place;
#ifdef SPURGE_EMULATED
  SPURGE_CHECK(!first.tensor.on_cuda(), first.name, ": must be on the CPU, which emulates a GPU here");
  place.cuda = true;
  return place;
#endif
  if (!first.tensor.on_cuda()) return place;
#ifndef SPURGE_HAS_CUDA
  fail(first.name, ": is on ", device_text(first.tensor), ", but this build has no CUDA kernels");
#endif
  place.cuda = true;
  place.on.device = first.tensor.view.device.device_id;
  if (stream) {
    place.on.stream = reinterpret_cast<void*>(*stream);
  } else {
    const auto* api = first.tensor.api;
    SPURGE_CHECK(api && api->current_work_stream, "stream: must be given for a CUDA array of this framework");
    SPURGE_CHECK(api->current_work_stream(kDLCUDA, place.on.device, &place.on.stream) == 0,
                 "cannot read the current stream of ", device_text(first.tensor));
  }
  return place;
}

}  // namespace spurge

namespace pybind11::detail {

template <>
struct type_caster<spurge::Tensor> {
  PYBIND11_TYPE_CASTER(spurge::Tensor, const_name("Tensor"));

  bool load(handle source, bool) {
    const DLPackExchangeAPI* api = exchange_api(Py_TYPE(source.ptr()));
    if (api && api->dltensor_from_py_object_no_sync) {
      value.api = api;
      if (api->dltensor_from_py_object_no_sync(source.ptr(), &value.view) == 0) return true;
      throw error_already_set();  // the framework's own reason: sparse, meta, ...
    }
    if (!hasattr(source, "__dlpack__")) return false;
    // -1 asks the producer not to synchronise: the work is queued on its own current stream.
    const bool cuda = source.attr("__dlpack_device__")().cast<std::pair<int, int>>().first == kDLCUDA;
    object capsule = cuda ? source.attr("__dlpack__")(arg("stream") = -1) : source.attr("__dlpack__")();
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (!managed) throw error_already_set();
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    value.owner.reset(managed, [](DLManagedTensor* m) {
      if (m->deleter) m->deleter(m);
    });
    value.view = managed->dl_tensor;
    return true;
  }

 private:
  // The exchange table of a tensor type, remembered for the last type seen by this thread.
  static const DLPackExchangeAPI* exchange_api(PyTypeObject* type) {
    static thread_local PyTypeObject* seen_type = nullptr;
    static thread_local const DLPackExchangeAPI* seen_api = nullptr;
    if (type == seen_type) return seen_api;
    object capsule = getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", none());
    const DLPackExchangeAPI* api = nullptr;
    if (!capsule.is_none()) {
      api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (!api) throw error_already_set();
      if (api->header.version.major != 1) api = nullptr;
    }
    Py_INCREF(type);  // keeps the cached address from being reused by another type
    Py_XDECREF(seen_type);
    seen_type = type;
    seen_api = api;
    return api;
  }
};

}  // namespace pybind11::detail
