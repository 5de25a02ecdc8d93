// The C++ units that no torch op exposes, for the tests: cells in fp64, plans, vector functions.
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "../cpu/kernels.h"
#include "bf16_dot.h"

namespace py = pybind11;
using namespace fusedrnn;

namespace {

using Values = std::vector<double>;

template <int N>
Array<double, N> array(const Values& values) {
  if (values.size() != N) throw py::value_error("expected " + std::to_string(N) + " values");
  Array<double, N> out{};
  for (int i = 0; i < N; ++i) out[i] = values[i];
  return out;
}

template <int N>
Values list(const Array<double, N>& values) {
  return Values(values.values, values.values + N);
}

// Calls step with the parameters, if the cell has any.
template <class Cell, class Step>
auto with_param(const Values& param, const Step& step) {
  if constexpr (params_of<Cell> > 0)
    return step(array<params_of<Cell>>(param));
  else
    return step();
}

template <class Cell>
void bind_cell(py::module_& m, const char* name) {
  static_assert(CellOn<Cell, double>);
  py::class_<Cell>(m, name)
      .def_readonly_static("gates", &Cell::kGates)
      .def_readonly_static("states", &Cell::kStates)
      .def_readonly_static("saved", &Cell::kSaved)
      .def_static(
          "forward",
          [](const Values& gx, const Values& gh, const Values& state, const Values& param) {
            const auto step = [&](const auto&... params) {
              return Cell::forward(array<Cell::kGates>(gx), array<Cell::kGates>(gh),
                                   array<Cell::kStates>(state), params...);
            };
            const auto out = with_param<Cell>(param, step);
            return std::pair(list(out.state), list(out.saved));
          },
          py::arg("gx"), py::arg("gh"), py::arg("state"), py::arg("param") = Values{})
      .def_static(
          "backward",
          [](const Values& dnext, const Values& saved, const Values& state, const Values& next,
             const Values& param) {
            const auto step = [&](const auto&... params) {
              return Cell::backward(array<Cell::kStates>(dnext), array<Cell::kSaved>(saved),
                                    array<Cell::kStates>(state), array<Cell::kStates>(next), params...);
            };
            const auto d = with_param<Cell>(param, step);
            Values dparam;
            if constexpr (params_of<Cell> > 0) dparam = list(d.dparam);
            return std::tuple(list(d.dgx), list(d.dgh), list(d.dstate), dparam);
          },
          py::arg("dnext"), py::arg("saved"), py::arg("state"), py::arg("next"), py::arg("param") = Values{});
}

void bind_persistent_plans(py::module_& m) {
  py::native_enum<Exchange>(m, "Exchange", "enum.Enum")
      .value("block", Exchange::kBlock)
      .value("cluster", Exchange::kCluster)
      .value("grid", Exchange::kGrid)
      .finalize();
  py::class_<PersistentPass>(m, "PersistentPass")
      .def(py::init<int, int, int, int, int>(), py::kw_only(), py::arg("m_tiles"), py::arg("published"),
           py::arg("prefetched"), py::arg("register_steps"), py::arg("element_bytes"))
      .def_readonly("register_steps", &PersistentPass::register_steps);
  py::class_<GpuDevice>(m, "GpuDevice")
      .def(py::init([](int multiprocessors, int64_t shared_bytes, std::array<int, kClusterSizes> clusters,
                       bool cooperative) {
             GpuDevice device{multiprocessors, shared_bytes, {}, cooperative};
             std::copy(clusters.begin(), clusters.end(), device.clusters);
             return device;
           }),
           py::kw_only(), py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("clusters"),
           py::arg("cooperative"))
      .def_readonly("multiprocessors", &GpuDevice::multiprocessors)
      .def_readonly("shared_bytes", &GpuDevice::shared_bytes)
      .def_property_readonly("max_cluster", &GpuDevice::max_cluster)
      .def("clusters_of", &GpuDevice::clusters_of)
      .def_readonly("cooperative", &GpuDevice::cooperative);
  py::class_<PersistentPlan>(m, "PersistentPlan")
      .def_readonly("exchange", &PersistentPlan::exchange)
      .def_readonly("slices", &PersistentPlan::slices)
      .def_readonly("unit_tiles", &PersistentPlan::unit_tiles)
      .def_readonly("k_splits", &PersistentPlan::k_splits)
      .def_readonly("batch_tiles", &PersistentPlan::batch_tiles)
      .def_readonly("groups", &PersistentPlan::groups)
      .def_property_readonly("units", &PersistentPlan::units)
      .def_property_readonly("rows", &PersistentPlan::rows)
      .def_property_readonly("threads", &PersistentPlan::threads)
      .def_property_readonly("elements", &PersistentPlan::elements)
      .def("k_steps_of_warp",
           [](const PersistentPlan& plan, const PersistentPass& pass) { return k_steps_of_warp(plan, pass); })
      .def("shared_bytes", [](const PersistentPlan& plan, const PersistentPass& pass) {
        return shared_layout(plan, pass).bytes;
      });
  m.def("plan_persistent", [](const PersistentPass& pass, int64_t N, int64_t B, int64_t H,
                              const GpuDevice& device) { return plan_persistent({pass, N, B, H}, device); });
  m.def("stepwise_is_faster",
        [](const PersistentPlan& plan, const PersistentPass& pass, int64_t N, int64_t B, int64_t H,
           const GpuDevice& device) { return stepwise_is_faster(plan, {pass, N, B, H}, device); });
}

}  // namespace

PYBIND11_MODULE(_testing, m) {
  bind_persistent_plans(m);
  bind_cell<Lstm>(m, "lstm");
  bind_cell<Gru>(m, "gru");
  bind_cell<LstmPeephole>(m, "lstm_peephole");
  bind_cell<RnnTanh>(m, "rnn_tanh");
  bind_cell<RnnRelu>(m, "rnn_relu");
  m.def("isa", [] { return kernels().name(); });
  m.def("apply", [](const char* function, std::vector<float> values) {
    kernels().apply(function, values.data(), static_cast<int64_t>(values.size()));
    return values;
  });
  m.def("emulate_bf16_dot", emulate_bf16_dot);
  m.def("bf16_dots", bf16_dots);
  m.def("bf16_dot_forms", [] {
    std::vector<std::string> names;
    for (const DotForm& form : dot_forms()) names.push_back(form.name);
    return names;
  });
  m.def("bf16_dot", [](const std::string& name, DotLanes sum, const DotLanes& a, const DotLanes& b) {
    for (const DotForm& form : dot_forms())
      if (name == form.name) form.run(sum.data(), a.data(), b.data());
    return sum;
  });
  m.def("plan_resident", [](int64_t N, int64_t B, int64_t H, int64_t bytes_hh, bool projected,
                            int64_t units_per_slice, int64_t threads, int64_t cache_bytes) {
    const ResidentPlan plan =
        plan_resident(N, B, H, bytes_hh, projected, units_per_slice, {threads, cache_bytes});
    return std::pair(plan.row_chunks, plan.unit_slices);
  });
  m.def("balanced_rows", [](const std::vector<int64_t>& batch_sizes, int64_t chunks) {
    std::vector<int64_t> offsets{0};
    for (int64_t size : batch_sizes) offsets.push_back(offsets.back() + size);
    return balanced_rows({static_cast<int64_t>(batch_sizes.size()), batch_sizes.at(0), offsets.data()},
                         chunks);
  });
}
