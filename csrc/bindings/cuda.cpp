// Python door of the CUDA kernels: integers for pointers and streams. Importing it needs neither a
// device nor a driver.
#include "fastmerge/cuda.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"

namespace py = pybind11;
namespace cuda = fastmerge::cuda;

namespace {

using namespace fastmerge::bindings;

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

// Where a call runs.
struct Place {
  int device;
  int multiprocessors;
  uintptr_t stream;

  template <class Launcher, class Params>
  void run(Launcher launcher, const Params& params) const {
    DeviceGuard guard(device);
    check(launcher(params, pointer<CUstream_st>(stream)));
  }
};

Place make_place(int device, int multiprocessors, uintptr_t stream) {
  if (multiprocessors < 1) {
    throw std::invalid_argument("multiprocessors: expected at least 1, found " +
                                std::to_string(multiprocessors));
  }
  return {device, multiprocessors, stream};
}

void expect_at_most(const char* name, int64_t k) {
  if (k <= cuda::kMaxDeltas) return;
  throw std::invalid_argument(std::string(name) + ": the CUDA kernels take at most " +
                              std::to_string(cuda::kMaxDeltas) + " per tensor, found " +
                              std::to_string(k));
}

// The addresses of L base tensors and their K deltas each, checked and kept alive for a launch.
class Tensors {
 public:
  Tensors(const Addresses& bases, const Addresses& deltas, const std::vector<int64_t>& sizes,
          int64_t k, int base_dtype, int delta_dtype, bool experts)
      : sizes_(sizes), bases_(pointers(bases)), deltas_(pointers(deltas)) {
    expect_count("bases", bases.size(), sizes.size());
    expect_count("deltas", deltas.size(), sizes.size() * k);
    expect_dtype("base_dtype", base_dtype);
    expect_dtype("delta_dtype", delta_dtype);
    expect_at_most("deltas", k);
    list_ = {sizes_.data(), bases_.data(), deltas_.data(), int64_t(sizes_.size()), k,
             base_dtype,    delta_dtype,   experts};
  }
  Tensors(const Tensors&) = delete;
  Tensors& operator=(const Tensors&) = delete;

  const cuda::TensorList& list() const { return list_; }

 private:
  std::vector<int64_t> sizes_;
  std::vector<const void*> bases_;
  std::vector<const void*> deltas_;
  cuda::TensorList list_;
};

int64_t scratch_doubles(int64_t size, int64_t k) { return cuda::block_count(size) * k; }

void weighted_sum(const Place& place, const Tensors& tensors, uintptr_t coefficients,
                  const Addresses& outs, int out_dtype) {
  expect_count("outs", outs.size(), tensors.list().count);
  expect_dtype("out_dtype", out_dtype);
  auto out_pointers = mutable_pointers(outs);
  py::gil_scoped_release release;
  place.run(cuda::weighted_sum,
            cuda::WeightedSumParams{tensors.list(), pointer<const float>(coefficients),
                                    out_pointers.data(), out_dtype, place.multiprocessors});
}

void coefficient_grad(const Place& place, const Tensors& tensors, const Addresses& grads,
                      int grad_dtype, uintptr_t dots, uintptr_t scratch) {
  expect_count("grads", grads.size(), tensors.list().count);
  expect_dtype("grad_dtype", grad_dtype);
  auto grad_pointers = pointers(grads);
  py::gil_scoped_release release;
  place.run(
      cuda::coefficient_grad,
      cuda::CoefficientGradParams{tensors.list(), grad_pointers.data(), pointer<double>(dots),
                                  pointer<double>(scratch), grad_dtype, place.multiprocessors});
}

void combine_and_dot(const Place& place, const Tensors& tensors, uintptr_t coefficients,
                     const Addresses& grads, int grad_dtype, const Addresses& outs, int out_dtype,
                     uintptr_t dots, uintptr_t scratch) {
  expect_count("grads", grads.size(), tensors.list().count);
  expect_count("outs", outs.size(), tensors.list().count);
  expect_dtype("grad_dtype", grad_dtype);
  expect_dtype("out_dtype", out_dtype);
  auto grad_pointers = pointers(grads);
  auto out_pointers = mutable_pointers(outs);
  py::gil_scoped_release release;
  place.run(cuda::combine_and_dot,
            cuda::CombineAndDotParams{tensors.list(), pointer<const float>(coefficients),
                                      grad_pointers.data(), out_pointers.data(),
                                      pointer<double>(dots), pointer<double>(scratch), grad_dtype,
                                      out_dtype, place.multiprocessors});
}

void magnitude_histogram(const Place& place, uintptr_t base, uintptr_t delta, int64_t size,
                         int base_dtype, int delta_dtype, bool experts, int level, int64_t prefix,
                         uintptr_t bits, uintptr_t counts) {
  expect_dtype("base_dtype", base_dtype);
  expect_dtype("delta_dtype", delta_dtype);
  py::gil_scoped_release release;
  place.run(cuda::magnitude_histogram,
            cuda::MagnitudeHistogramParams{
                pointer<const void>(base), pointer<const void>(delta),
                pointer<unsigned long long>(counts), pointer<const int64_t>(bits), size, prefix,
                level, base_dtype, delta_dtype, experts, place.multiprocessors});
}

void magnitude_refine(const Place& place, uintptr_t counts, uintptr_t bits, uintptr_t position,
                      int level) {
  py::gil_scoped_release release;
  place.run(cuda::magnitude_refine,
            cuda::MagnitudeRefineParams{pointer<const unsigned long long>(counts),
                                        pointer<int64_t>(bits), pointer<int64_t>(position), level});
}

void ties_merge(const Place& place, const Tensors& tensors, uintptr_t thresholds, uintptr_t out,
                int out_dtype, uintptr_t stats, int merge, float scaling,
                std::optional<int> majority, bool add_base) {
  expect_dtype("out_dtype", out_dtype);
  expect_merge(merge);
  py::gil_scoped_release release;
  place.run(cuda::ties_merge,
            cuda::TiesMergeParams{
                tensors.list(), pointer<const float>(thresholds), pointer<void>(out),
                pointer<unsigned long long>(stats), out_dtype, static_cast<cuda::Merge>(merge),
                scaling, majority.value_or(cuda::kOwnMajority), add_base, place.multiprocessors});
}

void ties_masks(const Place& place, const Tensors& tensors, uintptr_t thresholds, uintptr_t masks,
                uintptr_t stats, std::optional<int> majority) {
  py::gil_scoped_release release;
  place.run(cuda::ties_masks,
            cuda::TiesMasksParams{tensors.list(), pointer<const float>(thresholds),
                                  pointer<uint8_t>(masks), pointer<unsigned long long>(stats),
                                  majority.value_or(cuda::kOwnMajority), place.multiprocessors});
}

int64_t mask_scratch_doubles(int64_t rows, int64_t columns, int64_t k) {
  return cuda::mask_blocks(rows, columns) * k;
}

void elect(const Place& place, const Tensors& tensors, uintptr_t unified, uintptr_t masks,
           uintptr_t magnitudes, uintptr_t scratch, int64_t rows, int64_t columns,
           int unified_dtype, bool leave_out) {
  expect_dtype("unified_dtype", unified_dtype);
  py::gil_scoped_release release;
  place.run(cuda::elect,
            cuda::ElectParams{tensors.list(), pointer<void>(unified), pointer<uint8_t>(masks),
                              pointer<double>(magnitudes), pointer<double>(scratch), rows, columns,
                              unified_dtype, leave_out, place.multiprocessors});
}

void masked_combine(const Place& place, uintptr_t base, uintptr_t unified, const Addresses& masks,
                    uintptr_t coefficients, uintptr_t out, uintptr_t grad, uintptr_t dots,
                    uintptr_t scratch, int64_t rows, int64_t columns, int base_dtype,
                    int unified_dtype, int out_dtype, int grad_dtype) {
  for (int dtype : {base_dtype, unified_dtype, out_dtype, grad_dtype}) expect_dtype("dtype", dtype);
  expect_at_most("masks", int64_t(masks.size()));
  std::vector<const uint8_t*> mask_pointers;
  for (uintptr_t mask : masks) mask_pointers.push_back(pointer<const uint8_t>(mask));
  py::gil_scoped_release release;
  place.run(cuda::masked_combine,
            cuda::MaskedCombineParams{
                pointer<const void>(base), pointer<const void>(unified), mask_pointers.data(),
                pointer<const float>(coefficients), pointer<void>(out), pointer<const void>(grad),
                pointer<double>(dots), pointer<double>(scratch), int64_t(masks.size()), rows,
                columns, base_dtype, unified_dtype, out_dtype, grad_dtype, place.multiprocessors});
}

void probe(int device, uintptr_t arch, uintptr_t stream) {
  make_place(device, 1, stream).run(cuda::probe, cuda::ProbeParams{pointer<int32_t>(arch)});
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels; pointers and streams are integers, dtypes are 0 fp32, 1 fp16, 2 bf16.";
  py::class_<Place>(m, "Place", py::module_local(),
                    "Where a call runs: device, its multiprocessors, and a stream.")
      .def(py::init(&make_place), py::arg("device"), py::arg("multiprocessors"), py::arg("stream"));
  py::class_<Tensors>(m, "Tensors", py::module_local(),
                      "Addresses of L base tensors and of the K deltas of each.")
      .def(py::init<const Addresses&, const Addresses&, const std::vector<int64_t>&, int64_t, int,
                    int, bool>(),
           py::arg("bases"), py::arg("deltas"), py::arg("sizes"), py::arg("k"),
           py::arg("base_dtype"), py::arg("delta_dtype"), py::arg("experts"));
  m.def("scratch_doubles", &scratch_doubles, py::arg("size"), py::arg("k"),
        "fp64 entries of scratch that a reduction over K deltas of `size` elements needs.");
  m.def("weighted_sum", &weighted_sum);
  m.def("coefficient_grad", &coefficient_grad);
  m.def("combine_and_dot", &combine_and_dot);
  m.def("magnitude_histogram", &magnitude_histogram);
  m.def("magnitude_refine", &magnitude_refine);
  m.def("ties_merge", &ties_merge);
  m.def("ties_masks", &ties_masks);
  m.def("mask_scratch_doubles", &mask_scratch_doubles, py::arg("rows"), py::arg("columns"),
        py::arg("k"), "The same for masks that are packed row by row.");
  m.def("elect", &elect);
  m.def("masked_combine", &masked_combine);
  m.attr("histogram_bins") = cuda::kHistogramBins;
  m.attr("max_deltas") = cuda::kMaxDeltas;
  m.def("device_info", &device_info,
        "Compiled architectures, runtime and driver version, device count, availability, reason.");
  m.def("device_reason", &device_reason, py::arg("device"));
  m.def("probe", &probe, py::arg("device"), py::arg("arch"), py::arg("stream"),
        "Writes the architecture of the code that runs on `device` to the int32 at `arch`.");
}
