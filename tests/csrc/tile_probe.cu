// Prints where csrc/tile.cuh puts each chunk of a matrix: head size, row, chunk, offset, and that by chunk_offset.

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cstdio>

#include "tile.cuh"

namespace onepeace_fast {
namespace {

template <int HEAD_DIM>
void print() {
    for (int row = 0; row < 2 * BLOCK_ROWS; ++row) {
        for (int chunk = 0; chunk < HEAD_DIM / CHUNK; ++chunk) {
            const int stepped = chunk_offset<HEAD_DIM>(swizzled<HEAD_DIM>(row, chunk % 2), chunk / 2 * 2);
            std::printf("%d %d %d %d %d\n", HEAD_DIM, row, chunk, swizzled<HEAD_DIM>(row, chunk), stepped);
        }
    }
}

}  // namespace
}  // namespace onepeace_fast

int main() {
    onepeace_fast::print<32>();
    onepeace_fast::print<64>();
    onepeace_fast::print<96>();
    onepeace_fast::print<128>();
}
