// Barriers in shared memory (mbarrier) and of the hardware, and what the threads of a warp do together.
#pragma once

namespace emulator {

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

// What the threads of a warp do together.

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

}  // namespace emulator
