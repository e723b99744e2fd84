// Python door of the CUDA kernels: integers for pointers and streams. Importing it needs neither a
// device nor a driver.
#include "fastmerge/cuda.h"

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

std::string describe(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(describe(error));
}

// Makes a device current and restores the caller's on the way out.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_));
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

py::dict device_info() {
  int runtime = 0, driver = 0, count = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  std::string reason;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (driver == 0) {
    reason = "no CUDA driver";
  } else if (error != cudaSuccess) {
    reason = describe(error);
  } else if (count == 0) {
    reason = "no CUDA device";
  }
  if (error != cudaSuccess) count = 0;
  cudaGetLastError();
  py::dict info;
  info["archs"] = FASTMERGE_CUDA_ARCHS;
  info["runtime_version"] = runtime;
  info["driver_version"] = driver;
  info["device_count"] = count;
  info["available"] = reason.empty();
  info["reason"] = reason;
  return info;
}

// The reason why this binary cannot run on `device`, or an empty string.
std::string device_reason(int device) {
  DeviceGuard guard(device);
  cudaError_t error = fastmerge::cuda::has_device_code();
  cudaGetLastError();
  return error == cudaSuccess ? "" : describe(error);
}

void probe(int device, uintptr_t arch, uintptr_t stream) {
  DeviceGuard guard(device);
  py::gil_scoped_release release;
  check(fastmerge::cuda::probe({reinterpret_cast<int32_t*>(arch)},
                               reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels; pointers and streams are integers.";
  m.def("device_info", &device_info,
        "Compiled architectures, runtime and driver version, device count, availability, reason.");
  m.def("device_reason", &device_reason, py::arg("device"));
  m.def("probe", &probe, py::arg("device"), py::arg("arch"), py::arg("stream"),
        "Writes the architecture of the code that runs on `device` to the int32 at `arch`.");
}
