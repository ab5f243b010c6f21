// Runs the kernels' entries on a CPU: reads a case from a file, writes the results to another.
//
//     run CASE RESULTS
//
// A case: RelativeBiasAttention as bytes, then the arrays that it points to, each as its number of bytes (int64) and
// these: q, k and v (before each, where in its array it begins, int64), of the queries and, where 1 comes before and
// not 0, of the keys cu_seqlens, code, is_cls and order, which may be empty, the number of vectors and every bias,
// head_scale. Then 0 for the forward pass alone, or 1, RelativeBiasAttentionGradients as bytes and grad, like q: of the
// pointers there, bias and head_scale are null where frozen, q, k, v and workspace say how far off 16 bytes they shall
// be, and the gradients of q, k and v are one array, [rows, 3, heads, head_dim], where k's row stride is not 0. Then a
// number of runs and each run's order of blocks and warps. Results of each run: out and log_sum_exp, and the gradients
// of q, k and v, every learned bias and head_scale. Every array is an allocation of its own, as long as its contents
// and full of NaN before, so that AddressSanitizer sees an access past it.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../relative_bias_attention.h"
#include "fibers.h"

namespace {

using onepeace_fast::RelativeBiasAttention;
using onepeace_fast::RelativeBiasAttentionGradients;

size_t element_bytes(onepeace_fast::ElementType type) { return type == onepeace_fast::FLOAT32 ? 4 : 2; }

struct File {
    FILE* file;

    File(const char* path, const char* mode) : file(std::fopen(path, mode)) {
        if (!file) fail();
    }
    ~File() { std::fclose(file); }

    [[noreturn]] static void fail() {
        std::fprintf(stderr, "run: a file cannot be read or written\n");
        std::exit(2);
    }
    void read(void* target, size_t bytes) {
        if (std::fread(target, 1, bytes, file) != bytes) fail();
    }
    void write(const void* source, size_t bytes) {
        if (std::fwrite(source, 1, bytes, file) != bytes) fail();
    }
    int64_t number() {
        int64_t value;
        read(&value, sizeof(value));
        return value;
    }
};

// Aligned to 16 bytes, as malloc does; null where it is empty.
class Array {
public:
    explicit Array(size_t bytes) : data_(bytes ? std::malloc(bytes) : nullptr, std::free), bytes_(bytes) {
        if (bytes) std::memset(data_.get(), 0xff, bytes);
    }
    explicit Array(File& file) : Array(static_cast<size_t>(file.number())) { file.read(data_.get(), bytes_); }
    char* data() { return static_cast<char*>(data_.get()); }
    size_t bytes() const { return bytes_; }

private:
    std::unique_ptr<void, void (*)(void*)> data_;
    size_t bytes_;
};

// Arrays that one run writes, in the order of the results.
class Results {
public:
    char* add(size_t elements, size_t bytes) { return arrays_.emplace_back(elements * bytes).data(); }
    void write(File& file) {
        for (Array& array : arrays_) file.write(array.data(), array.bytes());
    }

private:
    std::vector<Array> arrays_;
};

const char* run_forward(const RelativeBiasAttention& attention, Results& results, const float** log_sum_exp) {
    const size_t elements = static_cast<size_t>(attention.queries.rows) * attention.heads;
    char* out = results.add(elements * attention.value_dim, 2);
    auto* sums = reinterpret_cast<float*>(results.add(elements, sizeof(float)));
    *log_sum_exp = sums;
    return onepeace_fast::relative_bias_attention_forward(attention, out, sums, nullptr);
}

const char* run_backward(
    const RelativeBiasAttention& attention, RelativeBiasAttentionGradients gradients, Results& results) {
    const size_t heads = attention.heads;
    const size_t row = heads * attention.head_dim;  // of the others where they are one array
    onepeace_fast::GradientRows* rows[] = {&gradients.q, &gradients.k, &gradients.v};
    const bool together = gradients.k.row_stride;
    char* data = together ? results.add(3 * attention.queries.rows * row, 2) : nullptr;
    for (int i = 0; i < 3; ++i) {
        const size_t mine = i == 2 ? heads * attention.value_dim : row;
        if (!together) data = results.add((i ? attention.keys : attention.queries).rows * mine, 2);
        const auto off = reinterpret_cast<intptr_t>(rows[i]->data);
        *rows[i] = {(together ? data + 2 * i * row : data) + off, static_cast<int64_t>(together ? 3 * row : mine)};
    }
    for (int m = 0; m < attention.bias_vectors; ++m) {
        const auto& vector = attention.bias[m];
        if (gradients.bias[m]) gradients.bias[m] = results.add(heads * vector.entries, element_bytes(vector.type));
    }
    if (gradients.head_scale) gradients.head_scale = results.add(heads, element_bytes(attention.head_scale_type));
    Array workspace(onepeace_fast::relative_bias_attention_backward_workspace(attention, gradients));
    gradients.workspace = workspace.data() + reinterpret_cast<intptr_t>(gradients.workspace);
    return onepeace_fast::relative_bias_attention_backward(attention, gradients, nullptr);
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) {
        std::fprintf(stderr, "run: expected a case and a file for the results, got %d arguments\n", count - 1);
        return 2;
    }
    File in(arguments[1], "rb"), results(arguments[2], "wb");
    RelativeBiasAttention attention;
    in.read(&attention, sizeof(attention));
    std::vector<Array> matrices, plans, bias;
    for (onepeace_fast::HeadRows* rows : {&attention.q, &attention.k, &attention.v}) {
        const int64_t begin = in.number();
        rows->data = matrices.emplace_back(in).data() + begin;
    }
    for (onepeace_fast::PackedRows* rows : {&attention.queries, &attention.keys}) {
        const bool is_apart = rows == &attention.queries || in.number();
        if (is_apart) {
            for (int i = 0; i < 4; ++i) plans.emplace_back(in);
        }
        Array* const last = plans.data() + plans.size();
        rows->cu_seqlens = reinterpret_cast<const int32_t*>(last[-4].data());
        rows->code = reinterpret_cast<const int32_t*>(last[-3].data());
        rows->is_cls = reinterpret_cast<const uint8_t*>(last[-2].data());
        rows->order = reinterpret_cast<const int32_t*>(last[-1].data());
    }
    for (int64_t m = 0, vectors = in.number(); m < vectors; ++m) {
        bias.emplace_back(in);
        attention.bias[m].data = bias.back().data();
    }
    Array head_scale(in);
    attention.head_scale = head_scale.data();
    const bool backward = in.number();
    RelativeBiasAttentionGradients gradients{};
    Array grad(0);
    if (backward) {
        in.read(&gradients, sizeof(gradients));
        const int64_t grad_begin = in.number();
        grad = Array(in);
        gradients.grad = grad.data() + grad_begin;
    }
    for (int64_t runs = in.number(); runs > 0; --runs) {
        host_shim::set_order(static_cast<uint64_t>(in.number()));
        Results written;
        const char* problem = run_forward(attention, written, &gradients.log_sum_exp);
        if (!problem && backward) problem = run_backward(attention, gradients, written);
        if (problem) {
            std::fprintf(stderr, "%s\n", problem);
            return 1;
        }
        written.write(results);
    }
    return 0;
}
