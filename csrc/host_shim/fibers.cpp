// Built without ThreadSanitizer's instrumentation: what lanes hand to each other here is not memory of the kernel.

#include "fibers.h"

#include <pthread.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(ONEPEACE_FAST_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

int host_shim_device = 0;

namespace host_shim {
namespace {

constexpr size_t STACK_BYTES = 256 * 1024;

enum class State { RUNNABLE, IN_WARP, IN_BLOCK, DONE };

// What the sanitizers must be told; nothing without them.
#if defined(ONEPEACE_FAST_THREAD_SANITIZER)
void* create_thread() { return __tsan_create_fiber(0); }
void* this_thread() { return __tsan_get_current_fiber(); }
void destroy_thread(void* thread) { __tsan_destroy_fiber(thread); }
void switch_thread(void* thread) { __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync); }
void release(void* barrier) { __tsan_release(barrier); }
void acquire(void* barrier) { __tsan_acquire(barrier); }
#else
void* create_thread() { return nullptr; }
void* this_thread() { return nullptr; }
void destroy_thread(void*) {}
void switch_thread(void*) {}
void release(void*) {}
void acquire(void*) {}
#endif
#if defined(__SANITIZE_ADDRESS__)
void start_switch(void** saved, const void* bottom, size_t bytes) {
    __sanitizer_start_switch_fiber(saved, bottom, bytes);
}
void finish_switch(void* saved) { __sanitizer_finish_switch_fiber(saved, nullptr, nullptr); }
#else
void start_switch(void**, const void*, size_t) {}
void finish_switch(void*) {}
#endif

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;  // none of the main fiber
    const void* stack_bottom = nullptr;
    size_t stack_bytes = 0;
    State state = State::RUNNABLE;
    Position position;
    std::vector<Copy> copies;
    void* thread = nullptr;
};

// What orders accesses. Two take turns: a fiber that wakes late must not be ordered after one that is at the next.
struct Barrier {
    char addresses[2];
    unsigned passed = 0;

    void* address() { return &addresses[passed % 2]; }
    void next() { ++passed; }
};

struct Warp {
    const char* kind = nullptr;
    void* place = nullptr;
    int arrived = 0;
    void* arguments[WARP];
    Barrier barrier;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<unsigned> warp_order;
struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
};
std::unique_ptr<void, Free> memory;
const std::function<void()>* kernel_body = nullptr;
Fiber main_fiber;
Fiber* current = &main_fiber;
Barrier block_barrier;
unsigned active = 0, waiting_in_block = 0;
void* place_in_block = nullptr;
std::map<void*, int> allowed_bytes;  // of shared memory, by kernel
uint64_t order_seed = 0;

void switch_to(Fiber& next) {
    Fiber& before = *current;
    if (&next == &before) return;
    current = &next;
    switch_thread(next.thread);
    void* saved = nullptr;
    start_switch(before.state == State::DONE ? nullptr : &saved, next.stack_bottom, next.stack_bytes);
    swapcontext(&before.context, &next.context);
    finish_switch(saved);
}

void find_main_stack() {
    pthread_attr_t attributes;
    void* bottom = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &main_fiber.stack_bytes);
    pthread_attr_destroy(&attributes);
    main_fiber.stack_bottom = bottom;
}

bool runnable(unsigned thread) { return thread < active && fibers[thread]->state == State::RUNNABLE; }

// The lanes of this warp first, then the warps in their order.
Fiber& choose() {
    const unsigned thread = current == &main_fiber ? active : current->position.thread.x;
    if (current != &main_fiber) {
        const unsigned warp = thread / WARP;
        for (unsigned i = 1; i < WARP; ++i) {
            const unsigned other = warp * WARP + (thread + i) % WARP;
            if (runnable(other)) return *fibers[other];
        }
    }
    for (const unsigned warp : warp_order) {
        for (unsigned lane = 0; lane < WARP; ++lane) {
            if (runnable(warp * WARP + lane)) return *fibers[warp * WARP + lane];
        }
    }
    return main_fiber;
}

void wait() {
    Fiber& next = choose();
    if (&next == &main_fiber) fail("waits for threads that ended or wait elsewhere: not all reach what it waits at");
    switch_to(next);
}

void enter() {
    finish_switch(nullptr);
    (*kernel_body)();
    if (!current->copies.empty()) fail("ends with a copy that it did not wait for");
    current->state = State::DONE;
    release(&fibers);
    switch_to(choose());
    fail("is resumed after its end");
}

void resume(Warp& warp, unsigned first) {
    warp.arrived = 0;
    for (unsigned lane = 0; lane < WARP; ++lane) fibers[first + lane]->state = State::RUNNABLE;
}

void run_block(Index block, Index blocks, unsigned threads, size_t shared_bytes) {
    void* allocated = nullptr;
    if (posix_memalign(&allocated, 128, shared_bytes)) fail("finds no memory");
    memory.reset(allocated);
    std::memset(allocated, 0xff, shared_bytes);
    active = threads;
    waiting_in_block = 0;
    warps.assign(threads / WARP, Warp());
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = *fibers[i];
        fiber.state = State::RUNNABLE;
        fiber.position = {{i}, block, blocks};
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
        // Else AddressSanitizer takes every switch for a new stack, and clears what it knows of all of it.
        fiber.context.uc_stack.ss_size = 0;
        fiber.thread = create_thread();
    }
    switch_to(choose());
    for (unsigned i = 0; i < threads; ++i) {
        current = fibers[i].get();
        if (current->state != State::DONE) fail("never ends");
        destroy_thread(current->thread);
    }
    current = &main_fiber;
    acquire(&fibers);  // the end of a block orders it before the next
}

// The lanes of a warp hand in arguments at one place.
void meet(const char* kind, void* place, void* argument, void (*finish)(Lanes)) {
    const unsigned thread = current->position.thread.x, lane = thread % WARP;
    Warp& warp = warps[thread / WARP];
    if (warp.arrived && std::strcmp(warp.kind, kind)) fail("its warp is elsewhere, in ", warp.kind);
    if (warp.arrived && warp.place != place) fail("its warp has diverged, and is elsewhere in another ", kind);
    warp.kind = kind;
    warp.place = place;
    warp.arguments[lane] = argument;
    if (++warp.arrived == WARP) {
        finish(warp.arguments);
        resume(warp, thread - lane);
        return;
    }
    current->state = State::IN_WARP;
    wait();
}

}  // namespace

[[noreturn]] void fail(const char* what, const char* more) {
    const Index block = current->position.block, thread = current->position.thread;
    std::fprintf(
        stderr, "host shim: block %u %u %u, thread %u: %s%s\n", block.x, block.y, block.z, thread.x, what, more);
    std::_Exit(3);
}

const Position& position() { return current->position; }

void* shared_memory() { return memory.get(); }

// Without inlining as on a GPU, or with copies of loops' bodies, a place says nothing.
#if defined(ONEPEACE_FAST_CALL_SITES)
#define PLACE __builtin_return_address(0)
#else
#define PLACE nullptr
#endif

void with_warp(const char* kind, void* argument, void (*finish)(Lanes)) { meet(kind, PLACE, argument, finish); }

void synchronize_warp() {
    Warp& warp = warps[current->position.thread.x / WARP];
    void* barrier = warp.barrier.address();
    release(barrier);
    meet("__syncwarp", PLACE, &warp.barrier, [](Lanes lanes) { static_cast<Barrier*>(lanes[0])->next(); });
    acquire(barrier);
}

void synchronize_block() {
    void* barrier = block_barrier.address();
    release(barrier);
    if (waiting_in_block && place_in_block != PLACE) fail("is at another __syncthreads() than threads before it");
    place_in_block = PLACE;
    if (++waiting_in_block == active) {
        waiting_in_block = 0;
        block_barrier.next();
        for (unsigned i = 0; i < active; ++i) fibers[i]->state = State::RUNNABLE;
    } else {
        current->state = State::IN_BLOCK;
        wait();
    }
    acquire(barrier);
}

int shared_limit() {
    const char* given = std::getenv("HOST_SHIM_SHARED_LIMIT");
    return given ? std::atoi(given) : 227 * 1024;
}

bool allow_shared_memory(void* kernel, int bytes) {
    if (bytes > shared_limit()) return false;
    allowed_bytes[kernel] = bytes;
    return true;
}

bool may_launch(void* kernel, size_t bytes) {
    const auto allowed = allowed_bytes.find(kernel);
    return bytes <= 48 * 1024 || (allowed != allowed_bytes.end() && bytes <= static_cast<size_t>(allowed->second));
}

void push_copy(const Copy& copy) { current->copies.push_back(copy); }

bool pop_copy(Copy& copy) {
    if (current->copies.empty()) return false;
    copy = current->copies.back();
    current->copies.pop_back();
    return true;
}

void run_grid(Index blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& body) {
    kernel_body = &body;
    while (fibers.size() < threads) {
        auto fiber = std::make_unique<Fiber>();
        fiber->stack.reset(new char[STACK_BYTES]);
        fiber->stack_bottom = fiber->stack.get();
        fiber->stack_bytes = STACK_BYTES;
        fibers.push_back(std::move(fiber));
    }
    find_main_stack();
    main_fiber.thread = this_thread();
    std::vector<unsigned> order(blocks.x * blocks.y * blocks.z);
    std::iota(order.begin(), order.end(), 0u);
    warp_order.resize(threads / WARP);
    std::iota(warp_order.begin(), warp_order.end(), 0u);
    if (order_seed) {
        std::mt19937_64 generator(order_seed);
        std::shuffle(order.begin(), order.end(), generator);
        std::shuffle(warp_order.begin(), warp_order.end(), generator);
    }
    for (const unsigned i : order) {
        run_block({i % blocks.x, i / blocks.x % blocks.y, i / blocks.x / blocks.y}, blocks, threads, shared_bytes);
    }
}

void set_order(uint64_t seed) { order_seed = seed; }

}  // namespace host_shim
