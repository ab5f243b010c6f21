// The Python module onepeace_fast._cuda: the kernels' C-style interface, taking addresses as integers.

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "relative_bias_attention.h"

namespace py = pybind11;

namespace onepeace_fast {
namespace {

std::string dotted(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Why no kernel can run under this machine's driver, or nothing.
std::optional<std::string> unavailable_reason() {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver is found";
    if (driver / 1000 < CUDART_VERSION / 1000) {
        return "the NVIDIA driver runs CUDA " + dotted(driver) + " and the CUDA extension was built by CUDA " +
               dotted(CUDART_VERSION) + ": update the driver, or install again with an nvcc of CUDA " +
               std::to_string(driver / 1000) + " on PATH";
    }
    return std::nullopt;
}

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

ElementType element_type(const std::string& name) {
    if (name == "float16") return FLOAT16;
    if (name == "bfloat16") return BFLOAT16;
    if (name == "float32") return FLOAT32;
    throw std::invalid_argument("type: expected float16, bfloat16 or float32, got " + name);
}

// Address, dtype, head stride, entry stride, entries, code offset.
using Vector = std::tuple<std::uintptr_t, std::string, std::int64_t, std::int64_t, int, int>;
// Address, row stride, head stride.
using Matrix = std::tuple<std::uintptr_t, std::int64_t, std::int64_t>;
// Rows, modalities, the longest sample; addresses of cu_seqlens, code, is_cls and order, which may be 0.
using Segments = std::tuple<int, int, int, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t>;
// Address, row stride.
using Gradient = std::tuple<std::uintptr_t, std::int64_t>;

HeadRows head_rows(const Matrix& matrix) {
    const auto& [data, row_stride, head_stride] = matrix;
    return {pointer<const void>(data), row_stride, head_stride};
}

PackedRows packed_rows(const Segments& segments) {
    const auto& [rows, modalities, max_length, cu_seqlens, code, is_cls, order] = segments;
    return {
        rows, modalities, max_length, pointer<const std::int32_t>(cu_seqlens), pointer<const std::int32_t>(code),
        pointer<const std::uint8_t>(is_cls), pointer<const std::int32_t>(order)};
}

GradientRows gradient_rows(const Gradient& gradient) {
    return {pointer<void>(std::get<0>(gradient)), std::get<1>(gradient)};
}

RelativeBiasAttention attention(
    int device, int samples, int heads, int head_dim, int value_dim, float scale, const std::string& type,
    const Matrix& q, const Matrix& k, const Matrix& v, const Segments& queries, const Segments& keys,
    const std::vector<Vector>& bias, std::uintptr_t head_scale, const std::string& head_scale_type) {
    if (bias.size() > MAX_MODALITIES) {
        const std::string most = std::to_string(MAX_MODALITIES), got = std::to_string(bias.size());
        throw std::invalid_argument("bias: expected at most " + most + " vectors, got " + got);
    }
    RelativeBiasAttention arguments{};
    arguments.device = device;
    arguments.samples = samples;
    arguments.heads = heads;
    arguments.head_dim = head_dim;
    arguments.value_dim = value_dim;
    arguments.scale = scale;
    arguments.type = element_type(type);
    arguments.q = head_rows(q);
    arguments.k = head_rows(k);
    arguments.v = head_rows(v);
    arguments.queries = packed_rows(queries);
    arguments.keys = packed_rows(keys);
    arguments.modalities = std::max(arguments.queries.modalities, arguments.keys.modalities);
    for (const auto& [data, vector_type, head_stride, entry_stride, entries, code_offset] : bias) {
        arguments.bias[arguments.bias_vectors++] = {
            pointer<const void>(data), head_stride, entry_stride, entries, code_offset, element_type(vector_type)};
    }
    arguments.head_scale = pointer<const void>(head_scale);
    arguments.head_scale_type = element_type(head_scale_type);
    return arguments;
}

// Bytes of shared memory that thread blocks of both passes take on a device, and that they may have there.
std::tuple<std::int64_t, std::int64_t> shared_memory(
    int device, int head_dim, int value_dim, const std::vector<std::int64_t>& entries) {
    const std::int64_t limit = relative_bias_attention_shared_limit(device);
    const std::int64_t all = std::accumulate(entries.begin(), entries.end(), std::int64_t{0});
    const int vectors = static_cast<int>(entries.size());
    return {relative_bias_attention_shared_bytes(head_dim, value_dim, vectors, all, limit), limit};
}

void require_driver() {
    static const std::optional<std::string> reason = unavailable_reason();
    if (reason) throw std::runtime_error("relative_bias_attention: " + *reason);
}

void require_launch(const char* error) {
    if (error) throw std::runtime_error(error);
}

void forward(
    const RelativeBiasAttention& arguments, std::uintptr_t out, std::uintptr_t log_sum_exp, std::uintptr_t stream) {
    require_driver();
    require_launch(relative_bias_attention_forward(
        arguments, pointer<void>(out), pointer<float>(log_sum_exp), pointer<void>(stream)));
}

// What the size of the workspace depends on: whether an address is 0 tells that a parameter is frozen.
RelativeBiasAttentionGradients gradients_of(
    const RelativeBiasAttention& arguments, int multiprocessors, const std::vector<std::uintptr_t>& bias,
    std::uintptr_t head_scale) {
    if (bias.size() != static_cast<std::size_t>(arguments.bias_vectors)) {
        throw std::invalid_argument(
            "bias: expected a gradient for each of " + std::to_string(arguments.bias_vectors) +
            " vectors, 0 where it is frozen, got " + std::to_string(bias.size()));
    }
    if (head_scale && !arguments.head_scale) {
        throw std::invalid_argument("head_scale: expected 0, since there is no head scale, got a gradient");
    }
    RelativeBiasAttentionGradients gradients{};
    gradients.multiprocessors = multiprocessors;
    for (std::size_t m = 0; m < bias.size(); ++m) gradients.bias[m] = pointer<void>(bias[m]);
    gradients.head_scale = pointer<void>(head_scale);
    return gradients;
}

std::int64_t backward_workspace(
    const RelativeBiasAttention& arguments, int multiprocessors, const std::vector<std::uintptr_t>& bias,
    std::uintptr_t head_scale) {
    return relative_bias_attention_backward_workspace(
        arguments, gradients_of(arguments, multiprocessors, bias, head_scale));
}

void backward(
    const RelativeBiasAttention& arguments, int multiprocessors, const std::vector<std::uintptr_t>& bias,
    std::uintptr_t head_scale, std::uintptr_t grad, const std::tuple<std::int64_t, std::int64_t>& grad_strides,
    std::uintptr_t log_sum_exp, const Gradient& q, const Gradient& k, const Gradient& v, std::uintptr_t workspace,
    std::uintptr_t stream) {
    require_driver();
    RelativeBiasAttentionGradients gradients = gradients_of(arguments, multiprocessors, bias, head_scale);
    gradients.grad = pointer<const void>(grad);
    std::tie(gradients.row_stride, gradients.head_stride) = grad_strides;
    gradients.log_sum_exp = pointer<const float>(log_sum_exp);
    gradients.q = gradient_rows(q);
    gradients.k = gradient_rows(k);
    gradients.v = gradient_rows(v);
    gradients.workspace = pointer<void>(workspace);
    require_launch(relative_bias_attention_backward(arguments, gradients, pointer<void>(stream)));
}

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of onepeace_fast, which take addresses; onepeace_fast.ops calls them.";
    module.attr("ARCHITECTURES") = ONEPEACE_FAST_ARCHITECTURES;
    module.attr("TOOLKIT") = dotted(CUDART_VERSION);
    module.attr("MAX_MODALITIES") = MAX_MODALITIES;
    module.def("unavailable_reason", &unavailable_reason, "Why no kernel can run here in one line, or None.");
    module.def(
        "shared_memory", &shared_memory, py::kw_only(), py::arg("device"), py::arg("head_dim"), py::arg("value_dim"),
        py::arg("entries"),
        "Bytes of shared memory that a thread block of either pass takes with vectors of these entries, and may have.");
    py::class_<RelativeBiasAttention>(
        module, "RelativeBiasAttention",
        py::module_local(),  // a second build of this module may be loaded into the process
        "The arguments of csrc/relative_bias_attention.h; what is at the addresses must outlive the launches.")
        .def(
            py::init(&attention), py::kw_only(), py::arg("device"), py::arg("samples"), py::arg("heads"),
            py::arg("head_dim"), py::arg("value_dim"), py::arg("scale"), py::arg("type"), py::arg("q"), py::arg("k"),
            py::arg("v"), py::arg("queries"), py::arg("keys"), py::arg("bias"), py::arg("head_scale"),
            py::arg("head_scale_type"))
        .def(
            "forward", &forward, py::kw_only(), py::arg("out"), py::arg("log_sum_exp"), py::arg("stream"),
            "Launches the forward kernel, or raises one line.")
        .def(
            "backward_workspace", &backward_workspace, py::kw_only(), py::arg("multiprocessors"), py::arg("bias"),
            py::arg("head_scale"), "Bytes of the workspace of a backward pass with the same three arguments.")
        .def(
            "backward", &backward, py::kw_only(), py::arg("multiprocessors"), py::arg("bias"), py::arg("head_scale"),
            py::arg("grad"), py::arg("grad_strides"), py::arg("log_sum_exp"), py::arg("q"), py::arg("k"),
            py::arg("v"), py::arg("workspace"), py::arg("stream"),
            "Launches the backward kernels, or raises one line; q, k, v, bias, head_scale are results.");
}

}  // namespace
}  // namespace onepeace_fast
