// The threads of a block as fibers, what each waits for, and the shared memory that they see.
#pragma once

namespace emulator {

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
    long long steps;        // see Warpgroup
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

// Shared memory, whose addresses are 32-bit offsets in the window.

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

}  // namespace emulator
