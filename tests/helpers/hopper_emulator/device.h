// What attention.cu needs of CUDA and of a Hopper multiprocessor, on a CPU. translation.py puts it in front of the source and makes
// a call of emulator::... of each inline PTX instruction.
//
// Each thread of a block is a fiber. A warp that is drawn at random runs until each of its threads waits for something: a barrier,
// the other threads of the warp, a product. Blocks run one after another. Where PTX leaves open when something happens, a coin says
// whether it happens as early or as late as it may:
//
//   TMA      a box lands when it is asked for, or when nothing else can go on. Until then its target holds rubbish.
//   wgmma    runs when all four warps have issued it, or when the first thread waits for it; it then reads its operands, of registers too.
//            Until a thread has waited its accumulators hold rubbish.
//   bulk     copies to global memory read shared memory at once, or when they are waited for.
//
// FP8 products are added in float32, not in the fewer bits of the tensor cores. Fences order nothing here: a missing one is not seen,
// except wgmma.fence after a wait. wgmma's fences, commits and waits are the same of all threads of a warpgroup, or the launch fails.
//
// Sources: the PTX ISA on mbarrier, cp.async.bulk.tensor, wgmma (layouts of registers, matrix descriptors, swizzling).

#include <csetjmp>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <sys/mman.h>
#include <type_traits>
#include <ucontext.h>
#include <utility>

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Static and dynamic shared memory lie in one section of the library, which is the window of 32-bit shared addresses.
#define __shared__ static __attribute__((section("shared_window")))
#define threadIdx (emulator::current->index)
#define blockIdx emulator::block_index
#define blockDim emulator::block_size

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct dim { unsigned x, y; };

extern "C" __attribute__((visibility("hidden"))) unsigned char __start_shared_window[], __stop_shared_window[];

namespace emulator {

using u32 = unsigned;
using u64 = unsigned long long;

constexpr int WARP = 32, WARPGROUP = 128, MOST_THREADS = 512, STACK_BYTES = 128 << 10;
constexpr int MOST_REGISTERS = 128;          // of an accumulator
constexpr u32 RUBBISH = 0x7FC0BAD0;          // NaN, and a large integer
constexpr unsigned char RUBBISH_BYTE = 0x7F; // 127, and NaN in FP8

__shared__ __align__(1024) unsigned char dynamic_shared[227 << 10];
u32 dynamic_bytes;
dim block_index, block_size;

}  // namespace emulator

#include "fibers.h"

#include "barriers.h"
#include "copies.h"
#include "numbers.h"

#include "instructions.h"
#include "wgmma.h"

namespace emulator {

// ----------------------------------------------------------------------------------------------------- scheduling

bool ready(const Fiber& fiber) {
    switch (fiber.event) {
        case Event::none: return true;
        case Event::mbarrier: return (mbarriers[fiber.which].phase & 1) != fiber.value;
        case Event::named_barrier: return named_barriers[fiber.which].generation != fiber.value;
        case Event::warp: return warps[fiber.which].generation != fiber.value;
        case Event::product: return warpgroups[fiber.which].full >= fiber.value;
    }
    __builtin_unreachable();
}

void (*entry)();

void start_fiber() {
    entry();
    current->ended = true;
    _longjmp(scheduler, 1);
}

__attribute__((noinline)) void resume(Fiber& fiber) {
    current = &fiber;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.state, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, start_fiber, 0);
    setcontext(&context);
}

// As far as it gets. False where all its threads wait or have ended.
bool run_warp(int warp) {
    bool any = false;
    for (bool again = true; again;) {
        again = false;
        for (Fiber* fiber = fibers + WARP * warp; fiber < fibers + WARP * (warp + 1); fiber++) {
            if (fiber->ended || !ready(*fiber)) continue;
            resume(*fiber);
            if (failure[0]) return true;
            again = any = true;
        }
    }
    return any;
}

void report_deadlock(int threads) {
    Dl_info library;
    dladdr((void*)report_deadlock, &library);
    int length = snprintf(failure, sizeof failure, "deadlock in block %u, %u:", block_index.x, block_index.y);
    for (int first = 0, end; first < threads; first = end) {
        const Fiber& fiber = fibers[first];
        auto is_same = [&](const Fiber& other) {
            return other.ended == fiber.ended && other.event == fiber.event && other.which == fiber.which && other.value == fiber.value
                   && other.caller == fiber.caller;
        };
        for (end = first + 1; end < threads && is_same(fibers[end]); end++) {}
        if (fiber.ended) continue;
        length += snprintf(failure + length, sizeof failure - length, "\n  threads %d to %d: %s %d, %lld %s at @%p", first, end - 1,
                           EVENTS[(int)fiber.event], fiber.which, fiber.value, fiber.operation,
                           (void*)((char*)fiber.caller - (char*)library.dli_fbase - 1));
        if (length > (int)sizeof failure - 200) break;
    }
}

void run_block(int threads) {
    static char* const stacks = (char*)mmap(nullptr, (size_t)MOST_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    memset(__start_shared_window, RUBBISH_BYTE, __stop_shared_window - __start_shared_window);
    memset(warps, 0, sizeof warps);
    memset(named_barriers, 0, sizeof named_barriers);
    mbarrier_count = pending_boxes = 0;
    for (Warpgroup& group : warpgroups) {
        group.issued = group.full = group.done = group.steps = 0;
        group.accumulator_count = 0;
    }
    for (int t = 0; t < threads; t++) {
        memset((void*)&fibers[t], 0, sizeof fibers[t]);
        fibers[t].stack = stacks + (size_t)t * STACK_BYTES;
        fibers[t].index = {(u32)t, 0};
    }
    const int count = threads / WARP;
    while (true) {
        const int first = draw() % count;
        bool went_on = false;
        for (int w = 0; w < count && !went_on; w++) went_on = run_warp((first + w) % count);
        if (failure[0]) return;
        if (went_on || land_one()) continue;
        for (int t = 0; t < threads; t++)
            if (!fibers[t].ended) return report_deadlock(threads);
        return;
    }
}

template <class... P> struct Launch {
    static inline void (*kernel)(P...);
    static inline void** arguments;

    template <size_t... i> static void call(std::index_sequence<i...>) { kernel(*(std::remove_const_t<P>*)arguments[i]...); }

    // What went wrong; null where nothing did.
    static const char* run(void** given, dim grid, int threads, u32 shared_bytes, u64 seed) {
        arguments = given;
        entry = [] { call(std::index_sequence_for<P...>()); };
        failure[0] = 0;
        block_size = {(u32)threads, 1};
        dynamic_bytes = shared_bytes;
        random_state = seed * 0x9E3779B97F4A7C15 + 1;
        for (int i = 0; i < 8; i++) draw();
        if (threads > MOST_THREADS || threads % WARP || shared_bytes > sizeof dynamic_shared) return "a launch that is too large";
        for (block_index.y = 0; block_index.y < grid.y; block_index.y++)
            for (block_index.x = 0; block_index.x < grid.x; block_index.x++) {
                run_block(threads);
                if (failure[0]) return failure;
            }
        return nullptr;
    }
};

template <class... P> const char* launch(void (*kernel)(P...), void** arguments, dim grid, int threads, u32 shared_bytes, u64 seed) {
    Launch<P...>::kernel = kernel;
    return Launch<P...>::run(arguments, grid, threads, shared_bytes, seed);
}

}  // namespace emulator

// ------------------------------------------------------------------------------------------------------ built-ins

inline emulator::u32 __cvta_generic_to_shared(const void* p) { return emulator::shared_offset(p); }
__attribute__((noinline)) void __syncthreads() {
    const long long generation = emulator::named_arrive(0, blockDim.x);
    emulator::wait(emulator::Event::named_barrier, 0, generation, __builtin_return_address(0));
}
__attribute__((noinline)) void __syncwarp() { emulator::exchange("__syncwarp", ~0u, 0, __builtin_return_address(0)); }
template <class T> __attribute__((noinline)) T __shfl_sync(unsigned mask, T x, int lane) {
    emulator::u64 word = 0;
    memcpy(&word, &x, sizeof x);
    word = emulator::exchange("__shfl_sync", mask, word, __builtin_return_address(0))[lane & 31];
    memcpy(&x, &word, sizeof x);
    return x;
}
template <class T> __attribute__((noinline)) T __shfl_xor_sync(unsigned mask, T x, int lanes) {
    emulator::u64 word = 0;
    memcpy(&word, &x, sizeof x);
    word = emulator::exchange("__shfl_xor_sync", mask, word, __builtin_return_address(0))[(threadIdx.x & 31) ^ lanes];
    memcpy(&x, &word, sizeof x);
    return x;
}
__attribute__((noinline)) int __any_sync(unsigned mask, int holds) {
    const emulator::u64* const all = emulator::exchange("__any_sync", mask, holds != 0, __builtin_return_address(0));
    for (int lane = 0; lane < 32; lane++)
        if (all[lane]) return 1;
    return 0;
}
__attribute__((noinline)) int __all_sync(unsigned mask, int holds) {
    const emulator::u64* const all = emulator::exchange("__all_sync", mask, holds != 0, __builtin_return_address(0));
    for (int lane = 0; lane < 32; lane++)
        if (!all[lane]) return 0;
    return 1;
}
inline unsigned atomicInc(unsigned* at, unsigned most) {
    const unsigned old = *at;
    *at = old >= most ? 0 : old + 1;
    return old;
}
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
inline float __int_as_float(int x) { return emulator::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulator::bits<unsigned>(x); }
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 32; i += 8) c += (a >> i & 0xFF) * (b >> i & 0xFF);
    return c;
}
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
