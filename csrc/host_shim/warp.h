// What the lanes of a warp compute together. Each lane hands in one of these; warp.cpp fills in what it receives.

#pragma once

#include <cstdint>

#include "elements.h"
#include "fibers.h"

namespace host_shim {

struct Word {
    uint32_t given, received;
    int source;
};
void shuffle(Lanes lanes);
void vote(Lanes lanes);

struct MatrixRow {
    uint16_t given[8];
    uint32_t received[4];
};
void load_matrices(Lanes lanes);
void load_matrices_transposed(Lanes lanes);

struct Fragments {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
};
template <typename T>
void multiply(Lanes lanes);

}  // namespace host_shim
