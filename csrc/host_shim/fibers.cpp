// Built without ThreadSanitizer's instrumentation: what lanes hand to each other here is not memory of the kernel.

#include "fibers.h"

#include <pthread.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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

namespace host_shim {
namespace {

constexpr size_t STACK_BYTES = 256 * 1024;

enum class State { RUNNABLE, IN_WARP, IN_BLOCK, DONE };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;  // none of the main fiber
    const void* stack_bottom = nullptr;
    size_t stack_bytes = 0;
    State state = State::RUNNABLE;
    Position position;
    std::vector<Copy> copies;
    void* thread_sanitizer = nullptr;
};

struct Warp {
    const char* kind = nullptr;
    int arrived = 0;
    void* arguments[WARP];
    char order;  // its address stands for the warp's barrier
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<unsigned> warp_order;
std::unique_ptr<char[]> memory;
char* aligned_memory = nullptr;
const std::function<void()>* kernel_body = nullptr;
Fiber main_fiber;
Fiber* current = &main_fiber;
unsigned active = 0, waiting_in_block = 0;
char block_order;
uint64_t order_seed = 0;

void switch_to(Fiber& next) {
    Fiber& before = *current;
    if (&next == &before) return;
    current = &next;
#if defined(ONEPEACE_FAST_THREAD_SANITIZER)
    __tsan_switch_to_fiber(next.thread_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* saved = nullptr;
    __sanitizer_start_switch_fiber(
        before.state == State::DONE ? nullptr : &saved, next.stack_bottom, next.stack_bytes);
    swapcontext(&before.context, &next.context);
    __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
#else
    swapcontext(&before.context, &next.context);
#endif
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
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    (*kernel_body)();
    if (!current->copies.empty()) fail("ends with a copy that it did not wait for");
    current->state = State::DONE;
    switch_to(choose());
    fail("is resumed after its end");
}

void release(Warp& warp, unsigned first) {
    warp.arrived = 0;
    for (unsigned lane = 0; lane < WARP; ++lane) fibers[first + lane]->state = State::RUNNABLE;
}

void run_block(unsigned block, unsigned blocks, unsigned threads, size_t shared_bytes) {
    memory.reset(new char[shared_bytes + 128]);
    aligned_memory = memory.get() + (128 - reinterpret_cast<uintptr_t>(memory.get()) % 128) % 128;
    std::memset(memory.get(), 0xff, shared_bytes + 128);
    active = threads;
    waiting_in_block = 0;
    warps.assign(threads / WARP, Warp());
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = *fibers[i];
        fiber.state = State::RUNNABLE;
        fiber.position = {{i}, {block}, {threads, 1, 1}, {blocks, 1, 1}};
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
#if defined(ONEPEACE_FAST_THREAD_SANITIZER)
        fiber.thread_sanitizer = __tsan_create_fiber(0);
#endif
    }
    switch_to(choose());
    for (unsigned i = 0; i < threads; ++i) {
        current = fibers[i].get();
        if (current->state != State::DONE) fail("never ends");
#if defined(ONEPEACE_FAST_THREAD_SANITIZER)
        __tsan_destroy_fiber(current->sanitizer);
#endif
    }
    current = &main_fiber;
}

}  // namespace

[[noreturn]] void fail(const char* what, const char* more) {
    const Index block = current->position.block, thread = current->position.thread;
    std::fprintf(stderr, "host shim: block %u, thread %u: %s%s\n", block.x, thread.x, what, more);
    std::_Exit(3);
}

const Position& position() { return current->position; }

void* shared_memory() { return aligned_memory; }

void with_warp(const char* kind, void* argument, void (*finish)(void* const (&arguments)[WARP])) {
    const unsigned thread = current->position.thread.x, lane = thread % WARP;
    Warp& warp = warps[thread / WARP];
    if (warp.arrived && std::strcmp(warp.kind, kind)) fail("its warp is elsewhere, in ", warp.kind);
    warp.kind = kind;
    warp.arguments[lane] = argument;
    if (++warp.arrived == WARP) {
        finish(warp.arguments);
        release(warp, thread - lane);
        return;
    }
    current->state = State::IN_WARP;
    wait();
}

void synchronize_warp() {
#if defined(ONEPEACE_FAST_THREAD_SANITIZER)
    Warp& warp = warps[current->position.thread.x / WARP];
    __tsan_release(&warp.order);
#endif
    with_warp("__syncwarp", nullptr, [](void* const (&)[WARP]) {});
#if defined(ONEPEACE_FAST_THREAD_SANITIZER)
    __tsan_acquire(&warp.order);
#endif
}

void synchronize_block() {
#if defined(ONEPEACE_FAST_THREAD_SANITIZER)
    __tsan_release(&block_order);
#endif
    if (++waiting_in_block == active) {
        waiting_in_block = 0;
        for (unsigned i = 0; i < active; ++i) fibers[i]->state = State::RUNNABLE;
    } else {
        current->state = State::IN_BLOCK;
        wait();
    }
#if defined(ONEPEACE_FAST_THREAD_SANITIZER)
    __tsan_acquire(&block_order);
#endif
}

void push_copy(const Copy& copy) { current->copies.push_back(copy); }

bool pop_copy(Copy& copy) {
    if (current->copies.empty()) return false;
    copy = current->copies.back();
    current->copies.pop_back();
    return true;
}

void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& body) {
    kernel_body = &body;
    while (fibers.size() < threads) {
        auto fiber = std::make_unique<Fiber>();
        fiber->stack.reset(new char[STACK_BYTES]);
        fiber->stack_bottom = fiber->stack.get();
        fiber->stack_bytes = STACK_BYTES;
        fibers.push_back(std::move(fiber));
    }
#if defined(__SANITIZE_ADDRESS__)
    pthread_attr_t attributes;
    void* bottom = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &main_fiber.stack_bytes);
    pthread_attr_destroy(&attributes);
    main_fiber.stack_bottom = bottom;
#endif
#if defined(ONEPEACE_FAST_THREAD_SANITIZER)
    main_fiber.thread_sanitizer = __tsan_get_current_fiber();
#endif
    std::vector<unsigned> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    warp_order.resize(threads / WARP);
    std::iota(warp_order.begin(), warp_order.end(), 0u);
    if (order_seed) {
        std::mt19937_64 generator(order_seed);
        std::shuffle(order.begin(), order.end(), generator);
        std::shuffle(warp_order.begin(), warp_order.end(), generator);
    }
    for (const unsigned block : order) run_block(block, blocks, threads, shared_bytes);
}

void set_order(uint64_t seed) { order_seed = seed; }

}  // namespace host_shim
