// INT8 QK^T attention for Hopper (sm_90a): one thread brings Q, K and V by TMA; two or three warpgroups of 64 queries each
// multiply with wgmma and do the softmax; one warp for each of those writes its output. compile.py defines the macros and
// puts the wgmma wrappers (wgmma.py) in front. The workspace it reads is described in ../triton/quantize.py.
//
//   HEAD_DIM               a multiple of 32 up to 256
//   V_HEAD_DIM, PIECES     V's head dim is PIECES times V_HEAD_DIM channels, a multiple of 16; a tile is of one piece, and
//                          computes the scores for it. No more than 128 channels of FP8 or INT8, 192 in 16 bits
//   SPAN_BYTES             of a row of Q or K that lie together in shared memory: 32, 64 or 128, as they are swizzled
//   PV                     0: FP8 P and V; 1: INT8, P unsigned per block of 128 keys; 2: BF16; 3: FP16
//   OUT                    0: BF16, 1: FP16, 2: FP32
//   OUT_PASSES             in which an output of 16 bits goes through shared memory, so that less of that will do; with
//                          one, other warps write it
//   CONSUMERS, STAGES      warpgroups that compute; tiles of K and of V in flight
//   HAS_LOW, HAS_HIGH      query i sees keys from i + low, to i + high
//   KEY_MASK               a mask over keys, the same for every query
//   RETURN_LSE
//   SPLIT                  some tiles are computed in parts, which `combine` joins: COMBINE_THREADS for COMBINE_ROWS
//   SKIP                   a warpgroup leaves out blocks of keys that count for none of its rows (../skipping.py)
//   BLOCK_LIST             a tile reads the blocks of keys that a list names (../triton/block_list.py), and no others
//   MASK_BITS              of some listed blocks a mask leaves a part, which comes in bits (../triton/mask_blocks.py)
//   SEGMENTS               queries see the keys of their own id (../triton/segments.py): in some listed blocks ids are compared
//
// Scores and maxima are in units of log2. Sources: FlashAttention-3 (arXiv:2407.08608) for the division of labour and the
// product that goes on during the next softmax; SageAttention2 (arXiv:2411.10958) for the quantisation and the two levels
// of the FP8 sum; FlashAttention-4's reference maximum that follows only large steps. benchmarks/notes.md has what was tried.

typedef unsigned long long u64;
typedef unsigned int u32;

constexpr int BLOCK_N = 128;
constexpr int SPANS = (HEAD_DIM + SPAN_BYTES - 1) / SPAN_BYTES;
constexpr int V_ELEMENT = PV >= 2 ? 2 : 1;
constexpr bool TWO_LEVELS = PV == 0;       // FP8 products are added with few bits: a sum in the tensor core stays short
constexpr bool ONES = PV != 1;             // the row sum comes from a row of ones under V^T
constexpr bool FIRST_APART = PV < 2;       // the first key: its value is 0 in 8 bits, and is added by `write`
// Blocks in front of the whole ones come last then, and of those the first key's in the step that every tile ends with, which is masked anyway.
// A loop before the one of whole blocks would cost: ptxas takes other uniform registers there, and products wait for their descriptors
// (8% at 128 channels).
constexpr bool ROTATED = (FIRST_APART || HAS_LOW || KEY_MASK) && !(SKIP || BLOCK_LIST);
constexpr bool MAY_BE_EMPTY = HAS_LOW || HAS_HIGH || KEY_MASK || BLOCK_LIST;  // rows that see no key
constexpr int PROMOTE = 4;                 // blocks per tensor core sum
// Added to the number of blocks in a sum where it has still to be rescaled: beyond any.
constexpr int GROWN = TWO_LEVELS ? 2 * PROMOTE : 1 << 24;
// Two warpgroups have the registers for a product that goes on during the next softmax. Of three, each does one thing at a
// time and the others fill the gaps; with 128 channels of INT8, scores and product even share registers.
constexpr bool IN_TURN = CONSUMERS == 3;
// With Q in them, too, the tensor cores take less from shared memory; of 8-bit products none was faster for it.
constexpr bool Q_IN_REGISTERS = IN_TURN && PV >= 2;
constexpr bool SHARED_REGISTERS = IN_TURN && PV == 1 && V_HEAD_DIM > 64;
static_assert(!(IN_TURN && TWO_LEVELS), "no registers for three warpgroups' sums of two levels");
static_assert(!(IN_TURN && SKIP), "nor to leave out blocks: ptxas spills in the loop");
static_assert(BLOCK_LIST || !(MASK_BITS || SEGMENTS), "entries of the list say where bits are applied, or ids compared");
static_assert(!(MASK_BITS && SEGMENTS), "an entry says one of both");
// What `previous` is where no product is in flight: there was none, or it is complete and has still to be added (SKIP).
constexpr int NOTHING = -1, HELD = -2;
constexpr int V_ROWS = V_HEAD_DIM + (ONES ? 8 : 0);
constexpr int Q_SPAN_BYTES = 64 * SPAN_BYTES, Q_BYTES = SPANS * Q_SPAN_BYTES;  // of a warpgroup
constexpr int K_SPAN_BYTES = BLOCK_N * SPAN_BYTES, K_BYTES = SPANS * K_SPAN_BYTES;
constexpr int V_SPANS = V_ELEMENT;         // spans of 128 bytes that hold 128 keys
constexpr int V_SPAN_BYTES = V_ROWS * 128, V_BYTES = V_SPANS * V_SPAN_BYTES;
constexpr int BLOCK_M = 64 * CONSUMERS;
constexpr int OUT_COLUMNS = V_HEAD_DIM / OUT_PASSES;
constexpr int OUT_PITCH = 2 * OUT_COLUMNS + 16;  // of a row in shared memory: no two threads of a warp meet in a bank
constexpr bool HANDED_OVER = OUT != 2 && OUT_PASSES == 1;  // to warps that write it
// Named barriers: 0 is __syncthreads', 1 + c is the c-th warpgroup's own, these it shares with the warp that writes for it.
constexpr int STRIPE_FULL = 1 + CONSUMERS, STRIPE_EMPTY = 1 + 2 * CONSUMERS;
constexpr int BITS_WORDS = 64 * BLOCK_N / 32;  // of 64 queries and a block
#define BITS (MASK_BITS || SEGMENTS)           // that say which scores of a block stay: read, or made of ids
constexpr int NS = BLOCK_N / 2, NT = V_ROWS / 2, NO = V_HEAD_DIM / 2;  // registers of S, of a product, of the output

// Largest P is 2^8: the row maximum may grow by 2^HEADROOM before the sums are rescaled.
constexpr float HEADROOM = PV == 0 ? 4.f : PV == 1 ? 24.f : 8.f;
constexpr float P_EXPONENT = PV == 0 ? 8.f - HEADROOM : 0.f;  // of P at the reference maximum
constexpr float LOG2_255 = 7.99435344f;
constexpr float LN_2 = 0.69314718f;
constexpr float LOWEST = -1.0e30f;
constexpr int MASKED_SCORE = -2147483647 - 1;
// No score is beyond 2^22 (HEAD_DIM * 128 * 128). From this scale on, a masked one lies 2^9 - 1 below all others, in log2.
constexpr float LEAST_SCALE = 1.f / (1 << 22);

struct alignas(64) TensorMap { u64 opaque[16]; };

struct Params {
    const float* q_scale;    // [heads, q_blocks * 128], the softmax scale and log2(e) in it
    const float* q_shift;    // the same shape: what smoothing K took from the LSE
    const float* k_scale;    // [kv_heads, kv_blocks]
    const float* v_scale;    // [kv_heads, kv_blocks], log2
    const float* v_channel;  // [batch, kv_heads, 4, PIECES * V_HEAD_DIM] scale, sampled size, what was subtracted, what that
                             // leaves of the first key
    const int* used_keys;    // [batch, 5] first and last + 1 key that the mask leaves, whether all between are left, and the first
                             // and last + 1 of those between that are not
    u32* ticket;             // zero; the next tile that nobody has taken
    float* parts;            // [grid, 2, BLOCK_M, V_HEAD_DIM], normalised
    float* part_lse;         // [grid, 2, BLOCK_M], log2
    const bool* key_mask;    // by batch and key
    void* out;
    float* lse;
    long long out_b, out_h, out_m, lse_b, lse_h, mask_b, mask_n;
    int batch, heads, group, q_len, kv_len, q_blocks, kv_blocks, low, high, v_dim, tiles_per_head;
    int together;            // heads (and pieces of them) whose tiles are dealt out together, longest first
    int whole;               // tiles that are computed in one go; those after them are dealt out by blocks
    int grid, units;         // programs, and blocks that are dealt out
    int wide;                // rows of the output start at multiples of 16 bytes
    int zero;                // but the compiler does not know
    int kv_pitch;            // blocks of K of one sequence; they hold kv_len keys, or more where kv_len is the first of them
#if SKIP || BLOCK_LIST
    float skip_bound;        // log2 of the threshold: how far below a row's maximum the scores of a block count for nothing
#endif
#if BLOCK_LIST
    const int* block_list;   // by batch, head and tile of queries: how many blocks, how many of them are whole, then their entries
    const u32* mask_bits;    // by batch, head, 64 queries and block of keys: [64, 4] words, each of which holds a thread's bits of a row
    long long list_b, list_h, bits_b, bits_h;
#endif
#if SEGMENTS
    const int* q_ids;        // [batch, 64-row stripes of q_len, 64]
    const int* k_ids;        // [batch, blocks of kv_len, BLOCK_N]; behind the last key as that
    const int2* q_bounds;    // as q_ids: first and last + 1 key of a query's id; -1 where those between have others, too
#endif
};

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// The threads for which it does not hold stay on the same way: behind a branch, what is uniform would no longer be.
__device__ __forceinline__ void barrier_arrive_if(bool holds, u32 barrier) {
    asm volatile("{ .reg .pred holds; setp.ne.u32 holds, %1, 0;\n@holds mbarrier.arrive.shared::cta.b64 _, [%0]; }"
                 ::"r"(barrier), "r"((u32)holds) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
    asm volatile("{ .reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again; }" ::"r"(barrier), "r"(phase) : "memory");
}
// One of the 16 barriers of the hardware, which are for whole warps: opens when `threads` are there, those that do not wait
// for it among them.
__device__ __forceinline__ void named_barrier(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Where it holds, after `x` is stored. Not a branch: it is on the way that is mostly taken.
__device__ __forceinline__ void named_barrier_arrive_if(bool holds, int barrier, int threads, u32 address, u32 x) {
    asm volatile("{ .reg .pred holds;\nsetp.ne.u32 holds, %0, 0;\n@holds st.volatile.shared.u32 [%3], %4;\n@holds bar.arrive %1, %2; }"
                 ::"r"((u32)holds), "r"(barrier), "r"(threads), "r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ u32 load_shared(u32 address) {
    u32 x;
    asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ void store_shared(u32 address, u32 x) {
    asm volatile("st.volatile.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void load_tile(u32 target, const TensorMap* map, u32 barrier, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 ::"r"(target), "l"(map), "r"(barrier), "r"(column), "r"(row) : "memory");
}
// As a load that the compiler does not know to be uniform: what is, it takes into uniform registers at once, and waits for it there.
__device__ __forceinline__ int load_entry(const int* at) {
    int x;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(x) : "l"(at));
    return x;
}
// Where it holds. Not a branch, as above.
__device__ __forceinline__ void load_if(bool holds, u32& x, const u32* at) {
    asm volatile("{ .reg .pred holds; setp.ne.u32 holds, %2, 0;\n@holds ld.global.u32 %0, [%1]; }"
                 : "+r"(x) : "l"(at), "r"((u32)holds));
}
__device__ __forceinline__ void prefetch(const float* at) { asm volatile("prefetch.global.L1 [%0];" ::"l"(at)); }
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// A K-major matrix of rows of `span_bytes`, the swizzle span.
template <int span_bytes> __device__ __forceinline__ u64 matrix(u32 address) {
    constexpr u64 swizzle = span_bytes == 128 ? 1 : span_bytes == 64 ? 2 : 3;
    return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | ((u64)(8 * span_bytes >> 4) << 32) | (swizzle << 62);
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
__device__ __forceinline__ u32 permute_bytes(u32 a, u32 b, u32 selector) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
    return r;
}
__device__ __forceinline__ u32 to_e4m3(float a, float b, float c, float d) {
    unsigned short low, high;
    u32 r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    asm("mov.b32 %0, {%1, %2};" : "=r"(r) : "h"(low), "h"(high));
    return r;
}
// The same of floats' bits, where it stands.
__device__ __forceinline__ u32 to_e4m3_here(u32 a, u32 b, u32 c, u32 d) {
    u32 r;
    asm volatile("{ .reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
                 "mov.b32 %0, {low, high}; }"
                 : "=r"(r) : "f"(__uint_as_float(a)), "f"(__uint_as_float(b)), "f"(__uint_as_float(c)), "f"(__uint_as_float(d)) : "memory");
    return r;
}
__device__ __forceinline__ u32 to_bf16(float a, float b) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    return r;
}
__device__ __forceinline__ u32 to_f16(float a, float b) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    return r;
}
// Of values up to 255: adding 1024 in 16 bits leaves the rounded value in the low byte.
__device__ __forceinline__ u32 rounded(float a, float b) {
    u32 r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(to_f16(a, b)), "r"(0x64006400u));
    return r;
}
__device__ __forceinline__ u32 to_u8(float a, float b, float c, float d) {
    return permute_bytes(rounded(a, b), rounded(c, d), 0x6420);
}

// Two weights, where they are of 16 bits.
__device__ __forceinline__ u32 to_16_bits(float a, float b) { return PV == 3 ? to_f16(a, b) : to_bf16(a, b); }
// Two elements of the output, where they are of 16 bits.
__device__ __forceinline__ u32 to_output(float a, float b) { return OUT == 1 ? to_f16(a, b) : to_bf16(a, b); }
// A warp's 16 rows from shared memory, a Word at a time.
template <class Word> __device__ __forceinline__ void write_rows(unsigned short* out, long long pitch, u32 source, int lane,
                                                                int rows, int columns) {
    constexpr int WORDS = 2 * OUT_COLUMNS / sizeof(Word);
#pragma unroll
    for (int k = lane; k < 16 * WORDS; k += 32) {
        const int row = k / WORDS, word = k % WORDS, column = word * (sizeof(Word) / 2);
        Word x;
        const u32 at = source + row * OUT_PITCH + word * sizeof(Word);
        if (sizeof(Word) == 16)
            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(((u32*)&x)[0]), "=r"(((u32*)&x)[1]), "=r"(((u32*)&x)[2]), "=r"(((u32*)&x)[3]) : "r"(at) : "memory");
        else
            asm volatile("ld.shared.b32 %0, [%1];" : "=r"(((u32*)&x)[0]) : "r"(at) : "memory");
        if (row < rows && column < columns) *(Word*)(out + row * pitch + column) = x;
    }
}
// A warp writes a warpgroup's 64 rows from `source`, which may be written again afterwards; the output still has so many
// rows and columns.
__device__ __forceinline__ void write_stripe(unsigned short* out, long long pitch, bool wide, u32 source, int lane, int rows,
                                             int columns) {
    if (wide) {
        rows = min(rows, 64);
        columns = min(columns, OUT_COLUMNS);
#pragma unroll 1
        for (int row = lane; row < rows; row += 32)
            asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                         ::"l"(out + row * pitch), "r"(source + row * OUT_PITCH), "r"(2 * columns) : "memory");
        asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
    } else {
#pragma unroll 1
        for (int row = 0; row < 64; row += 16)
            write_rows<u32>(out + row * pitch, pitch, source + row * OUT_PITCH, lane, rows - row, columns);
    }
}

#if PV == 1
typedef int Product;
#else
typedef float Product;
#endif
constexpr int NW = PV < 2 ? 16 : 32;       // registers of P as an operand
// Weights of so many of a block's 8 groups of 16 keys are packed at once. Others stay floats until the wait behind which they are operands:
// ptxas packs the last right behind their 2^x, and waits for it there.
constexpr int EARLY = PV == 1 ? 8 : PV >= 2 ? 0 : V_HEAD_DIM <= 64 ? 2 : 6;
constexpr int RAW = EARLY + 4 * (8 - EARLY);  // what weigh gives per thread and row: four bytes each, then floats

constexpr int NSHARED = SHARED_REGISTERS ? NS : 1;
static_assert(!SHARED_REGISTERS || NS == NT, "scores and product are of one size");
constexpr int NOUT = PV == 0 ? NT : PV == 1 ? NO : 1;  // sums outside of the tensor core

// What a thread knows of its two rows, g and g + 8 of the warp's 16.
struct Rows {
    float scale0, scale1;          // of Q
    float maximum0, maximum1;      // the reference
    float sum0, sum1;              // PV == 1 only: else a column of the product
    float largest0, largest1;      // SKIP only: the running maximum, which the reference lags behind
    float first0, first1;          // FIRST_APART: the first key's score, log2, which no maximum has; -inf where it is not seen
};

// A tile of queries, or some of its blocks of keys, as the producer hands it to the consumers.
struct Item {
    int tile;          // -1: there are no more
    int first, count;  // of the tile's blocks; a count of 0 means all
    int part;          // where in `parts` the result goes, -1: to the output
};

// Where a tile lies and what it attends to. A tile that sees no key has one block, all of it masked. `begin` and `end` are blocks,
// or entries of the list; of a part that got none they are equal, and its one block is masked, too.
struct Tile {
    int b, h, piece, m0, begin, end, full_begin, full_end, row, key_row;
    int start;  // the block, or entry, that comes first: others follow to the end, and then those from `begin` on
    const int* entries;  // BLOCK_LIST: of the tile
    int whole;  // BLOCK_LIST: the entries before this one are of blocks that nothing cuts
    int whole_begin, whole_end;  // KEY_MASK: other blocks that every query attends to, on the other side of what the mask leaves out

    __device__ __forceinline__ Tile(const Params& p, const Item& item) {
        // The tiles of `together` pieces follow each other, so that those that run at a time share K and V in L2, and so do
        // a head's pieces, which share K; of these tiles the last, under a causal mask the longest, come first.
        const int dealt = item.tile / (p.together * p.tiles_per_head) * p.together;  // pieces before these
        const int count = min(p.together, p.batch * p.heads * PIECES - dealt), number = item.tile - dealt * p.tiles_per_head;
        const int rank = number / count, bhp = dealt + number - rank * count, bh = bhp / PIECES;
        m0 = (p.tiles_per_head - 1 - rank) * BLOCK_M;
        piece = bhp - bh * PIECES;
        b = bh / p.heads;
        h = bh - b * p.heads;
        row = (h * p.q_blocks + b * ((p.q_len + 127) / 128)) * 128 + m0;
        key_row = (h / p.group * p.kv_blocks + b * p.kv_pitch) * 128;
        int first = 0, last = p.kv_len;  // keys that anybody may attend to
        int full_first = 0, full_last = p.kv_len;  // keys that every query of the tile attends to
        int whole_first = 0, whole_last = 0;
        if (KEY_MASK) {
            const int* used = p.used_keys + 5 * b;
            full_first = first = min(used[0], p.kv_len);
            full_last = last = used[1];
            if (used[2] == 0) {  // between are keys that nobody attends to: the longer side is the one that is not masked at all
                whole_first = first;
                whole_last = used[3];
                full_first = used[4];
                if (full_last - full_first < whole_last - whole_first) {
                    whole_first = full_first;
                    full_first = first;
                    whole_last = last;
                    full_last = used[3];
                }
            }
        }
        const int last_row = min(m0 + BLOCK_M, p.q_len) - 1;
        if (HAS_HIGH) {
            last = min(last, max(last_row + p.high + 1, 0));
            full_last = min(full_last, max(m0 + p.high + 1, 0));
            whole_last = min(whole_last, max(m0 + p.high + 1, 0));
        }
        if (HAS_LOW) {
            first = max(first, m0 + p.low);
            full_first = max(full_first, last_row + p.low);
            whole_first = max(whole_first, last_row + p.low);
        }
        whole_begin = (whole_first + BLOCK_N - 1) / BLOCK_N;
        whole_end = whole_last / BLOCK_N;
        begin = min(first, p.kv_len - 1) / BLOCK_N;
        end = max((last + BLOCK_N - 1) / BLOCK_N, begin + 1);
        full_begin = min(max((full_first + BLOCK_N - 1) / BLOCK_N, begin), end);
        full_end = min(max(full_last / BLOCK_N, full_begin), end);
#if BLOCK_LIST
        // A part has as large a share of the list as it would have of all blocks.
        const int blocks = (p.kv_len + BLOCK_N - 1) / BLOCK_N;
        entries = p.block_list + b * p.list_b + h * p.list_h + (long long)(m0 / BLOCK_M) * (2 + blocks);
        const int listed = *entries++;
        whole = *entries++;
        const bool all = !SPLIT || item.count == 0;
        begin = all ? 0 : (int)((long long)item.first * listed / blocks);
        end = all ? listed : (int)((long long)(item.first + item.count) * listed / blocks);
        if (begin == end) full_begin = full_end = whole_begin = whole_end = 0;
#else
        entries = nullptr;
        whole = 0;
        if (SPLIT && item.count > 0) { begin += item.first; end = begin + item.count; }
#endif
        start = begin;
        if (ROTATED && max(full_begin, begin + 1) < end) start = max(full_begin, begin + 1);
    }
};

#if SEGMENTS
__device__ __forceinline__ const int* query_ids(const Params& p, int b) { return p.q_ids + b * ((p.q_len + 63) / 64 * 64); }
__device__ __forceinline__ const int* key_ids(const Params& p, int b) {
    return p.k_ids + b * ((p.kv_len + BLOCK_N - 1) / BLOCK_N * BLOCK_N);
}
// Into the L1 cache, which the warpgroups read them from. A line holds 32.
__device__ __forceinline__ void prefetch_ids(const int* ids, int count) {
    for (int n = 0; n < count; n += 32) prefetch((const float*)(ids + n));
}
#endif

// The items of one program, in order: the whole tile of its number, then the next that nobody has taken while there are
// any, then its share of the blocks of the other tiles.
struct Schedule {
    int next, unit, last_unit;
    bool shared;  // what comes next is not the first of its share

    __device__ __forceinline__ Schedule(const Params& p)
        : next(blockIdx.x), unit(0), last_unit(0), shared(false) {
        if (SPLIT) {
            unit = (int)((long long)p.units * blockIdx.x / p.grid);
            last_unit = (int)((long long)p.units * (blockIdx.x + 1) / p.grid);
        }
    }
    __device__ __forceinline__ Item take(const Params& p) {
        if (next < p.whole) {
            const Item item = {next, 0, 0, -1};
            // Each program fails once, so that `whole` tickets in all are drawn and the last wraps around to zero.
            next = p.grid + (int)atomicInc(p.ticket, p.whole - 1);
            return item;
        }
        if (SPLIT && unit < last_unit) {
            const int blocks = (p.kv_len + BLOCK_N - 1) / BLOCK_N, tile = unit / blocks, first = unit - tile * blocks;
            const int count = min(blocks - first, last_unit - unit);
            const Item item = {p.whole + tile, first, count, count == blocks ? -1 : 2 * (int)blockIdx.x + shared};
            unit += count;
            shared = true;
            return item;
        }
        return {-1, 0, 0, -1};
    }
};

extern "C" __global__ void __launch_bounds__(128 * (CONSUMERS + 1), 1)
attention(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
          const __grid_constant__ TensorMap v_map, const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ __align__(8) u64 barriers[4 + 4 * STAGES + SKIP];  // last, votes
    __shared__ Item items[2];
    // Of V: scale and mean, and what the mean leaves of the first key. One of each is enough: a warp that is at the next has waited
    // for a product of the whole warpgroup, which every warp issues after it has read these.
    __shared__ __align__(16) float2 channels[CONSUMERS][V_HEAD_DIM];
    __shared__ __align__(8) float first_values[CONSUMERS][V_HEAD_DIM];
    // Every tile starts at a multiple of 1024 bytes, which swizzling asks for.
    constexpr int Q_TILE_BYTES = CONSUMERS * Q_BYTES, K_START = 2 * Q_TILE_BYTES, V_START = K_START + STAGES * K_BYTES;
    const u32 q_tiles = shared_address(shared), k_tiles = q_tiles + K_START, v_tiles = q_tiles + V_START;
    const u32 out_tiles = v_tiles + STAGES * V_BYTES;
    const u32 bars = shared_address(barriers);
    auto q_full = [&](int s) { return bars + 8 * s; };  // of Q and the item it belongs to
    auto q_empty = [&](int s) { return bars + 16 + 8 * s; };
    auto k_full = [&](int s) { return bars + 32 + 8 * s; };
    auto k_empty = [&](int s) { return bars + 32 + 8 * (STAGES + s); };
    auto v_full = [&](int s) { return bars + 32 + 8 * (2 * STAGES + s); };
    auto v_empty = [&](int s) { return bars + 32 + 8 * (3 * STAGES + s); };
    auto vote = [&](int w) { return bars + 32 + 8 * 4 * STAGES + 4 * w; };  // the last block that a warp of a warpgroup kept

    const int warpgroup = __shfl_sync(~0u, threadIdx.x >> 7, 0);  // uniform, which the compiler then knows
    if (threadIdx.x == 0) {
        for (int s = 0; s < 2; s++) {
            barrier_init(q_full(s), 1);
            barrier_init(q_empty(s), HANDED_OVER ? 2 * CONSUMERS : CONSUMERS);  // those that write read the item, too
        }
        for (int s = 0; s < STAGES; s++) {
            barrier_init(k_full(s), 1);
            barrier_init(v_full(s), 1);
            barrier_init(k_empty(s), CONSUMERS);
            barrier_init(v_empty(s), CONSUMERS);
        }
        asm volatile("griddepcontrol.wait;" ::: "memory");  // until all is quantised: this kernel starts before
    }
    if (ONES)
        for (int i = threadIdx.x; i < STAGES * V_SPANS * 256; i += blockDim.x) {
            const u32 one = PV == 0 ? 0x38383838u : PV == 2 ? 0x3F803F80u : 0x3C003C00u;
            const int span = i >> 8, word = i & 255;  // 8 rows of 32 words, the first of ones
            *(u32*)(shared + V_START + span * V_SPAN_BYTES + V_HEAD_DIM * 128 + 4 * word) =
                word < 32 ? one : 0u;
        }
    asm volatile("fence.proxy.async;" ::: "memory");
    __syncthreads();

    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");  // in all no more than the launch has
        if (threadIdx.x == 0) {
            Schedule schedule(p);
            int stage = 0, q_stage = 0;
            u32 phase = 1, q_phase = 1;
            while (true) {
                const Item item = schedule.take(p);
                barrier_wait(q_empty(q_stage), q_phase);
                items[q_stage] = item;
                if (item.tile < 0) {
                    barrier_arrive(q_full(q_stage));
                    break;
                }
                const Tile t(p, item);
                barrier_expect(q_full(q_stage), Q_TILE_BYTES);
                for (int w = 0; w < CONSUMERS; w++)
                    for (int s = 0; s < SPANS; s++)
                        load_tile(q_tiles + q_stage * Q_TILE_BYTES + w * Q_BYTES + s * Q_SPAN_BYTES, &q_map, q_full(q_stage),
                                  s * SPAN_BYTES, t.row + 64 * w);
                q_stage ^= 1;
                if (q_stage == 0) q_phase ^= 1;
                const int v_row = (t.h / p.group * PIECES + t.piece) * V_HEAD_DIM, v_column = t.b * p.kv_pitch * 128;
#if SEGMENTS
                prefetch_ids(query_ids(p, t.b) + t.m0, min(BLOCK_M, p.q_len - t.m0));
                prefetch_ids((const int*)(p.q_bounds + t.b * ((p.q_len + 63) / 64 * 64) + t.m0), 2 * min(BLOCK_M, p.q_len - t.m0));
#endif
                int after = BLOCK_LIST ? load_entry(t.entries + t.begin) : 0;  // one entry ahead, as it is not waited for then
                for (int n = t.begin; n < t.end || (BLOCK_LIST && n == t.begin); n++) {
                    int i = BLOCK_LIST ? after >> 1 : n;
                    if (ROTATED && (i += t.start - t.begin) >= t.end) i -= t.end - t.begin;
#if SEGMENTS
                    if (after & 1) prefetch_ids(key_ids(p, t.b) + i * BLOCK_N, BLOCK_N);
#endif
                    if (BLOCK_LIST) after = load_entry(t.entries + n + 1);
                    barrier_wait(k_empty(stage), phase);
                    barrier_expect(k_full(stage), K_BYTES);
                    for (int s = 0; s < SPANS; s++)
                        load_tile(k_tiles + stage * K_BYTES + s * K_SPAN_BYTES, &k_map, k_full(stage), s * SPAN_BYTES,
                                  t.key_row + i * BLOCK_N);
                    barrier_wait(v_empty(stage), phase);
                    barrier_expect(v_full(stage), V_SPANS * V_HEAD_DIM * 128);
                    for (int w = 0; w < V_SPANS; w++)
                        load_tile(v_tiles + stage * V_BYTES + w * V_SPAN_BYTES, &v_map, v_full(stage),
                                  v_column + i * BLOCK_N + w * 64, v_row);
                    if (++stage == STAGES) { stage = 0; phase ^= 1; }
                }
            }
        }
        const int c = (threadIdx.x >> 5) - 1, lane = threadIdx.x & 31;
        if (HANDED_OVER && c >= 0 && c < CONSUMERS) {  // these warps write
            int q_stage = 0;
            u32 q_phase = 0;
            while (true) {
                barrier_wait(q_full(q_stage), q_phase);
                const Item item = items[q_stage];
                __syncwarp();
                if (lane == 0) barrier_arrive(q_empty(q_stage));
                __syncwarp();  // whole again, as named barriers want it
                if (item.tile < 0) break;
                q_stage ^= 1;
                if (q_stage == 0) q_phase ^= 1;
                if (SPLIT && item.part >= 0) continue;  // `combine` does
                const Tile t(p, item);
                const int row = t.m0 + c * 64, column = t.piece * V_HEAD_DIM;
                unsigned short* const out = (unsigned short*)p.out + t.b * p.out_b + t.h * p.out_h + row * p.out_m + column;
                named_barrier_arrive(STRIPE_EMPTY + c, 160);
                named_barrier(STRIPE_FULL + c, 160);
                write_stripe(out, p.out_m, p.wide, out_tiles + c * 64 * OUT_PITCH, lane, p.q_len - row, p.v_dim - column);
                __syncwarp();
            }
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMERS == 3 ? 160 : 240));
    const int consumer = warpgroup - 1, thread = threadIdx.x & 127, lane = thread & 31, quad = lane & 3;
    const bool leader = __shfl_sync(~0u, thread == 0, lane);  // in a register: the compiler would look at threadIdx each time
    const int row_in_tile = consumer * 64 + (thread >> 5) * 16 + (lane >> 2);

    int scores[NS];
    Product product[NT];
    float output[NOUT];
    u32 accumulators[NSHARED];           // SHARED_REGISTERS: the bits of the scores, then of the product
    u32 weights[NW];
    u32 w0[RAW], w1[RAW];                // what becomes of the scores, for `weights`
    Rows rows;
    float factor0 = 0.f, factor1 = 0.f;  // PV == 1: of the product in flight
    float next_factor0 = 0.f, next_factor1 = 0.f;
    float v_unit = 0.f;                  // log2 of the unit of `product`
    int summed = 0;                      // blocks in `product`, and GROWN more where it has still to be multiplied by alpha0, alpha1,
    volatile float alpha0, alpha1;       // which lie in memory, because they would take registers of all blocks
    int stage = 0, k_stage = 0;          // of the block at hand, and of the K tile that is next to be multiplied
    u32 phase = 0, k_phase = 0;
    int q_stage = 0;
    u32 q_phase = 0;
    u64 q_matrix;                        // Q of the tile, in shared memory
    u32 q_words[Q_IN_REGISTERS ? HEAD_DIM / 8 : 1];  // or the same as an operand

    auto advance = [&](int& s, u32& ph) {
        if (++s == STAGES) { s = 0; ph ^= 1; }
    };
    // From the Q and the item that have come to `q_stage`.
    auto take_q = [&]() {
        const u32 tile = q_tiles + q_stage * Q_TILE_BYTES + consumer * Q_BYTES;
        q_matrix = matrix<SPAN_BYTES>(tile);
        if constexpr (Q_IN_REGISTERS) {
            const u32 row = row_in_tile - consumer * 64;
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; j++) {
                // Fours of them: bytes 0-15 of 32 of both rows, then bytes 16-31. Swizzling adds bits of the row to those of the column.
                const u32 byte = 32 * (j / 4) + 8 * (j & 2) + 4 * quad, at = (row + 8 * (j & 1)) * SPAN_BYTES + byte % SPAN_BYTES;
                asm volatile("ld.shared.b32 %0, [%1];" : "=r"(q_words[j])
                             : "r"(tile + byte / SPAN_BYTES * Q_SPAN_BYTES + (at ^ ((at >> 7) & (SPAN_BYTES / 16 - 1)) << 4)) : "memory");
            }
        }
    };
    auto multiply_qk = [&]() {
        constexpr int STEPS = SPAN_BYTES / 32;  // of 32 bytes of k; matrices count in 16
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 32; k++) {
            const u64 q = q_matrix + k / STEPS * (Q_SPAN_BYTES / 16) + 2 * (k % STEPS);
            const u64 key = matrix<SPAN_BYTES>(k_tiles + k_stage * K_BYTES) + k / STEPS * (K_SPAN_BYTES / 16) + 2 * (k % STEPS);
            if constexpr (Q_IN_REGISTERS) wgmma_qk(scores, q_words + 4 * k, key, k > 0);
            else if constexpr (SHARED_REGISTERS) wgmma_qk(accumulators, q, key, k > 0);
            else wgmma_qk(scores, q, key, k > 0);
        }
        wgmma_commit();
    };
    // product (+)= P V, with P in registers.
    auto multiply_pv = [&](bool accumulate) {
#pragma unroll
        for (int k = 0; k < NW / 4; k++) {
            const u64 v = matrix<128>(v_tiles + stage * V_BYTES + (k / 4) * V_SPAN_BYTES) + 2 * (k % 4);
            if constexpr (SHARED_REGISTERS) wgmma_pv(accumulators, weights + 4 * k, v, k > 0 || accumulate);
            else wgmma_pv(product, weights + 4 * k, v, k > 0 || accumulate);
        }
        wgmma_commit();
    };
    auto row_maximum = [&](int& x) {
        x = max(x, __shfl_xor_sync(~0u, x, 1));
        x = max(x, __shfl_xor_sync(~0u, x, 2));
    };
    // Of a larger reference maximum for some row of the warp: the product, which is complete.
    auto rescale_product = [&](float alpha0, float alpha1) {
#pragma unroll
        for (int j = 0; j < NT; j++) product[j] *= (j & 2) ? alpha1 : alpha0;
    };
    // The largest score of each row among this thread's; masked ones are the least integer.
    auto thread_maximum = [&](int& x0, int& x1) {
        x0 = max(scores[0], scores[1]);
        x1 = max(scores[2], scores[3]);
#pragma unroll
        for (int j = 4; j < NS; j += 4) {
            x0 = max(max(x0, scores[j]), scores[j + 1]);
            x1 = max(max(x1, scores[j + 2]), scores[j + 3]);
        }
        if (PV == 1 && !SKIP) { row_maximum(x0); row_maximum(x1); }
    };
    // P of the block, for take_weights. PV == 1 rounds it against the block's own maximum.
    auto weigh = [&](int x0, int x1, float scale0, float scale1, float unit, bool masked, bool none0, bool none1) {
        float shift0 = P_EXPONENT - rows.maximum0, shift1 = P_EXPONENT - rows.maximum1;
        float e0 = 0.f, e1 = 0.f;
        if (PV == 1) {
            e0 = x0 == MASKED_SCORE ? LOWEST : (float)x0 * scale0;
            e1 = x1 == MASKED_SCORE ? LOWEST : (float)x1 * scale1;
            // An ulp less, so that no weight rounds to 256, which would wrap around.
            shift0 = LOG2_255 - e0 - fminf(fabsf(e0), 1.0e6f) * 1.2e-7f;
            shift1 = LOG2_255 - e1 - fminf(fabsf(e1), 1.0e6f) * 1.2e-7f;
        }
        if (none0) shift0 = LOWEST;
        if (none1) shift1 = LOWEST;
#pragma unroll
        for (int g = 0; g < 8; g++) {
            float x[8];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int score = scores[8 * g + j];
                x[j] = exp2_approx(fmaf((float)score, (j & 2) ? scale1 : scale0, (j & 2) ? shift1 : shift0));
                // Where the scales are tiny, the least integer alone does not make a weight zero.
                if (masked && score == MASKED_SCORE) x[j] = 0.f;
            }
            if (g < EARLY) {
                w0[g] = PV == 0 ? to_e4m3(x[0], x[1], x[4], x[5]) : to_u8(x[0], x[1], x[4], x[5]);
                w1[g] = PV == 0 ? to_e4m3(x[2], x[3], x[6], x[7]) : to_u8(x[2], x[3], x[6], x[7]);
            } else {
#pragma unroll
                for (int j = 0; j < 8; j++)
                    ((j & 2) ? w1 : w0)[(EARLY + 4 * (g - EARLY) + (j & 1) + (j >> 2) * 2) % RAW] = __float_as_uint(x[j]);
            }
        }
        if (PV == 1) {
            int n0 = 0, n1 = 0;
#pragma unroll
            for (int g = 0; g < RAW; g++) {
                n0 = __dp4a(w0[g], 0x01010101u, (u32)n0);
                n1 = __dp4a(w1[g], 0x01010101u, (u32)n1);
            }
            next_factor0 = exp2_approx(e0 - rows.maximum0);
            next_factor1 = exp2_approx(e1 - rows.maximum1);
            rows.sum0 = fmaf((float)n0, next_factor0, rows.sum0);
            rows.sum1 = fmaf((float)n1, next_factor1, rows.sum1);
            unit = exp2_approx(unit);
            next_factor0 *= unit;
            next_factor1 *= unit;
        }
    };
    // The product in flight, of the block whose V tile is in `v_stage`, is complete; `unit` is that of the next block.
    auto complete = [&](int v_stage, float unit) {
        if (SKIP) barrier_arrive_if(leader && v_stage >= 0, v_empty(v_stage));
        else if (leader) barrier_arrive(v_empty(v_stage));
        summed++;
        if (PV != 1 && !IN_TURN && summed >= GROWN) {
            summed -= GROWN;
            rescale_product(alpha0, alpha1);
        }
        if (PV == 1 || (TWO_LEVELS && (summed == PROMOTE || unit != v_unit))) {
            const float f = TWO_LEVELS ? exp2_approx(v_unit) : 1.f;
            const float f0 = TWO_LEVELS ? f : factor0, f1 = TWO_LEVELS ? f : factor1;
#pragma unroll
            for (int j = 0; j < NOUT; j++) {  // the row sum has no unit
                const float x = SHARED_REGISTERS ? (float)(int)accumulators[j % NSHARED] : (float)product[j];
                output[j] = fmaf(x, j >= NO ? 1.f : (j & 2) ? f1 : f0, output[j]);
            }
            summed = 0;
        }
        v_unit = unit;
    };
    auto take_weights = [&]() {
        factor0 = next_factor0;
        factor1 = next_factor1;
        if (IN_TURN) {
#pragma unroll
            for (int j = 0; j < NW / 2; j++) {
                const int at = 4 * (j / 2) + 2 * (j % 2), from = PV == 1 ? j : 2 * j, after = PV == 1 ? j : 2 * j + 1;
                weights[at] = PV == 1 ? w0[from] : to_16_bits(__uint_as_float(w0[from]), __uint_as_float(w0[after]));
                weights[at + 1] = PV == 1 ? w1[from] : to_16_bits(__uint_as_float(w1[from]), __uint_as_float(w1[after]));
            }
            return;
        }
        // Not before the last product is complete, whose operand this is. It must be more than a move: ptxas merges
        // the source of a move with its target, which is then written while the tensor cores read it.
#pragma unroll
        for (int j = 0; j < NW / 2; j++) {
            // Operand registers come in fours: keys 0-15 of row 0, of row 1, keys 16-31 of both (of half as many in 16 bits).
            const int at = 4 * (j / 2) + 2 * (j % 2);
            if (PV < 2 && j >= EARLY) {
                const u32* const x0 = w0 + EARLY + 4 * (j - EARLY), * const x1 = w1 + EARLY + 4 * (j - EARLY);
                weights[at] = to_e4m3_here(x0[0], x0[1], x0[2], x0[3]);
                weights[at + 1] = to_e4m3_here(x1[0], x1[1], x1[2], x1[3]);
            } else if (PV < 2) {
                asm volatile("xor.b32 %0, %1, %2;" : "=r"(weights[at]) : "r"(w0[j]), "r"(p.zero) : "memory");
                asm volatile("xor.b32 %0, %1, %2;" : "=r"(weights[at + 1]) : "r"(w1[j]), "r"(p.zero) : "memory");
            } else if (PV == 2) {
                asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(weights[at]) : "f"(__uint_as_float(w0[2 * j + 1])), "f"(__uint_as_float(w0[2 * j])) : "memory");
                asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(weights[at + 1]) : "f"(__uint_as_float(w1[2 * j + 1])), "f"(__uint_as_float(w1[2 * j])) : "memory");
            } else {
                asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(weights[at]) : "f"(__uint_as_float(w0[2 * j + 1])), "f"(__uint_as_float(w0[2 * j])) : "memory");
                asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(weights[at + 1]) : "f"(__uint_as_float(w1[2 * j + 1])), "f"(__uint_as_float(w1[2 * j])) : "memory");
            }
        }
    };

    barrier_wait(q_full(0), 0);
    Item item = items[0];
    Tile t(p, item);
    int part = item.part;
    const float *k_scale, *v_scale;
    float k_next, v_next;  // scales of the block whose scores come next
#if BLOCK_LIST
    int entry, entry_after;  // that of the block, and of the one behind it: nothing waits for it then, but what it leads to
#endif
    // This thread's columns of block i that lie before `column`, any integer: bits 0 to 2 j + e of a row.
    auto before = [&](int column, int i) {
        const int start = i * BLOCK_N, own = max(max(column, start) - start - 2 * quad, 0), count = (own >> 3) * 2 + min(own & 7, 2);
        return count >= 32 ? ~0u : (1u << count) - 1;
    };
#if BITS
    u32 bits0 = 0, bits1 = 0;  // of the thread's two rows, what they see of the block: bit 2 j + e is column 8 j + 2 quad + e
#endif
#if MASK_BITS
    const u32* mask_bits;  // this thread's, in block 0
    // Of whole blocks there are none to load. Those of others come from the L2 cache or from further away: a softmax is between
    // their load and their use.
    auto load_bits = [&](int of) {
        const u32* const at = mask_bits + (of >> 1) * BITS_WORDS;
        load_if(of & 1, bits0, at);
        load_if(of & 1, bits1, at + 32);
    };
#endif
#if SEGMENTS
    // The bits of block i, of which some query sees a part, by its ids. While its scores are computed: no id is kept in a register, and
    // only few are read at a time.
    auto compare_ids = [&](int i) {
        const int* const q_ids = query_ids(p, t.b);
        const int row0 = t.m0 + row_in_tile;
        const int own0 = q_ids[min(row0, p.q_len - 1)], own1 = q_ids[min(row0 + 8, p.q_len - 1)];
        const int2* const ids = (const int2*)(key_ids(p, t.b) + i * BLOCK_N) + quad;
#pragma unroll 1
        for (int columns = BLOCK_N - 32; columns >= 0; columns -= 32) {
            u32 found0 = 0, found1 = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int2 id = ids[columns / 2 + 4 * j];
                if (id.x == own0) found0 |= 1u << (2 * j);
                if (id.y == own0) found0 |= 2u << (2 * j);
                if (id.x == own1) found1 |= 1u << (2 * j);
                if (id.y == own1) found1 |= 2u << (2 * j);
            }
            bits0 = bits0 << 8 | found0;
            bits1 = bits1 << 8 | found1;
        }
    };
    bool by_bounds = false;  // the bits come from bounds of rows, and have causality and the window in them, too
    // Where the keys of all the warp's ids lie together, first and last say all; else ids are compared.
    auto find_bits = [&](int i) {
        const int2* const bounds = p.q_bounds + t.b * ((p.q_len + 63) / 64 * 64);
        const int row0 = t.m0 + row_in_tile, row1 = row0 + 8;
        int2 seen0 = bounds[min(row0, p.q_len - 1)], seen1 = bounds[min(row1, p.q_len - 1)];
        by_bounds = !__any_sync(~0u, seen0.x < 0 || seen1.x < 0);
        if (!by_bounds) {
            compare_ids(i);
            return;
        }
        if (HAS_LOW) { seen0.x = max(seen0.x, row0 + p.low); seen1.x = max(seen1.x, row1 + p.low); }
        if (HAS_HIGH) { seen0.y = min(seen0.y, row0 + p.high + 1); seen1.y = min(seen1.y, row1 + p.high + 1); }
        bits0 = before(seen0.y, i) & ~before(seen0.x, i);
        bits1 = before(seen1.y, i) & ~before(seen1.x, i);
    };
#endif
    auto load_block_scales = [&](int i) {
#if BLOCK_LIST
        entry = entry_after;
        entry_after = load_entry(t.entries + i + 1);
        i = entry >> 1;
#endif
        k_next = k_scale[i];
        v_next = v_scale[i];
#if SEGMENTS
        if (__any_sync(~0u, entry & 1)) find_bits(i);
#endif
    };
    auto load_scales = [&]() {
        const float* const q_scale = p.q_scale + t.row;
        rows.scale0 = q_scale[min(row_in_tile, p.q_len - 1 - t.m0)];
        rows.scale1 = q_scale[min(row_in_tile + 8, p.q_len - 1 - t.m0)];
        k_scale = p.k_scale + t.key_row / 128;
        v_scale = p.v_scale + t.key_row / 128;
#if MASK_BITS
        // A warp's 8 rows of 4 words are as many words as it has threads. Behind the last query the last stripe does as well.
        const int blocks = (p.kv_len + BLOCK_N - 1) / BLOCK_N, stripe = min(t.m0 / 64 + consumer, (p.q_len - 1) / 64);
        mask_bits = p.mask_bits + t.b * p.bits_b + t.h * p.bits_h + (long long)stripe * blocks * BITS_WORDS
                    + (thread >> 5) * 64 + lane;
#endif
#if BLOCK_LIST
        entry_after = load_entry(t.entries + t.begin);
#endif
        load_block_scales(t.start);
#if MASK_BITS
        load_bits(entry);
#endif
    };
    take_q();
#pragma unroll
    for (int j = 0; j < NT; j++) product[j] = 0;
#pragma unroll
    for (int j = 0; j < NSHARED; j++) accumulators[j] = 0;
    load_scales();
    barrier_wait(k_full(0), 0);
    wgmma_fence();
    multiply_qk();
    wgmma_wait<0>();
    if (leader) barrier_arrive(k_empty(0));
    advance(k_stage, k_phase);
    int previous = NOTHING;  // the stage of the V tile that the product in flight reads
    u32 ballot = 0;          // SKIP: the number of the block that is voted on
    if (SKIP) {
        store_shared(vote(consumer), ballot);
        named_barrier(1 + consumer, 128);
    }

    // Normalises and writes the tile; its last product is complete. `channel` is this thread's of V: scale and mean, and
    // `first_value` what the mean leaves of the first key.
    auto write = [&](float2 channel, float first_value) {
        if (PV < 2) {
            if (thread < V_HEAD_DIM) {
                channels[consumer][thread] = channel;
                first_values[consumer][thread] = first_value;
            }
            named_barrier(1 + consumer, 128);
        }
        float sums[NT];
        if (PV == 1) {
            rows.sum0 += __shfl_xor_sync(~0u, rows.sum0, 1);
            rows.sum0 += __shfl_xor_sync(~0u, rows.sum0, 2);
            rows.sum1 += __shfl_xor_sync(~0u, rows.sum1, 1);
            rows.sum1 += __shfl_xor_sync(~0u, rows.sum1, 2);
#pragma unroll
            for (int j = 0; j < NO; j++) sums[j] = output[j % NOUT];
        } else {
            const float one = summed > 0 ? 1.f : 0.f, unit = TWO_LEVELS ? one * exp2_approx(v_unit) : 1.f;
#pragma unroll
            for (int j = 0; j < NT; j++) {
                const float last = SKIP && summed == 0 ? 0.f : (float)product[j];  // of another tile where all was left out
                sums[j] = TWO_LEVELS ? fmaf(last, j >= NO ? one : unit, output[j % NOUT]) : last;
            }
            rows.sum0 = __shfl_sync(~0u, sums[NT - 4], lane & ~3);
            rows.sum1 = __shfl_sync(~0u, sums[NT - 2], lane & ~3);
        }
        float first_weight0 = 0.f, first_weight1 = 0.f, others0 = 1.f, others1 = 1.f;
        if (FIRST_APART) {  // joins the others at the larger of the two maxima
            const float maximum0 = fmaxf(rows.maximum0, rows.first0), maximum1 = fmaxf(rows.maximum1, rows.first1);
            const float exponent = PV == 1 ? LOG2_255 : P_EXPONENT;
            first_weight0 = exp2_approx(rows.first0 - maximum0 + exponent);
            first_weight1 = exp2_approx(rows.first1 - maximum1 + exponent);
            others0 = exp2_approx(rows.maximum0 - maximum0);
            others1 = exp2_approx(rows.maximum1 - maximum1);
            rows.sum0 = fmaf(rows.sum0, others0, first_weight0);
            rows.sum1 = fmaf(rows.sum1, others1, first_weight1);
            rows.maximum0 = maximum0;
            rows.maximum1 = maximum1;
        }
        const bool empty0 = MAY_BE_EMPTY && rows.sum0 == 0.f, empty1 = MAY_BE_EMPTY && rows.sum1 == 0.f;
        float inverse0 = empty0 ? 0.f : reciprocal(rows.sum0), inverse1 = empty1 ? 0.f : reciprocal(rows.sum1);
        if (FIRST_APART) {
            first_weight0 *= inverse0;
            first_weight1 *= inverse1;
            inverse0 *= others0;
            inverse1 *= others1;
        }
        // Whatever its value is, it does not show where the key is not seen.
        const bool unseen0 = MAY_BE_EMPTY && first_weight0 == 0.f, unseen1 = MAY_BE_EMPTY && first_weight1 == 0.f;
#pragma unroll
        for (int j = 0; j < V_HEAD_DIM / 8; j++) {
            float4 c = make_float4(1.f, 0.f, 1.f, 0.f);
            if (PV < 2) c = *(const float4*)&channels[consumer][8 * j + 2 * quad];
            sums[4 * j] = fmaf(sums[4 * j] * inverse0, c.x, empty0 ? 0.f : c.y);
            sums[4 * j + 1] = fmaf(sums[4 * j + 1] * inverse0, c.z, empty0 ? 0.f : c.w);
            sums[4 * j + 2] = fmaf(sums[4 * j + 2] * inverse1, c.x, empty1 ? 0.f : c.y);
            sums[4 * j + 3] = fmaf(sums[4 * j + 3] * inverse1, c.z, empty1 ? 0.f : c.w);
            if (FIRST_APART) {
                const float2 first = *(const float2*)&first_values[consumer][8 * j + 2 * quad];
                sums[4 * j] = fmaf(first_weight0, unseen0 ? 0.f : first.x, sums[4 * j]);
                sums[4 * j + 1] = fmaf(first_weight0, unseen0 ? 0.f : first.y, sums[4 * j + 1]);
                sums[4 * j + 2] = fmaf(first_weight1, unseen1 ? 0.f : first.x, sums[4 * j + 2]);
                sums[4 * j + 3] = fmaf(first_weight1, unseen1 ? 0.f : first.y, sums[4 * j + 3]);
            }
        }
        const int row0 = t.m0 + row_in_tile, row1 = row0 + 8;
        const int v_dim = p.v_dim - t.piece * V_HEAD_DIM;  // channels left
        const long long at = t.b * p.out_b + t.h * p.out_h + t.piece * V_HEAD_DIM;
        if (SPLIT && part >= 0) {
            float* const target = p.parts + (long long)(part * BLOCK_M + row_in_tile) * V_HEAD_DIM + 2 * quad;
#pragma unroll
            for (int j = 0; j < V_HEAD_DIM / 8; j++) {
                *(float2*)(target + 8 * j) = make_float2(sums[4 * j], sums[4 * j + 1]);
                *(float2*)(target + 8 * V_HEAD_DIM + 8 * j) = make_float2(sums[4 * j + 2], sums[4 * j + 3]);
            }
        } else if (OUT == 2) {
            float* const target = (float*)p.out + at + row0 * p.out_m + 2 * quad;
#pragma unroll
            for (int j = 0; j < V_HEAD_DIM / 8; j++)
                if (8 * j < v_dim) {
                    if (row0 < p.q_len) *(float2*)(target + 8 * j) = make_float2(sums[4 * j], sums[4 * j + 1]);
                    if (row1 < p.q_len) *(float2*)(target + 8 * p.out_m + 8 * j) = make_float2(sums[4 * j + 2], sums[4 * j + 3]);
                }
        } else {
            // To shared memory, where each warp has its 16 rows, so that rows are written and not pieces of eight. If there is
            // room for all of them another warp goes on from there, while this one is at the next tile.
            const int first = row_in_tile - (lane >> 2);
            const u32 staged = out_tiles + first * OUT_PITCH;
#pragma unroll
            for (int c = 0; c < V_HEAD_DIM; c += OUT_COLUMNS) {
                if (HANDED_OVER) named_barrier(STRIPE_EMPTY + consumer, 160);
                else __syncwarp();
#pragma unroll
                for (int j = 0; j < OUT_COLUMNS / 8; j++) {
                    const u32 to = staged + (lane >> 2) * OUT_PITCH + 16 * j + 4 * quad;
                    const float* const x = sums + c / 2 + 4 * j;
                    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(to_output(x[0], x[1])) : "memory");
                    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + 8 * OUT_PITCH), "r"(to_output(x[2], x[3])) : "memory");
                }
                if (HANDED_OVER) {
                    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // bulk copies will read it
                    named_barrier_arrive(STRIPE_FULL + consumer, 160);
                } else {
                    __syncwarp();
                    const int row = t.m0 + first;
                    unsigned short* const out = (unsigned short*)p.out + at + c;
                    if (p.wide) write_rows<uint4>(out + row * p.out_m, p.out_m, staged, lane, p.q_len - row, v_dim - c);
                    else write_rows<u32>(out + row * p.out_m, p.out_m, staged, lane, p.q_len - row, v_dim - c);
                }
            }
        }
        if ((RETURN_LSE || (SPLIT && part >= 0)) && quad == 0) {
            const float exponent = PV == 1 ? LOG2_255 : P_EXPONENT, none = __int_as_float(0xff800000);
            const float lse0 = empty0 ? none : rows.maximum0 + log2f(rows.sum0) - exponent;
            const float lse1 = empty1 ? none : rows.maximum1 + log2f(rows.sum1) - exponent;
            if (SPLIT && part >= 0) {
                p.part_lse[part * BLOCK_M + row_in_tile] = lse0;
                p.part_lse[part * BLOCK_M + row_in_tile + 8] = lse1;
            } else if (RETURN_LSE && t.piece == 0) {
                float* const lse = p.lse + t.b * p.lse_b + t.h * p.lse_h;
                const float* const shift = p.q_shift + t.row - t.m0;
                if (row0 < p.q_len) lse[row0] = lse0 * LN_2 + shift[row0];
                if (row1 < p.q_len) lse[row1] = lse1 * LN_2 + shift[row1];
            }
        }
    };
    // What the thread's two rows may see of block i, in bits as above, by the band and the mask over keys. A test and a selection for each
    // score would be some 440 instructions; bits are 110.
    auto see = [&](int i, u32& seen0, u32& seen1) {
        const int row0 = t.m0 + row_in_tile, row1 = row0 + 8;
        int keys = p.kv_len;
#if BLOCK_LIST
        if (t.begin == t.end) keys = 0;
#endif
        seen0 = before(HAS_HIGH ? min(keys, row0 + p.high + 1) : keys, i);
        seen1 = before(HAS_HIGH ? min(keys, row1 + p.high + 1) : keys, i);
        if (HAS_LOW) {
            seen0 &= ~before(row0 + p.low, i);
            seen1 &= ~before(row1 + p.low, i);
        }
        if (KEY_MASK) {
            const int* const used = p.used_keys + 5 * t.b;
            // Else the mask leaves the whole block, and the band alone cuts it.
            if (!used[2] || i * BLOCK_N < used[0] || (i + 1) * BLOCK_N > min(used[1], keys)) {
                const bool* const mask = p.key_mask + t.b * p.mask_b;
                u32 left = 0;
#pragma unroll 16  // all at once would take more registers than there are
                for (int j = 0; j < 32; j++) {
                    const int column = i * BLOCK_N + (j >> 1) * 8 + 2 * quad + (j & 1);
                    if (column < keys && mask[column * p.mask_n]) left |= 1u << j;
                }
                seen0 &= left;
                seen1 &= left;
            }
        }
    };
    // The scores without a bit become the least integer.
    auto hide = [&](u32 seen0, u32 seen1) {
#pragma unroll
        for (int j = 0; j < NS; j++)
            if (!(((j & 2) ? seen1 : seen0) & (1u << (j / 4 * 2 + j % 2)))) scores[j] = MASKED_SCORE;
    };
    // Takes the first key, of block 0, from the scores: each row's lies in the first thread of four.
    auto set_first_apart = [&](float scale0, float scale1) {
        const float unseen = __int_as_float(0xff800000);
        const float x0 = scores[0] == MASKED_SCORE ? unseen : (float)scores[0] * scale0;
        const float x1 = scores[2] == MASKED_SCORE ? unseen : (float)scores[2] * scale1;
        rows.first0 = __shfl_sync(~0u, x0, lane & ~3);
        rows.first1 = __shfl_sync(~0u, x1, lane & ~3);
        if (quad == 0) scores[0] = scores[2] = MASKED_SCORE;
    };
    // Keeps ptxas from moving arithmetic on the output behind products that come after it.
    auto hold_output = [&]() {
#pragma unroll
        for (int j = 0; j < NOUT; j++) asm volatile("" : "+f"(output[j]) :: "memory");
        if (p.zero) barrier_wait(q_empty(0), 0);  // never: but it is a branch
    };
#if SKIP
    // Whether this thread's part of block i counts. x0 and x1 are its largest scores: a row lies below the bound where its four
    // threads do, and needs no maximum for it. NaN counts. A row that sees no key of the block has no say, nor has one behind the
    // last query: its `largest` is infinite.
    auto counts = [&](int i, bool masked, int x0, int x1, float scale0, float scale1) {
        const float largest0 = FIRST_APART ? fmaxf(rows.largest0, rows.first0) : rows.largest0;
        const float largest1 = FIRST_APART ? fmaxf(rows.largest1, rows.first1) : rows.largest1;
        bool found0 = !((float)x0 * scale0 - largest0 < p.skip_bound);
        bool found1 = !((float)x1 * scale1 - largest1 < p.skip_bound);
        if (masked) {
            const bool on_diagonal = HAS_HIGH && i >= max(t.m0 + consumer * 64 + p.high + 1, 0) / BLOCK_N;
            found0 = x0 != MASKED_SCORE && (found0 || on_diagonal);
            found1 = x1 != MASKED_SCORE && (found1 || on_diagonal);
        }
        return found0 || found1 || (FIRST_APART && masked && i == 0);
    };
    // A product is of a whole warpgroup, so its warps agree: the block is kept if it counts for one of them. A warp that finds so
    // says it and goes on; only one for which the block does not count waits for the others and looks. One barrier and one word
    // are enough, because no warp is a vote ahead: before the next it has waited for a product of the whole warpgroup, which
    // every warp issues after it has looked. (K's tiles are let go by one thread of a warpgroup on the same ground.)
    auto say = [&](bool found) {
        ballot++;
        named_barrier_arrive_if(found, 1 + consumer, 128, vote(consumer), ballot);
    };
    auto others_found = [&]() {
        named_barrier(1 + consumer, 128);
        return (bool)__any_sync(~0u, load_shared(vote(consumer)) == ballot);  // the same in all, which the compiler then knows
    };
    // V comes behind K, also of a block that is left out: its tile is let go without a product. It is waited for before, so as not to
    // get ahead of the phases of its barrier: by the leading thread alone, because nothing holds it back until the other warps have
    // looked, as a product does.
    auto leave_out = [&]() {
        if (leader) {
            barrier_wait(v_full(stage), phase);
            barrier_arrive(v_empty(stage));
        }
        __syncwarp();
    };
#endif
    // From the scores of block i, or of the block of entry i, to P; the product of the block before is complete afterwards. With
    // SKIP, false where the block is left out: then nothing has been done, and that product goes on. `more`: it is not the tile's last.
    auto attend = [&](int i, bool masked, bool more) {
#if BLOCK_LIST
        i = entry >> 1;
#endif
        const float scale0 = rows.scale0 * k_next, scale1 = rows.scale1 * k_next, unit = v_next;
        if constexpr (SHARED_REGISTERS)
#pragma unroll
            for (int j = 0; j < NS; j++) scores[j] = (int)accumulators[j];
        bool cut = masked && (i < t.full_begin || i >= t.full_end) && !(KEY_MASK && i >= t.whole_begin && i < t.whole_end);
#if SEGMENTS
        if (!KEY_MASK && by_bounds && (entry & 1) && t.begin < t.end) cut = false;
#endif
#if BITS
        const bool by_bits = masked && __any_sync(~0u, entry & 1);
#else
        const bool by_bits = false;
#endif
        if (cut || by_bits) {
            u32 seen0 = ~0u, seen1 = ~0u;
            if (cut) see(i, seen0, seen1);
#if BITS
            if (by_bits) {
                seen0 &= bits0;
                seen1 &= bits1;
            }
#endif
            hide(seen0, seen1);
        }
        if (FIRST_APART && masked && i == 0) set_first_apart(scale0, scale1);
#if MASK_BITS
        if (more) load_bits(entry_after);
#endif
        int x0, x1;
        thread_maximum(x0, x1);
#if SKIP
        // Asked all together, so that one answer is not waited for before the next question; mostly there is only one branch. The
        // running maximum grows seldom; only then may the reference have to. It never lies more than HEADROOM below.
        const bool found = __any_sync(~0u, counts(i, masked, x0, x1, scale0, scale1));
        const bool grows = __any_sync(~0u, (float)x0 * scale0 > rows.largest0 || (float)x1 * scale1 > rows.largest1);
        bool slow = false;
        say(found);
        if (!found || grows) {
            if (!found && !others_found()) return false;
            if (grows) {
                row_maximum(x0);
                row_maximum(x1);
                if (x0 != MASKED_SCORE) rows.largest0 = fmaxf(rows.largest0, (float)x0 * scale0);
                if (x1 != MASKED_SCORE) rows.largest1 = fmaxf(rows.largest1, (float)x1 * scale1);
                slow = (float)x0 * scale0 > rows.maximum0 + HEADROOM || (float)x1 * scale1 > rows.maximum1 + HEADROOM;
                slow = __any_sync(~0u, slow);
            }
        }
        if (PV == 1) { row_maximum(x0); row_maximum(x1); }
#else
        bool slow = (float)x0 * scale0 > rows.maximum0 + HEADROOM || (float)x1 * scale1 > rows.maximum1 + HEADROOM;
        slow = __any_sync(~0u, slow);
#endif
        // The reference maximum follows the block's, what was summed is rescaled: `output` and what becomes of an INT8 product here, a product
        // in flight behind the wait that all warps of the warpgroup meet, because a warp may not wait for it alone.
        if (slow) {
            if (PV != 1 && !SKIP) { row_maximum(x0); row_maximum(x1); }
            float n0 = rows.maximum0, n1 = rows.maximum1;
            if (x0 != MASKED_SCORE) n0 = fmaxf(n0, (float)x0 * scale0);
            if (x1 != MASKED_SCORE) n1 = fmaxf(n1, (float)x1 * scale1);
            float a0, a1;
            auto take_factors = [&]() {
                a0 = exp2_approx(rows.maximum0 - n0);
                a1 = exp2_approx(rows.maximum1 - n1);
            };
            // Where this stands decides how ptxas orders the loop. Behind the branch FP8 takes up to 10% longer, in front of it 16 bits 2 to 5%.
            if (PV == 0) take_factors();
            if (!__all_sync(~0u, rows.maximum0 == LOWEST && rows.maximum1 == LOWEST)) {  // else nothing was summed
                if (PV != 0) take_factors();
                if (PV < 2) {
#pragma unroll
                    for (int j = 0; j < NOUT; j++) output[j] *= (j & 2) ? a1 : a0;
                }
                if (PV == 1) {
                    rows.sum0 *= a0;
                    rows.sum1 *= a1;
                    factor0 *= a0;
                    factor1 *= a1;
                } else if (IN_TURN) {
                    rescale_product(a0, a1);
                } else {
                    alpha0 = a0;
                    alpha1 = a1;
                    summed += GROWN;
                }
            }
            rows.maximum0 = n0;
            rows.maximum1 = n1;
        }
        // A masked score lies so far below the others that its weight is zero by itself, except where scales are tiny. That holds
        // beside a score that is not masked; a thread that has none of a row gives it a maximum of its own. Not for three warpgroups with
        // 16-bit weights: ptxas then orders their loop so that it takes 13% longer.
        if ((BITS || !(IN_TURN && PV >= 2)) && masked && !__any_sync(~0u, !(scale0 > LEAST_SCALE) || !(scale1 > LEAST_SCALE)))
            weigh(x0, x1, scale0, scale1, unit, false, x0 == MASKED_SCORE, x1 == MASKED_SCORE);
        else
            weigh(x0, x1, scale0, scale1, unit, masked, false, false);
        if (IN_TURN) {
            take_weights();
            return true;
        }
        // Keeps the arithmetic above before the wait, beside the product in flight.
#pragma unroll
        for (int j = 0; j < RAW; j++) asm volatile("" : "+r"(w0[j]), "+r"(w1[j]) :: "memory");
        if (p.zero) barrier_wait(q_empty(0), 0);  // never: but the branch keeps ptxas from moving the wait up
        wgmma_wait<0>();
        if (SKIP ? previous != NOTHING : previous >= 0) complete(previous, unit);
        take_weights();
#if SKIP
        // Keeps ptxas from moving the operands behind the next scores, which lie in the registers that they come from.
        if (p.zero) {  // never: but they would have to be there
#pragma unroll
            for (int j = 0; j < NW; j++) store_shared(bars, weights[j]);
        }
#endif
        return true;
    };

    while (true) {
        rows.maximum0 = rows.maximum1 = LOWEST;
        rows.sum0 = rows.sum1 = 0.f;
        rows.first0 = rows.first1 = __int_as_float(0xff800000);
#pragma unroll
        for (int j = 0; j < NOUT; j++) output[j] = 0.f;
        summed = 0;
        v_unit = v_next;
        previous = NOTHING;
        if (SKIP) {
            const float infinite = __int_as_float(0x7f800000);
            rows.largest0 = t.m0 + row_in_tile < p.q_len ? LOWEST : infinite;
            rows.largest1 = t.m0 + row_in_tile + 8 < p.q_len ? LOWEST : infinite;
        }
        int i = t.start;
        const int last = ROTATED && t.start > t.begin ? t.start - 1 : t.end - 1;
        if (!IN_TURN) {
            if (!SKIP) barrier_wait(v_full(stage), phase);
            if (t.begin + 1 < t.end) barrier_wait(k_full(k_stage), k_phase);
        }
        auto block_after = [&]() { return ROTATED && i + 1 >= t.end ? t.begin : i + 1; };
        // This block's product, then the next scores.
        auto go_on_in_turn = [&]() {
            barrier_wait(v_full(stage), phase);
            wgmma_fence();
            multiply_pv(PV != 1 && summed > 0);
            load_block_scales(block_after());
            barrier_wait(k_full(k_stage), k_phase);
            wgmma_wait<0>();
            if (SHARED_REGISTERS) {
                complete(stage, 0.f);
                hold_output();
            }
            wgmma_fence();
            multiply_qk();
            if (!SHARED_REGISTERS) complete(stage, 0.f);
            advance(stage, phase);
            wgmma_wait<0>();
            if (leader) barrier_arrive(k_empty(k_stage));
            advance(k_stage, k_phase);
        };
        // The next scores are computed, then this block's product, which goes on during the next softmax.
        auto go_on = [&]() {
            if (IN_TURN) {
                go_on_in_turn();
                return;
            }
            if (SKIP && previous < 0) barrier_wait(k_full(k_stage), k_phase);  // `go_on_without` has not waited for it
            wgmma_fence();
            multiply_qk();
            if (SKIP) {
                barrier_wait(v_full(stage), phase);  // not before: a block that is left out does not wait for it here
                wgmma_fence();
            }
            multiply_pv(PV != 1 && summed > 0);
            // Meanwhile, what the next round needs.
            previous = stage;
            const int done = k_stage;
            advance(stage, phase);
            advance(k_stage, k_phase);
            load_block_scales(block_after());
            if (!SKIP) barrier_wait(v_full(stage), phase);
            if (ROTATED ? block_after() != last : i + 2 < t.end) barrier_wait(k_full(k_stage), k_phase);
            wgmma_wait<1>();
            if (SKIP) barrier_arrive_if(leader, k_empty(done));
            else if (leader) barrier_arrive(k_empty(done));
        };
#if SKIP
        // The next scores only. They come behind the product in flight, which is then complete, too, and is added by the next block
        // that counts, because that knows in which unit. The K after is waited for when it is known what becomes of the next block:
        // tiles are not far ahead where blocks are left out.
        auto go_on_without = [&]() {
            if (previous < 0) barrier_wait(k_full(k_stage), k_phase);
            wgmma_fence();
            multiply_qk();
            load_block_scales(block_after());
            leave_out();
            advance(stage, phase);
            wgmma_wait<0>();
            barrier_arrive_if(leader && previous >= 0, v_empty(previous));
            previous = previous >= 0 ? HELD : previous;
            barrier_arrive_if(leader, k_empty(k_stage));
            advance(k_stage, k_phase);
        };
        auto step = [&](bool masked) {
            if (attend(i, masked, true)) go_on();
            else go_on_without();
        };
#else
        auto step = [&](bool masked) { attend(i, masked, true); go_on(); };
#endif
#if BLOCK_LIST
        for (const int whole = min(t.whole, last); i < whole; i++) step(false);
        for (; i < last; i++) step(true);
#else
        if (ROTATED) {
            if (i > t.begin)
                for (; i < t.full_end && i < t.end; i++) step(false);
            if (i >= t.end) i = t.begin;
            for (; i != last; i = block_after()) step(true);
        } else {
            if (HAS_LOW || KEY_MASK || FIRST_APART)
                for (const int whole = FIRST_APART ? max(t.full_begin, 1) : t.full_begin; i < whole && i < last; i++) step(true);
            for (; i < t.full_end && i < last; i++) step(false);
            for (; i < last; i++) step(true);
        }
#endif
        const bool last_counts = attend(i, true, false);
        if (IN_TURN) barrier_wait(v_full(stage), phase);

        // The last product, and the first scores of the next tile; if there is none, scores of old tiles, which do no harm.
        q_stage ^= 1;
        if (q_stage == 0) q_phase ^= 1;
        barrier_wait(q_full(q_stage), q_phase);
        item = items[q_stage];
        const bool more = item.tile >= 0;
        take_q();
        if (more) barrier_wait(k_full(k_stage), k_phase);
        wgmma_fence();
        if (!IN_TURN) multiply_qk();
        if (last_counts) {
            if (SKIP) {
                barrier_wait(v_full(stage), phase);
                wgmma_fence();
            }
            multiply_pv(PV != 1 && summed > 0);
        }
#if SKIP
        else leave_out();
#endif
        // What the end of this tile and the start of the next need is on its way meanwhile.
        float2 channel = make_float2(1.f, 0.f);
        float first_value = 0.f;
        if (PV < 2 && thread < V_HEAD_DIM) {
            constexpr int CHANNELS = PIECES * V_HEAD_DIM;
            const float* const of_head = p.v_channel + (long long)(t.b * (p.heads / p.group) + t.h / p.group) * 4 * CHANNELS
                                         + t.piece * V_HEAD_DIM;
            channel = make_float2(of_head[thread], of_head[2 * CHANNELS + thread]);
            first_value = of_head[3 * CHANNELS + thread];
        }
        const Tile next(p, {more ? item.tile : 0, item.first, item.count, item.part});
        prefetch(p.q_scale + next.row + row_in_tile);
        const int first_entry = BLOCK_LIST ? load_entry(next.entries + next.begin) : 0;
        auto prefetch_scales = [&](int first_block) {
            prefetch(p.k_scale + next.key_row / 128 + first_block);
            prefetch(p.v_scale + next.key_row / 128 + first_block);
        };
        if (!BLOCK_LIST) prefetch_scales(next.start);
        wgmma_wait<0>();
        if (BLOCK_LIST) prefetch_scales(first_entry >> 1);  // not before: the entry would be waited for
        const int of_product = last_counts ? stage : previous;
        if (!SKIP || of_product != NOTHING) complete(of_product, v_unit);
        if (IN_TURN) {
            hold_output();
            wgmma_fence();
            multiply_qk();
            wgmma_wait<0>();
        }
        if (leader) {
            if (more) barrier_arrive(k_empty(k_stage));
            barrier_arrive(q_empty(q_stage ^ 1));
        }
        advance(stage, phase);
        advance(k_stage, k_phase);
        write(channel, first_value);
        t = next;
        part = item.part;
        if (!more) break;
        load_scales();
    }
}

#if SPLIT
// Joins the parts of tile `whole` + blockIdx.x: their mean, weighted with exp(LSE). Rows go by blockIdx.y.
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS) combine(const __grid_constant__ Params p) {
    const int blocks = (p.kv_len + BLOCK_N - 1) / BLOCK_N, unit = blockIdx.x * blocks;
    auto program = [&](int u) { return (int)(((long long)(u + 1) * p.grid - 1) / p.units); };
    const int first = program(unit), last = program(unit + blocks - 1);
    if (first == last) return;  // computed in one go
    auto part = [&](int c) { return 2 * c + ((long long)p.units * c / p.grid < unit); };
    const Tile t(p, {p.whole + (int)blockIdx.x, 0, 0, -1});
    constexpr int LANES = V_HEAD_DIM / 4;
    for (int k = threadIdx.x; k < COMBINE_ROWS * LANES; k += COMBINE_THREADS) {
        const int row_in_tile = blockIdx.y * COMBINE_ROWS + k / LANES, d = 4 * (k % LANES), row = t.m0 + row_in_tile;
        if (row >= p.q_len) return;
        float maximum = __int_as_float(0xff800000);
        for (int c = first; c <= last; c++) maximum = fmaxf(maximum, p.part_lse[part(c) * BLOCK_M + row_in_tile]);
        float weight = 0.f;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int c = first; c <= last; c++) {
            const int at = part(c) * BLOCK_M + row_in_tile;
            const float lse = p.part_lse[at];
            const float w = lse == __int_as_float(0xff800000) ? 0.f : exp2f(lse - maximum);
            const float4 x = *(const float4*)(p.parts + (long long)at * V_HEAD_DIM + d);
            weight += w;
            sum.x = fmaf(w, x.x, sum.x);
            sum.y = fmaf(w, x.y, sum.y);
            sum.z = fmaf(w, x.z, sum.z);
            sum.w = fmaf(w, x.w, sum.w);
        }
        const float inverse = weight == 0.f ? 0.f : 1.f / weight;
        const long long at = t.b * p.out_b + t.h * p.out_h + row * p.out_m + t.piece * V_HEAD_DIM + d;
        if (d < p.v_dim - t.piece * V_HEAD_DIM) {  // multiples of 4
            if (OUT == 2) {
                *(float2*)((float*)p.out + at) = make_float2(sum.x * inverse, sum.y * inverse);
                *(float2*)((float*)p.out + at + 2) = make_float2(sum.z * inverse, sum.w * inverse);
            } else {
                *(u32*)((unsigned short*)p.out + at) = to_output(sum.x * inverse, sum.y * inverse);
                *(u32*)((unsigned short*)p.out + at + 2) = to_output(sum.z * inverse, sum.w * inverse);
            }
        }
        if (RETURN_LSE && d == 0 && t.piece == 0)
            p.lse[t.b * p.lse_b + t.h * p.lse_h + row] = (maximum + log2f(weight)) * LN_2 + p.q_shift[t.row - t.m0 + row];
    }
}
#endif
