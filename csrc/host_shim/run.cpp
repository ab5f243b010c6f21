// Runs the kernels' entries on a CPU: reads a case from a file, writes the results to another.
//
//     run CASE RESULTS
//
// A case: RelativeBiasAttention as bytes, then the arrays that it points to, each as its number of bytes (int64) and
// these: qkv (before it, where in the array it begins, int64), cu_seqlens, code, is_cls, their number and every bias,
// head_scale; then a
// number of runs and each run's order of blocks and warps. Results: out and log_sum_exp of each run. Every array is an
// allocation of its own, as long as its contents, so that AddressSanitizer sees an access past it.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../relative_bias_attention.h"
#include "fibers.h"

namespace {

using onepeace_fast::RelativeBiasAttention;

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
    explicit Array(size_t bytes) : data_(bytes ? std::malloc(bytes) : nullptr, std::free), bytes_(bytes) {}
    explicit Array(File& file) : Array(static_cast<size_t>(file.number())) { file.read(data_.get(), bytes_); }
    char* data() { return static_cast<char*>(data_.get()); }
    size_t bytes() const { return bytes_; }

private:
    std::unique_ptr<void, void (*)(void*)> data_;
    size_t bytes_;
};

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) {
        std::fprintf(stderr, "run: takes a case and a file for the results\n");
        return 2;
    }
    File in(arguments[1], "rb"), results(arguments[2], "wb");
    RelativeBiasAttention attention;
    in.read(&attention, sizeof(attention));
    const int64_t begin = in.number();
    Array qkv(in), cu_seqlens(in), code(in), is_cls(in);
    attention.qkv = qkv.data() + begin;
    attention.cu_seqlens = reinterpret_cast<const int32_t*>(cu_seqlens.data());
    attention.code = reinterpret_cast<const int32_t*>(code.data());
    attention.is_cls = reinterpret_cast<const uint8_t*>(is_cls.data());
    std::vector<Array> bias;
    for (int64_t m = 0, vectors = in.number(); m < vectors; ++m) {
        bias.emplace_back(in);
        attention.bias[m].data = bias.back().data();
    }
    Array head_scale(in);
    attention.head_scale = head_scale.data();
    const size_t elements = static_cast<size_t>(attention.rows) * attention.heads;
    for (int64_t runs = in.number(); runs > 0; --runs) {
        host_shim::set_order(static_cast<uint64_t>(in.number()));
        Array out(2 * elements * attention.head_dim), log_sum_exp(sizeof(float) * elements);
        if (elements) {
            std::memset(out.data(), 0xff, out.bytes());
            std::memset(log_sum_exp.data(), 0xff, log_sum_exp.bytes());
        }
        const char* problem = onepeace_fast::relative_bias_attention_forward(
            attention, out.data(), reinterpret_cast<float*>(log_sum_exp.data()), nullptr);
        if (problem) {
            std::fprintf(stderr, "%s\n", problem);
            return 1;
        }
        results.write(out.data(), out.bytes());
        results.write(log_sum_exp.data(), log_sum_exp.bytes());
    }
    return 0;
}
