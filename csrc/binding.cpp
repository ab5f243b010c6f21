// The Python module onepeace_fast._cuda: the kernels' C-style interface, taking addresses as integers.

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
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
    throw std::invalid_argument("type: got " + name + ", takes float16, bfloat16 or float32");
}

// Address, dtype, head stride, entry stride, entries, code offset.
using Vector = std::tuple<std::uintptr_t, std::string, std::int64_t, std::int64_t, int, int>;

void forward(
    int device, int samples, int modalities, int rows, int heads, int head_dim, int max_length, float scale,
    const std::string& type, std::uintptr_t qkv, const std::tuple<std::int64_t, std::int64_t, std::int64_t>& strides,
    std::uintptr_t cu_seqlens, std::uintptr_t code, std::uintptr_t is_cls, const std::vector<Vector>& bias,
    std::uintptr_t head_scale, const std::string& head_scale_type, std::uintptr_t out, std::uintptr_t log_sum_exp,
    std::uintptr_t stream) {
    static const std::optional<std::string> reason = unavailable_reason();
    if (reason) throw std::runtime_error("relative_bias_attention: " + *reason);
    if (bias.size() > MAX_MODALITIES) {
        throw std::invalid_argument(
            "bias: got " + std::to_string(bias.size()) + " vectors, takes at most " + std::to_string(MAX_MODALITIES));
    }
    RelativeBiasAttention arguments{};
    arguments.device = device;
    arguments.samples = samples;
    arguments.modalities = modalities;
    arguments.heads = heads;
    arguments.head_dim = head_dim;
    arguments.rows = rows;
    arguments.max_length = max_length;
    arguments.scale = scale;
    arguments.type = element_type(type);
    arguments.qkv = pointer<const void>(qkv);
    std::tie(arguments.row_stride, arguments.which_stride, arguments.head_stride) = strides;
    arguments.cu_seqlens = pointer<const std::int32_t>(cu_seqlens);
    arguments.code = pointer<const std::int32_t>(code);
    arguments.is_cls = pointer<const std::uint8_t>(is_cls);
    for (const auto& [data, vector_type, head_stride, entry_stride, entries, code_offset] : bias) {
        arguments.bias[arguments.bias_vectors++] = {
            pointer<const void>(data), head_stride, entry_stride, entries, code_offset, element_type(vector_type)};
    }
    arguments.head_scale = pointer<const void>(head_scale);
    arguments.head_scale_type = element_type(head_scale_type);
    const char* error = relative_bias_attention_forward(
        arguments, pointer<void>(out), pointer<float>(log_sum_exp), pointer<void>(stream));
    if (error) throw std::runtime_error(error);
}

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of onepeace_fast, which take addresses; onepeace_fast.ops calls them.";
    module.attr("ARCHITECTURES") = ONEPEACE_FAST_ARCHITECTURES;
    module.attr("TOOLKIT") = dotted(CUDART_VERSION);
    module.attr("MAX_MODALITIES") = MAX_MODALITIES;
    module.def("unavailable_reason", &unavailable_reason, "Why no kernel can run here in one line, or None.");
    module.def(
        "relative_bias_attention_forward", &forward, py::kw_only(), py::arg("device"), py::arg("samples"),
        py::arg("modalities"), py::arg("rows"), py::arg("heads"), py::arg("head_dim"), py::arg("max_length"),
        py::arg("scale"), py::arg("type"), py::arg("qkv"), py::arg("strides"), py::arg("cu_seqlens"), py::arg("code"),
        py::arg("is_cls"), py::arg("bias"), py::arg("head_scale"), py::arg("head_scale_type"), py::arg("out"),
        py::arg("log_sum_exp"), py::arg("stream"),
        "Launches the kernel of csrc/relative_bias_attention.h, whose fields the arguments are, or raises one line.");
}

}  // namespace
}  // namespace onepeace_fast
