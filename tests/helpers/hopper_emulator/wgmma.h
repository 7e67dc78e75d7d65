// Products of a warpgroup.
#pragma once

namespace emulator {

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
    long long steps;               // fences, commits and waits, of the thread that is furthest
    const void* callers[64];       // where each was, a ring
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
// An instruction that PTX wants all warps of a warpgroup to execute, each thread as its next of that kind.
void executed_by_all(const char* instruction, const void* caller) {
    Warpgroup& group = warpgroups[current->index.x / WARPGROUP];
    const long long step = current->steps++;
    if (step == group.steps) group.callers[group.steps++ % 64] = caller;
    else if (group.steps - step > 64) fail("a thread that is too far behind at %s", instruction);
    else if (group.callers[step % 64] != caller) fail("%s where others of the warpgroup are at another instruction", instruction);
}
__attribute__((noinline)) void wgmma_fence() {
    executed_by_all("wgmma.fence", __builtin_return_address(0));
    current->fenced = true;
}
__attribute__((noinline)) void wgmma_commit() {
    executed_by_all("wgmma.commit_group", __builtin_return_address(0));
    if (current->pending_groups == 16) fail("too many groups");
    current->groups[current->pending_groups++] = current->issued;
}
__attribute__((noinline)) void wgmma_wait(int pending) {
    executed_by_all("wgmma.wait_group", __builtin_return_address(0));
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

}  // namespace emulator
