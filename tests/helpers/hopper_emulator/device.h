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
// except wgmma.fence after a wait.
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

// ------------------------------------------------------------------------------------------------------- fibers

enum class Event { none, mbarrier, named_barrier, warp, product };
const char* const EVENTS[] = {"nothing", "mbarrier", "named barrier", "warp", "products of warpgroup"};

struct Copy { void* target; u32 source, bytes; };

struct Fiber {
    jmp_buf state;
    char* stack;
    dim index;
    bool started, ended;
    // What it waits for: the barrier, and the phase or generation that has to end; of products, how many have to be issued by all.
    Event event;
    int which;
    long long value;
    const char* operation;  // of a warp
    void* caller;           // the return address, where in the source that is
    // wgmma: instructions issued, waited for, and the end of each group that is committed and was not waited for.
    long long issued, retired, groups[16];
    int pending_groups;
    bool fenced;
    u32* registers[4];      // by accumulator, see Accumulator
    long long last_use[4];  // the number of instructions when it was last issued
    Copy copies[4];
    int pending_copies;
};

Fiber fibers[MOST_THREADS];
Fiber* current;
jmp_buf scheduler;
u64 random_state;
char failure[1 << 16];

u32 draw() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (u32)(random_state >> 32);
}
bool coin() { return draw() & 1; }

// Ends the launch.
[[noreturn]] __attribute__((noinline, format(printf, 1, 2))) void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(failure, sizeof failure, format, arguments);
    va_end(arguments);
    snprintf(failure + length, sizeof failure - length, " (block %u, %u, thread %u)", block_index.x, block_index.y, current->index.x);
    _longjmp(scheduler, 1);
}

__attribute__((noinline)) void suspend() {
    if (!_setjmp(current->state)) _longjmp(scheduler, 1);
}

bool ready(const Fiber& fiber);

// `caller` is what addr2line makes a line of.
void wait(Event event, int which, long long value, void* caller, const char* operation = "") {
    current->event = event;
    current->which = which;
    current->value = value;
    current->operation = operation;
    current->caller = caller;
    if (!ready(*current)) suspend();
    current->event = Event::none;
}

// ------------------------------------------------------------------------------------------------ shared memory

u32 shared_offset(const void* p) { return (u32)((const unsigned char*)p - __start_shared_window); }

unsigned char* shared_at(u32 address, u32 bytes) {
    const u32 dynamic = shared_offset(dynamic_shared);
    if (address + bytes > (u32)(__stop_shared_window - __start_shared_window)) fail("shared address %u is outside", address);
    if (address + bytes > dynamic + dynamic_bytes && address < dynamic + sizeof dynamic_shared)
        fail("shared address %u is beyond the %u bytes of the launch", address, dynamic_bytes);
    if (address % (bytes < 16 ? bytes : 16)) fail("shared address %u is not aligned to %u bytes", address, bytes);
    return __start_shared_window + address;
}

// Bits 4 to 6 of an address (of spans of 64 and 32 bytes: 4 and 5, 4) are changed by bits 7 to 9.
u32 swizzled(u32 address, int span) { return address ^ ((address >> 7) & (u32)(span / 16 - 1)) << 4; }

// ---------------------------------------------------------------------------------------------------- barriers

struct Mbarrier {
    u32 address;
    int count, pending;
    long long bytes;  // still to come
    long long phase;
};
Mbarrier mbarriers[64];
int mbarrier_count;

int find_mbarrier(u32 address) {
    for (int i = 0; i < mbarrier_count; i++)
        if (mbarriers[i].address == address) return i;
    fail("no mbarrier at shared address %u", address);
}
void end_phase(Mbarrier& b) {
    if (b.pending == 0 && b.bytes == 0) {
        b.phase++;
        b.pending = b.count;
    }
}
void mbarrier_init(u32 address, u32 count) {
    shared_at(address, 8);
    mbarriers[mbarrier_count++] = {address, (int)count, (int)count, 0, 0};
}
void mbarrier_arrive_expect(u32 address, u32 bytes) {
    Mbarrier& b = mbarriers[find_mbarrier(address)];
    if (b.pending == 0) fail("mbarrier %d: an arrival beyond its count", find_mbarrier(address));
    b.bytes += bytes;
    b.pending--;
    end_phase(b);
}
void mbarrier_arrive(u32 address) { mbarrier_arrive_expect(address, 0); }
void mbarrier_arrive_if(u32 address, u32 holds) {
    if (holds) mbarrier_arrive(address);
}
__attribute__((noinline)) void mbarrier_wait(u32 address, u32 parity) {
    wait(Event::mbarrier, find_mbarrier(address), parity, __builtin_return_address(0));
}

struct NamedBarrier { int threads, arrived; long long generation; };
NamedBarrier named_barriers[16];

long long named_arrive(int id, int threads) {
    NamedBarrier& b = named_barriers[id];
    if (b.arrived && b.threads != threads) fail("named barrier %d is of %d threads, and of %d", id, b.threads, threads);
    const long long generation = b.generation;
    b.threads = threads;
    if (++b.arrived == threads) {
        b.arrived = 0;
        b.generation++;
    }
    return generation;
}
void bar_arrive(int id, int threads) { named_arrive(id, threads); }
__attribute__((noinline)) void bar_sync(int id, int threads) {
    const long long generation = named_arrive(id, threads);
    wait(Event::named_barrier, id, generation, __builtin_return_address(0));
}
void store_and_bar_arrive_if(u32 holds, int id, int threads, u32 address, u32 x) {
    if (!holds) return;
    memcpy(shared_at(address, 4), &x, 4);
    bar_arrive(id, threads);
}

// --------------------------------------------------------------------------------------------------------- warps

struct Warp {
    int arrived;
    long long generation;
    const char* operation;
    u64 values[2][WARP];  // of this operation and of the one before, which some may still have to read
};
Warp warps[MOST_THREADS / WARP];

// What all threads of the warp have given.
__attribute__((noinline)) const u64* exchange(const char* operation, u32 mask, u64 value, void* caller) {
    const int w = current->index.x / WARP;
    Warp& warp = warps[w];
    if (mask != ~0u) fail("%s of a part of a warp", operation);
    if (warp.arrived && warp.operation != operation) fail("%s where others of the warp are at %s", operation, warp.operation);
    warp.operation = operation;
    u64* const values = warp.values[warp.generation & 1];
    values[current->index.x % WARP] = value;
    const long long generation = warp.generation;
    if (++warp.arrived == WARP) {
        warp.arrived = 0;
        warp.generation++;
    }
    wait(Event::warp, w, generation, caller, operation);
    return values;
}

// ----------------------------------------------------------------------------------------------------------- TMA

struct Map {  // hopper_emulator._Map; in the place of the hardware's 128 bytes
    const unsigned char* address;
    long long rows, columns;
    int element, box_rows, box_columns, swizzle;
};
struct Box { Map map; u32 target, barrier; int column, row; };
Box boxes[256];  // that have still to land
int pending_boxes;

u32 box_bytes(const Map& map) { return map.box_rows * map.box_columns * map.element; }

void land(const Box& box) {
    const Map& map = box.map;
    const int pitch = map.box_columns * map.element;
    const long long row_bytes = map.columns * map.element;
    for (int r = 0; r < map.box_rows; r++)
        for (int c = 0; c < pitch; c += 16) {
            unsigned char* const target = __start_shared_window + swizzled(box.target + r * pitch + c, map.swizzle);
            const long long row = box.row + r, byte = (long long)box.column * map.element + c;
            memset(target, 0, 16);  // outside of the matrix
            if (row < 0 || row >= map.rows || byte < 0 || byte >= row_bytes) continue;
            memcpy(target, map.address + row * row_bytes + byte, row_bytes - byte < 16 ? row_bytes - byte : 16);
        }
    Mbarrier& b = mbarriers[box.barrier];
    b.bytes -= box_bytes(map);
    end_phase(b);
}
void load_box(u32 target, const void* map, u32 barrier, int column, int row) {
    const Box box = {*(const Map*)map, target, (u32)find_mbarrier(barrier), column, row};
    if (target % 128) fail("TMA to shared address %u", target);
    unsigned char* const first = shared_at(target, box_bytes(box.map));
    if (coin()) return land(box);
    memset(first, RUBBISH_BYTE, box_bytes(box.map));
    if (pending_boxes == 256) fail("too many boxes");
    boxes[pending_boxes++] = box;
}
bool land_one() {
    if (pending_boxes == 0) return false;
    const int i = draw() % pending_boxes;
    land(boxes[i]);
    boxes[i] = boxes[--pending_boxes];
    return true;
}
void copy_now(const Copy& copy) { memcpy(copy.target, shared_at(copy.source, copy.bytes), copy.bytes); }
void bulk_store(void* target, u32 source, u32 bytes) {
    if ((size_t)target % 16 || bytes % 16) fail("a bulk copy of %u bytes to %p", bytes, target);
    if (coin()) return copy_now({target, source, bytes});
    if (current->pending_copies == 4) fail("too many copies");
    current->copies[current->pending_copies++] = {target, source, bytes};
}
void bulk_commit_and_wait() {
    while (current->pending_copies) copy_now(current->copies[--current->pending_copies]);
}

// -------------------------------------------------------------------------------------------------------- numbers

template <class To, class From> To bits(From x) {
    To y;
    static_assert(sizeof(To) == sizeof(From));
    memcpy(&y, &x, sizeof y);
    return y;
}
// To nearest, ties to even: `mantissa` bits, exponents from 1 - bias on, below as multiples of the smallest number.
u32 narrowed(float x, int mantissa, int bias) {
    const u32 u = bits<u32>(x), magnitude = u & 0x7FFFFFFF;
    const int drop = 23 - mantissa;
    if (magnitude < (u32)(128 - bias) << 23) return (u32)rintf(fabsf(x) * ldexpf(1.f, mantissa + bias - 1));
    return ((magnitude + (1u << (drop - 1)) - 1 + (magnitude >> drop & 1)) >> drop) - ((u32)(127 - bias) << mantissa);
}
unsigned short f16_of(float x) {
    const u32 u = bits<u32>(x), sign = u >> 16 & 0x8000, least_infinite = 0x7C00;
    if (x != x) return 0x7FFF;
    const u32 code = fabsf(x) >= 65536.f ? least_infinite : narrowed(x, 10, 15);
    return sign | code;
}
float of_f16(u32 h) {
    const u32 exponent = h >> 10 & 31, mantissa = h & 1023;
    float x = exponent == 0 ? mantissa * 0x1p-24f : bits<float>((exponent == 31 ? 0x7F800000 : (exponent + 112) << 23) | mantissa << 13);
    return h & 0x8000 ? -x : x;
}
unsigned short bf16_of(float x) {
    const u32 u = bits<u32>(x);
    return x != x ? 0x7FFF : (u + 0x7FFF + (u >> 16 & 1)) >> 16;
}
float of_bf16(u32 h) { return bits<float>(h << 16); }
u32 e4m3_of(float x) {  // no number is infinite: beyond 448 all are 448
    const u32 sign = bits<u32>(x) >> 24 & 0x80;
    if (x != x) return 0x7F;
    const u32 code = fabsf(x) >= 448.f ? 0x7E : narrowed(x, 3, 7);
    return sign | code;
}
float of_e4m3(u32 b) {
    const u32 exponent = b >> 3 & 15, mantissa = b & 7;
    float x = exponent == 0 ? mantissa * 0x1p-9f : bits<float>((exponent + 120) << 23 | mantissa << 20);
    if ((b & 0x7F) == 0x7F) x = NAN;
    return b & 0x80 ? -x : x;
}

// --------------------------------------------------------------------------------------------------------- wgmma

enum class Type { s8, u8, e4m3, bf16, f16 };

struct Accumulator;
struct Product {  // one instruction: d (+)= A B^T
    void (*compute)(const Product&, Accumulator&);
    Type a_type, b_type;
    int n, accumulator, issued;
    bool accumulate, a_in_registers;
    u64 a, b;                     // matrix descriptors
    const u32* words[WARPGROUP];  // or A
};
// The registers d of all threads, while instructions that write them are in flight. All threads have them at the same place of
// their stacks.
struct Accumulator {
    ptrdiff_t place;
    int count;
    u32 values[WARPGROUP][MOST_REGISTERS];
};
struct Warpgroup {
    Product products[64];           // a ring
    long long issued, full, done;  // by some, by all threads; computed
    Accumulator accumulators[4];
    int accumulator_count;
};
Warpgroup warpgroups[MOST_THREADS / WARPGROUP];

float number(Type type, const unsigned char* at) {
    switch (type) {
        case Type::s8: return (signed char)*at;
        case Type::u8: return *at;
        case Type::e4m3: {
            static float table[256];
            if (table[0x38] == 0.f)
                for (u32 b = 0; b < 256; b++) table[b] = of_e4m3(b);
            return table[*at];
        }
        case Type::bf16: return of_bf16(at[0] | at[1] << 8);
        case Type::f16: return of_f16(at[0] | at[1] << 8);
    }
    __builtin_unreachable();
}
int bytes_of(Type type) { return type == Type::bf16 || type == Type::f16 ? 2 : 1; }

// 32 bytes of k of a K-major matrix in shared memory: `row(r)` is given the bytes of row r.
template <class Row> void read_matrix(u64 descriptor, int rows, Row row) {
    const u32 start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    const int spans[] = {0, 128, 64, 32}, span = spans[descriptor >> 62];
    if (span == 0) fail("a matrix that is not swizzled");
    if (descriptor >> 49 & 7) fail("a matrix with a base offset");
    for (int r = 0; r < rows; r++) {
        unsigned char bytes[32];
        for (int c = 0; c < 32; c += 16)
            memcpy(bytes + c, shared_at(swizzled(start + r / 8 * stride + r % 8 * span + c, span), 16), 16);
        row(r, bytes);
    }
}

// Sums of 32 products of integers are exact in float32.
template <int n> __attribute__((optimize("O3"))) void multiply(const float (&a)[64][32], const float (&b)[32][256], int k,
                                                              float (&sums)[64][256]) {
    for (int m = 0; m < 64; m++) {
        float row[n] = {};
        for (int j = 0; j < k; j++)
            for (int column = 0; column < n; column++) row[column] += a[m][j] * b[j][column];
        memcpy(sums[m], row, sizeof row);
    }
}

template <int n> void compute(const Product& product, Accumulator& accumulator) {
    static float a[64][32], b[32][256], sums[64][256];
    const int size = bytes_of(product.a_type), k = 32 / size;
    auto a_row = [&](int row, const unsigned char* bytes) {
        for (int j = 0; j < k; j++) a[row][j] = number(product.a_type, bytes + j * size);
    };
    if (product.a_in_registers) {
        for (int warp = 0; warp < 4; warp++)
            for (int r = 0; r < 16; r++) {
                u32 words[8];  // a thread has words `quad` and 4 + quad of rows g and g + 8
                for (int w = 0; w < 8; w++)
                    words[w] = product.words[32 * warp + 4 * (r % 8) + w % 4][w / 4 * 2 + r / 8];
                a_row(16 * warp + r, (const unsigned char*)words);
            }
    } else {
        read_matrix(product.a, 64, a_row);
    }
    read_matrix(product.b, n, [&](int row, const unsigned char* bytes) {
        for (int j = 0; j < k; j++) b[j][row] = number(product.b_type, bytes + j * size);
    });
    multiply<n>(a, b, k, sums);
    const bool integers = product.b_type == Type::s8;
    for (int t = 0; t < WARPGROUP; t++)
        for (int i = 0; i < n / 2; i++) {
            const float sum = sums[t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8][i / 4 * 8 + t % 4 * 2 + i % 2];
            u32& d = accumulator.values[t][i];
            if (integers) d = (product.accumulate ? d : 0) + (u32)(int)sum;
            else d = bits<u32>((product.accumulate ? bits<float>(d) : 0.f) + sum);
        }
}

void run_products(Warpgroup& group, long long until) {
    for (; group.done < until; group.done++) {
        const Product& product = group.products[group.done % 64];
        product.compute(product, group.accumulators[product.accumulator]);
    }
}

// Of one thread; `a` is 4 words where A is in registers, else a descriptor.
template <int n, Type a_type, Type b_type, class D> void wgmma(D* d, const u32* words, u64 a, u64 b, int accumulate) {
    static_assert(n / 2 <= MOST_REGISTERS && sizeof(D) == 4);
    Fiber& self = *current;
    const int t = self.index.x % WARPGROUP;
    Warpgroup& group = warpgroups[self.index.x / WARPGROUP];
    if (!self.fenced) fail("wgmma without a wgmma.fence after the last wait");
    const ptrdiff_t place = (char*)d - self.stack;
    int slot = 0;
    while (slot < group.accumulator_count && group.accumulators[slot].place != place) slot++;
    if (slot == 4) fail("too many accumulators");
    Accumulator& accumulator = group.accumulators[slot];
    if (slot == group.accumulator_count) {
        group.accumulator_count++;
        accumulator.place = place;
    }
    if (self.last_use[slot] <= self.retired) {  // not in flight yet
        for (int i = 0; i < n / 2; i++) {
            accumulator.values[t][i] = bits<u32>(d[i]);
            d[i] = bits<D>(RUBBISH);
        }
        accumulator.count = n / 2;
    }
    self.registers[slot] = (u32*)d;
    Product& product = group.products[self.issued % 64];
    if (self.issued == group.issued) {
        if (group.issued++ - group.done == 64) fail("too many products");
        product = {compute<n>, a_type, b_type, n, slot, 0, accumulate != 0, words != nullptr, a, b, {}};
    } else if (product.a != a || product.b != b || product.accumulate != (accumulate != 0) || product.accumulator != slot || product.n != n) {
        fail("wgmma with other operands than in other threads");
    }
    product.words[t] = words;
    self.last_use[slot] = ++self.issued;
    if (++product.issued == WARPGROUP) {
        group.full = self.issued;
        if (coin()) run_products(group, group.full);
    }
}
void wgmma_fence() { current->fenced = true; }
void wgmma_commit() {
    if (current->pending_groups == 16) fail("too many groups");
    current->groups[current->pending_groups++] = current->issued;
}
__attribute__((noinline)) void wgmma_wait(int pending) {
    Fiber& self = *current;
    const int over = self.pending_groups - pending;
    self.fenced = false;
    if (over <= 0) return;
    const long long until = self.groups[over - 1];
    self.pending_groups = pending;
    memmove(self.groups, self.groups + over, pending * sizeof *self.groups);
    wait(Event::product, self.index.x / WARPGROUP, until, __builtin_return_address(0));
    Warpgroup& group = warpgroups[self.index.x / WARPGROUP];
    run_products(group, until);
    for (int slot = 0; slot < group.accumulator_count; slot++) {
        const Accumulator& accumulator = group.accumulators[slot];
        if (self.last_use[slot] > self.retired && self.last_use[slot] <= until)
            memcpy(self.registers[slot], accumulator.values[self.index.x % WARPGROUP], 4 * accumulator.count);
    }
    self.retired = until;
}

// ---------------------------------------------------------------------------------------------- other instructions

template <class... T> void nothing(const T&...) {}
void load_shared(u32& x, u32 address) { memcpy(&x, shared_at(address, 4), 4); }
void load_shared_4(u32& x, u32& y, u32& z, u32& w, u32 address) {
    const unsigned char* const at = shared_at(address, 16);
    memcpy(&x, at, 4);
    memcpy(&y, at + 4, 4);
    memcpy(&z, at + 8, 4);
    memcpy(&w, at + 12, 4);
}
void store_shared(u32 address, u32 x) { memcpy(shared_at(address, 4), &x, 4); }
void load_global(int& x, const int* at) { x = *at; }
void load_global_if(u32& x, const u32* at, u32 holds) {
    if (holds) x = *at;
}
float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.f, x) : x; }
void ex2(float& y, float x) { y = flushed(exp2f(flushed(x))); }
void rcp(float& y, float x) { y = flushed(1.f / flushed(x)); }
void prmt(u32& r, u32 a, u32 b, u32 selector) {
    const u64 both = (u64)b << 32 | a;
    r = 0;
    for (int i = 0; i < 4; i++) {
        const u32 choice = selector >> 4 * i & 15;
        if (choice & 8) fail("prmt with a sign");
        r |= (u32)(both >> 8 * choice & 0xFF) << 8 * i;
    }
}
// Of two the first comes into the upper half.
void cvt_e4m3x2(unsigned short& r, float high, float low) { r = e4m3_of(high) << 8 | e4m3_of(low); }
void cvt_bf16x2(u32& r, float high, float low) { r = (u32)bf16_of(high) << 16 | bf16_of(low); }
void cvt_f16x2(u32& r, float high, float low) { r = (u32)f16_of(high) << 16 | f16_of(low); }
void pack(u32& r, unsigned short low, unsigned short high) { r = (u32)high << 16 | low; }
void add_f16x2(u32& r, u32 a, u32 b) {
    r = (u32)f16_of(of_f16(a >> 16) + of_f16(b >> 16)) << 16 | f16_of(of_f16(a & 0xFFFF) + of_f16(b & 0xFFFF));
}
void exclusive_or(u32& r, u32 a, u32 b) { r = a ^ b; }

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
        group.issued = group.full = group.done = 0;
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
