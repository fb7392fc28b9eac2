#pragma once
// Arrays of the host in .npy files, and copies of them where the kernels are to run.
#include <cstdint>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef SPURGE_HAS_CUDA
#include <cuda_runtime.h>
#endif

template <class T>
constexpr const char* kNpyType = nullptr;
template <>
inline constexpr const char* kNpyType<float> = "<f4";
template <>
inline constexpr const char* kNpyType<std::int64_t> = "<i8";
template <>
inline constexpr const char* kNpyType<std::uint8_t> = "|u1";

template <class T>
struct Array {
  std::vector<std::int64_t> shape;
  std::vector<T> values;
};

// What stands behind 'name': in the header of a .npy file, which is a dictionary as Python writes it.
inline std::string npy_entry(const std::string& header, const std::string& name) {
  const auto at = header.find("'" + name + "': ");
  return at == std::string::npos ? "" : header.substr(at + name.size() + 4);
}

// numpy.save's format, version 1, little-endian, C order.
template <class T>
Array<T> read_npy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const auto wrong = [&](const std::string& what) { throw std::runtime_error(path + ": " + what); };
  char start[10];
  if (!file.read(start, sizeof start) || std::memcmp(start, "\x93NUMPY\x01", 7) != 0) wrong("no .npy file of version 1");
  std::string header(static_cast<unsigned char>(start[8]) | static_cast<unsigned char>(start[9]) << 8, ' ');
  file.read(header.data(), static_cast<std::streamsize>(header.size()));
  if (npy_entry(header, "descr").rfind("'" + std::string(kNpyType<T>) + "'", 0) != 0)
    wrong(std::string("expected elements of type ") + kNpyType<T>);
  if (npy_entry(header, "fortran_order").rfind("False", 0) != 0) wrong("expected C order");

  Array<T> array;
  std::int64_t size = 1;
  const std::string shape = npy_entry(header, "shape");
  for (std::size_t at = shape.find_first_of("0123456789)"); at < shape.size() && shape[at] != ')';
       at = shape.find_first_of("0123456789)", at)) {
    std::size_t digits = 0;
    array.shape.push_back(std::stoll(shape.substr(at), &digits));
    size *= array.shape.back();
    at += digits;
  }
  array.values.resize(static_cast<std::size_t>(size));
  if (!file.read(reinterpret_cast<char*>(array.values.data()), size * static_cast<std::int64_t>(sizeof(T)))) wrong("too short");
  return array;
}

// Memory where the kernels run: of the CPU, or of the current GPU. Copies wait for what was queued before them.
template <class T>
class Buffer {
 public:
  Buffer(std::int64_t size, bool gpu) : size_(static_cast<std::size_t>(size)) {
    if (!gpu) host_.resize(size_);
#ifdef SPURGE_HAS_CUDA
    else check(cudaMalloc(&device_, size_ * sizeof(T)));
#endif
  }
  Buffer(const std::vector<T>& values, bool gpu) : Buffer(static_cast<std::int64_t>(values.size()), gpu) { write(values); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
#ifdef SPURGE_HAS_CUDA
  ~Buffer() { cudaFree(device_); }
#endif

  T* data() { return device_ ? static_cast<T*>(device_) : host_.data(); }

  void write(const std::vector<T>& values) {
    if (!device_) host_ = values;
#ifdef SPURGE_HAS_CUDA
    else check(cudaMemcpy(device_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
#endif
  }
  std::vector<T> read() const {
    std::vector<T> values = host_;
#ifdef SPURGE_HAS_CUDA
    if (device_) {
      values.resize(size_);
      check(cudaMemcpy(values.data(), device_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    }
#endif
    return values;
  }

 private:
#ifdef SPURGE_HAS_CUDA
  static void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
  }
#endif

  std::size_t size_;
  std::vector<T> host_;
  void* device_ = nullptr;
};
