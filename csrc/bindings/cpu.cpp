// Python door of the CPU kernels: integers for pointers, no checks beyond what a crash would need.
#include "fastmerge/cpu.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "fastmerge/dtype.h"

namespace py = pybind11;
using fastmerge::cpu::block_count;
using fastmerge::cpu::kernels;

namespace {

using Addresses = std::vector<uintptr_t>;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::vector<const void*> pointers(const Addresses& addresses) {
  std::vector<const void*> result;
  result.reserve(addresses.size());
  for (uintptr_t address : addresses) result.push_back(pointer<const void>(address));
  return result;
}

std::vector<void*> mutable_pointers(const Addresses& addresses) {
  std::vector<void*> result;
  result.reserve(addresses.size());
  for (uintptr_t address : addresses) result.push_back(pointer<void>(address));
  return result;
}

void expect_count(const char* name, size_t found, size_t expected) {
  if (found != expected) {
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(expected) +
                                " pointers, found " + std::to_string(found));
  }
}

void expect_dtype(const char* name, int dtype) {
  if (dtype < fastmerge::kFloat32 || dtype > fastmerge::kBFloat16) {
    throw std::invalid_argument(std::string(name) + ": expected dtype code 0, 1 or 2, found " +
                                std::to_string(dtype));
  }
}

std::vector<int64_t> first_blocks(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> first(sizes.size() + 1, 0);
  for (size_t t = 0; t < sizes.size(); ++t) first[t + 1] = first[t] + block_count(sizes[t]);
  return first;
}

int64_t scratch_doubles(int64_t size, int64_t k) { return block_count(size) * k; }

void weighted_sum(const Addresses& bases, const Addresses& deltas, uintptr_t coefficients,
                  const Addresses& outs, const std::vector<int64_t>& sizes, int64_t k,
                  int base_dtype, int delta_dtype, int out_dtype, bool experts, int threads) {
  expect_count("bases", bases.size(), sizes.size());
  expect_count("deltas", deltas.size(), sizes.size() * k);
  expect_count("outs", outs.size(), sizes.size());
  expect_dtype("base_dtype", base_dtype);
  expect_dtype("delta_dtype", delta_dtype);
  expect_dtype("out_dtype", out_dtype);
  auto first = first_blocks(sizes);
  auto base_pointers = pointers(bases);
  auto delta_pointers = pointers(deltas);
  auto out_pointers = mutable_pointers(outs);
  py::gil_scoped_release release;
  kernels().weighted_sum({{sizes.data(), first.data(), int64_t(sizes.size())},
                          base_pointers.data(),
                          delta_pointers.data(),
                          pointer<const float>(coefficients),
                          out_pointers.data(),
                          k,
                          base_dtype,
                          delta_dtype,
                          out_dtype,
                          experts,
                          threads});
}

void coefficient_grad(const Addresses& grads, const Addresses& bases, const Addresses& deltas,
                      uintptr_t dots, const std::vector<int64_t>& sizes, int64_t k, int grad_dtype,
                      int base_dtype, int delta_dtype, bool experts, uintptr_t scratch,
                      int threads) {
  expect_count("grads", grads.size(), sizes.size());
  expect_count("bases", bases.size(), sizes.size());
  expect_count("deltas", deltas.size(), sizes.size() * k);
  expect_dtype("grad_dtype", grad_dtype);
  expect_dtype("base_dtype", base_dtype);
  expect_dtype("delta_dtype", delta_dtype);
  auto first = first_blocks(sizes);
  auto grad_pointers = pointers(grads);
  auto base_pointers = pointers(bases);
  auto delta_pointers = pointers(deltas);
  py::gil_scoped_release release;
  kernels().coefficient_grad({{sizes.data(), first.data(), int64_t(sizes.size())},
                              grad_pointers.data(),
                              base_pointers.data(),
                              delta_pointers.data(),
                              pointer<double>(dots),
                              pointer<double>(scratch),
                              k,
                              grad_dtype,
                              base_dtype,
                              delta_dtype,
                              experts,
                              threads});
}

void combine_and_dot(uintptr_t base, const Addresses& deltas, uintptr_t coefficients,
                     uintptr_t grad, uintptr_t out, uintptr_t dots, int64_t size, int64_t k,
                     int base_dtype, int delta_dtype, int grad_dtype, int out_dtype, bool experts,
                     uintptr_t scratch, int threads) {
  expect_count("deltas", deltas.size(), k);
  expect_dtype("base_dtype", base_dtype);
  expect_dtype("delta_dtype", delta_dtype);
  expect_dtype("grad_dtype", grad_dtype);
  expect_dtype("out_dtype", out_dtype);
  auto delta_pointers = pointers(deltas);
  py::gil_scoped_release release;
  kernels().combine_and_dot(
      {{pointer<const void>(base), delta_pointers.data(), k, base_dtype, delta_dtype, experts},
       pointer<const float>(coefficients),
       pointer<const void>(grad),
       pointer<void>(out),
       pointer<double>(dots),
       pointer<double>(scratch),
       size,
       grad_dtype,
       out_dtype,
       threads});
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int level = 0; level < fastmerge::cpu::supported_levels(); ++level) {
    names.emplace_back(fastmerge::cpu::level_name(level));
  }
  return names;
}

void set_isa(const std::string& name) {
  if (fastmerge::cpu::set_isa(name.c_str())) return;
  std::string known;
  for (const std::string& level : supported_isas()) known += (known.empty() ? "" : ", ") + level;
  throw py::value_error("instruction set: expected one of " + known + ", found '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels; pointers are integers, dtypes are 0 fp32, 1 fp16, 2 bf16.";
  m.def("scratch_doubles", &scratch_doubles, py::arg("size"), py::arg("k"),
        "fp64 entries of scratch that a reduction over K deltas of `size` elements needs.");
  m.def("weighted_sum", &weighted_sum);
  m.def("coefficient_grad", &coefficient_grad);
  m.def("combine_and_dot", &combine_and_dot);
  m.def("isa", [] { return std::string(fastmerge::cpu::isa()); });
  m.def("supported_isas", &supported_isas);
  m.def("set_isa", &set_isa, py::arg("name"));

  const char* forced = std::getenv("FASTMERGE_ISA");
  if (forced == nullptr || *forced == '\0') return;
  try {
    set_isa(forced);
  } catch (const std::exception& error) {
    throw py::import_error(std::string("FASTMERGE_ISA: ") + error.what());
  }
}
