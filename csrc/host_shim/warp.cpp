// Built without ThreadSanitizer's instrumentation: one lane reads here what the others hand in.

#include "warp.h"

namespace host_shim {
namespace {

using onepeace_fast::bfloat16;
using onepeace_fast::float16;

template <typename Lane>
Lane& lane(Lanes lanes, int index) {
    return *static_cast<Lane*>(lanes[index]);
}

uint32_t element(Lanes lanes, int matrix, int row, int column) {
    return lane<MatrixRow>(lanes, 8 * matrix + row).given[column];
}

template <typename T>
void unpack(uint32_t packed, float& first, float& second) {
    T both[2];
    std::memcpy(both, &packed, 4);
    first = onepeace_fast::to_float(both[0]);
    second = onepeace_fast::to_float(both[1]);
}

}  // namespace

void shuffle(Lanes lanes) {
    for (int i = 0; i < WARP; ++i) {
        Word& mine = lane<Word>(lanes, i);
        mine.received = lane<Word>(lanes, mine.source).given;
    }
}

void vote(Lanes lanes) {
    uint32_t votes = 0;
    for (int i = 0; i < WARP; ++i) votes |= lane<Word>(lanes, i).given << i;
    for (int i = 0; i < WARP; ++i) lane<Word>(lanes, i).received = votes;
}

void load_matrices(Lanes lanes) {
    for (int i = 0; i < WARP; ++i) {
        for (int m = 0; m < 4; ++m) {
            const int row = i / 4, column = 2 * (i % 4);
            lane<MatrixRow>(lanes, i).received[m] =
                element(lanes, m, row, column) | element(lanes, m, row, column + 1) << 16;
        }
    }
}

void load_matrices_transposed(Lanes lanes) {
    for (int i = 0; i < WARP; ++i) {
        for (int m = 0; m < 4; ++m) {
            const int row = 2 * (i % 4), column = i / 4;
            lane<MatrixRow>(lanes, i).received[m] =
                element(lanes, m, row, column) | element(lanes, m, row + 1, column) << 16;
        }
    }
}

template <typename T>
void multiply(Lanes lanes) {
    float a[16][16], b[16][8], c[16][8] = {};
    for (int i = 0; i < WARP; ++i) {
        const Fragments& mine = lane<Fragments>(lanes, i);
        const int g = i / 4, t = 2 * (i % 4);
        for (int r = 0; r < 4; ++r) {
            float* target = &a[g + r % 2 * 8][t + r / 2 * 8];
            unpack<T>(mine.a[r], target[0], target[1]);
        }
        for (int r = 0; r < 2; ++r) unpack<T>(mine.b[r], b[t + 8 * r][g], b[t + 8 * r + 1][g]);
    }
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < 16; ++k) {
            for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
        }
    }
    for (int i = 0; i < WARP; ++i) {
        float* mine = lane<Fragments>(lanes, i).c;
        for (int r = 0; r < 4; ++r) mine[r] += c[i / 4 + r / 2 * 8][2 * (i % 4) + r % 2];
    }
}

template void multiply<float16>(Lanes);
template void multiply<bfloat16>(Lanes);

}  // namespace host_shim
