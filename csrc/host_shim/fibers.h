// Threads of a CUDA thread block as fibers of one CPU thread. A fiber runs until it reaches something that its warp or
// its block does together; blocks run one after another. A block's shared memory is an allocation of its own, full of
// NaN, so that AddressSanitizer sees an access past it; to ThreadSanitizer every fiber is a thread, and only barriers
// order what they do.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

extern "C" {
// The current device, which tests read.
extern __attribute__((visibility("default"))) int host_shim_device;
}

namespace host_shim {

constexpr int WARP = 32;

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

struct Position {
    Index thread, block, grid_size;
};

// End the process with a line that names the running fiber.
[[noreturn]] void fail(const char* what, const char* more = "");

// Of the running fiber.
const Position& position();
void* shared_memory();

// All 32 lanes hand in a pointer; the last to arrive calls `finish` with them. `kind` must be the same for all, and so
// must be the place of the call where ONEPEACE_FAST_CALL_SITES is defined: what the caller is must be inlined there.
using Lanes = void* const (&)[WARP];
void with_warp(const char* kind, void* argument, void (*finish)(Lanes));

// Barriers, which also order accesses. That of the block must be called at one place by all of its threads, likewise.
void synchronize_warp();
void synchronize_block();

// A copy to shared memory that may begin at once and has ended after wait_for_copies(); until then the target holds
// NaN.
struct Copy {
    void* target;
    const void* source;
    int bytes;
};
void push_copy(const Copy& copy);
bool pop_copy(Copy& copy);

inline void copy_later(void* target, const void* source, int bytes) {
    if (reinterpret_cast<uintptr_t>(target) % bytes || reinterpret_cast<uintptr_t>(source) % bytes) {
        fail("cp.async has an address off its size");
    }
    std::memset(target, 0xff, bytes);
    push_copy({target, source, bytes});
}

inline void wait_for_copies() {
    for (Copy copy; pop_copy(copy);) std::memcpy(copy.target, copy.source, copy.bytes);
}

// Run a kernel's body once for every thread of a grid; ends the process with a line where threads disagree about what
// they do together. Other seeds than 0 shuffle the order of blocks and of warps.
void run_grid(Index blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& body);
void set_order(uint64_t seed);

// Bytes of shared memory that a thread block may have: of an H100, or of HOST_SHIM_SHARED_LIMIT in the environment. A
// kernel must be allowed what it takes beyond 48 KiB, which fails beyond that limit, before it is launched.
int shared_limit();
bool allow_shared_memory(void* kernel, int bytes);
bool may_launch(void* kernel, size_t bytes);

}  // namespace host_shim
