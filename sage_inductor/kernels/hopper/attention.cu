// INT8 QK^T attention for Hopper (sm_90a): one warp brings Q, K and V by TMA; CONSUMERS warpgroups of 64 queries each
// multiply with wgmma and do the softmax. compile.py defines the macros and puts the wgmma wrappers (wgmma.py) in front.
// The workspace it reads is described in ../triton/quantize.py.
//
//   HEAD_DIM, V_HEAD_DIM   multiples of 32, up to 128
//   PV                     0: FP8 P and V; 1: INT8, P unsigned per block of 128 keys; 2: BF16; 3: FP16
//   OUT                    0: BF16, 1: FP16, 2: FP32
//   CONSUMERS, STAGES      warpgroups that compute; tiles of K and of V in flight
//   HAS_LOW, HAS_HIGH      query i sees keys from i + low, to i + high
//   KEY_MASK               a mask over keys, the same for every query
//   RETURN_LSE
//
// Scores and maxima are in units of log2. Sources: FlashAttention-3 (arXiv:2407.08608) for the division of labour and the
// product that goes on during the next softmax; SageAttention2 (arXiv:2411.10958) for the quantisation and the two levels
// of the FP8 sum; FlashAttention-4's reference maximum that follows only large steps. benchmarks/notes.md has what was tried.

typedef unsigned long long u64;
typedef unsigned int u32;

constexpr int BLOCK_N = 128;
constexpr int ROW_BYTES = HEAD_DIM <= 32 ? 32 : HEAD_DIM <= 64 ? 64 : 128;  // of Q and K in shared memory: one swizzle span
constexpr int V_ELEMENT = PV >= 2 ? 2 : 1;
constexpr bool TWO_LEVELS = PV == 0;       // FP8 products are added with few bits: a sum in the tensor core stays short
constexpr bool ONES = PV != 1;             // the row sum comes from a row of ones under V^T
constexpr int PROMOTE = 4;                 // blocks per tensor core sum
constexpr int V_ROWS = V_HEAD_DIM + (ONES ? 8 : 0);
constexpr int Q_BYTES = 64 * ROW_BYTES, K_BYTES = BLOCK_N * ROW_BYTES;
constexpr int V_SPANS = V_ELEMENT;         // spans of 128 bytes that hold 128 keys
constexpr int V_SPAN_BYTES = V_ROWS * 128, V_BYTES = V_SPANS * V_SPAN_BYTES;
constexpr int NS = BLOCK_N / 2, NT = V_ROWS / 2, NO = V_HEAD_DIM / 2;  // registers of S, of a product, of the output

// Largest P is 2^8: the row maximum may grow by 2^HEADROOM before the sums are rescaled.
constexpr float HEADROOM = PV == 0 ? 4.f : PV == 1 ? 24.f : 8.f;
constexpr float P_EXPONENT = PV == 0 ? 8.f - HEADROOM : 0.f;  // of P at the reference maximum
constexpr float LOG2_255 = 7.99435344f;
constexpr float LOWEST = -1.0e30f;
constexpr int MASKED_SCORE = -2147483647 - 1;

struct alignas(64) TensorMap { u64 opaque[16]; };

struct Params {
    const float* q_scale;    // [heads, q_blocks * 128], the softmax scale and log2(e) in it
    const float* q_shift;    // the same shape: what smoothing K took from the LSE
    const float* k_scale;    // [kv_heads, kv_blocks]
    const float* v_scale;    // [kv_heads, kv_blocks], log2
    const float* v_channel;  // [batch, kv_heads, 2, V_HEAD_DIM]
    const int* used_keys;    // [batch, 3] first and last + 1 key that the mask leaves, whether all between are left
    const bool* key_mask;    // by batch and key
    void* out;
    float* lse;
    long long out_b, out_h, out_m, lse_b, lse_h, mask_b, mask_n;
    int batch, heads, group, q_len, kv_len, q_blocks, kv_blocks, low, high, v_dim, tiles, tiles_per_head;
    int zero;  // but the compiler does not know
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
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
    asm volatile("{ .reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again; }" ::"r"(barrier), "r"(phase) : "memory");
}
__device__ __forceinline__ void load_tile(u32 target, const TensorMap* map, u32 barrier, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 ::"r"(target), "l"(map), "r"(barrier), "r"(column), "r"(row) : "memory");
}
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// A K-major matrix of rows of `row_bytes`, the swizzle span.
template <int row_bytes> __device__ __forceinline__ u64 matrix(u32 address) {
    constexpr u64 swizzle = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
    return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | ((u64)(8 * row_bytes >> 4) << 32) | (swizzle << 62);
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
// Adding 1.5 * 2^23 leaves the rounded value in the low byte.
__device__ __forceinline__ u32 rounded(float a) { return __float_as_uint(__fadd_rn(a, 12582912.f)); }
__device__ __forceinline__ u32 to_u8(float a, float b, float c, float d) {
    return permute_bytes(permute_bytes(rounded(a), rounded(b), 0x0040), permute_bytes(rounded(c), rounded(d), 0x0040), 0x5410);
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

#if PV == 1
typedef int Product;
#else
typedef float Product;
#endif
constexpr int NW = PV < 2 ? 16 : 32;       // registers of P as an operand
constexpr int RAW = PV < 2 ? 8 : 32;        // what weigh gives per thread and row: four bytes each, or floats

constexpr int NOUT = PV == 0 ? NT : PV == 1 ? NO : 1;  // sums outside of the tensor core

template <int n> struct Constant { static constexpr int value = n; };

// What a thread knows of its two rows, g and g + 8 of the warp's 16.
struct Rows {
    float scale0, scale1;          // of Q
    float maximum0, maximum1;      // the reference
    float sum0, sum1;              // PV == 1 only: else a column of the product
};

extern "C" __global__ void __launch_bounds__(128 * (CONSUMERS + 1), 1)
attention(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
          const __grid_constant__ TensorMap v_map, const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ __align__(8) u64 barriers[2 + 4 * STAGES];
    // P before K: every tile starts at a multiple of 1024 bytes, which swizzling asks for.
    constexpr int K_START = CONSUMERS * Q_BYTES, V_START = K_START + STAGES * K_BYTES;
    const u32 q_tile = shared_address(shared), k_tiles = q_tile + K_START, v_tiles = q_tile + V_START;
    const u32 bars = shared_address(barriers);
    const u32 q_full = bars, q_empty = bars + 8;
    auto k_full = [&](int s) { return bars + 16 + 8 * s; };
    auto k_empty = [&](int s) { return bars + 16 + 8 * (STAGES + s); };
    auto v_full = [&](int s) { return bars + 16 + 8 * (2 * STAGES + s); };
    auto v_empty = [&](int s) { return bars + 16 + 8 * (3 * STAGES + s); };

    const int warpgroup = __shfl_sync(~0u, threadIdx.x >> 7, 0);  // uniform, which the compiler then knows
    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        barrier_init(q_empty, CONSUMERS);
        for (int s = 0; s < STAGES; s++) {
            barrier_init(k_full(s), 1);
            barrier_init(v_full(s), 1);
            barrier_init(k_empty(s), CONSUMERS);
            barrier_init(v_empty(s), CONSUMERS);
        }
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

    // The work: a head's tiles follow each other, so that those that run at a time share K and V in L2; of them the last, under
    // a causal mask the longest, come first.
    struct Tile { int b, h, m0, begin, end, full_begin, full_end, row, key_row, v_row, v_column; };
    auto tile_at = [&](int index) {
        Tile t;
        const int bh = index / p.tiles_per_head;
        t.m0 = (p.tiles_per_head - 1 - index % p.tiles_per_head) * 64 * CONSUMERS;
        t.b = bh / p.heads;
        t.h = bh - t.b * p.heads;
        const int kv_h = t.h / p.group;
        const int q_block0 = t.b * ((p.q_len + 127) / 128), k_block0 = t.b * ((p.kv_len + 127) / 128);
        t.row = (t.h * p.q_blocks + q_block0) * 128 + t.m0;
        t.key_row = (kv_h * p.kv_blocks + k_block0) * 128;
        t.v_row = kv_h * V_HEAD_DIM;
        t.v_column = k_block0 * 128;
        int first = 0, last = p.kv_len;  // keys that anybody may attend to
        bool gaps = false;
        if (KEY_MASK) {
            first = p.used_keys[3 * t.b];
            last = p.used_keys[3 * t.b + 1];
            gaps = p.used_keys[3 * t.b + 2] == 0;
        }
        int full_first = first, full_last = gaps ? first : last;  // keys that every query of the tile attends to
        const int last_row = min(t.m0 + 64 * CONSUMERS, p.q_len) - 1;
        if (HAS_HIGH) { last = min(last, max(last_row + p.high + 1, 0)); full_last = min(full_last, max(t.m0 + p.high + 1, 0)); }
        if (HAS_LOW) { first = max(first, t.m0 + p.low); full_first = max(full_first, last_row + p.low); }
        t.begin = first / BLOCK_N;
        t.end = max((last + BLOCK_N - 1) / BLOCK_N, t.begin);
        t.full_begin = min(max((full_first + BLOCK_N - 1) / BLOCK_N, t.begin), t.end);
        t.full_end = min(max(full_last / BLOCK_N, t.full_begin), t.end);
        return t;
    };

    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) {
            int stage = 0;
            u32 phase = 1, q_phase = 1;
            for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
                const Tile t = tile_at(index);
                barrier_wait(q_empty, q_phase);
                q_phase ^= 1;
                barrier_expect(q_full, CONSUMERS * Q_BYTES);
                for (int w = 0; w < CONSUMERS; w++) load_tile(q_tile + w * Q_BYTES, &q_map, q_full, 0, t.row + 64 * w);
                for (int i = t.begin; i < t.end; i++) {
                    barrier_wait(k_empty(stage), phase);
                    barrier_expect(k_full(stage), K_BYTES);
                    load_tile(k_tiles + stage * K_BYTES, &k_map, k_full(stage), 0, t.key_row + i * BLOCK_N);
                    barrier_wait(v_empty(stage), phase);
                    barrier_expect(v_full(stage), V_SPANS * V_HEAD_DIM * 128);
                    for (int w = 0; w < V_SPANS; w++)
                        load_tile(v_tiles + stage * V_BYTES + w * V_SPAN_BYTES, &v_map, v_full(stage),
                                  t.v_column + i * BLOCK_N + w * 64, t.v_row);
                    if (++stage == STAGES) { stage = 0; phase ^= 1; }
                }
            }
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMERS == 2 ? 240 : 160));
    const int consumer = warpgroup - 1, thread = threadIdx.x & 127, lane = thread & 31, quad = lane & 3;
    const int row_in_tile = consumer * 64 + (thread >> 5) * 16 + (lane >> 2);
    const u64 q_matrix = matrix<ROW_BYTES>(q_tile + consumer * Q_BYTES);

    int scores[NS];
    Product product[NT];
    float output[NOUT];
    Rows rows;
    int stage = 0;          // of the K tile that is next to be multiplied
    u32 phase = 0, q_phase = 0;

    auto multiply_qk = [&](int (&s)[NS], int k_stage) {
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 32; k++)
            wgmma_qk(s, q_matrix + 2 * k, matrix<ROW_BYTES>(k_tiles + k_stage * K_BYTES) + 2 * k, k > 0);
        wgmma_commit();
    };
    // product (+)= P V, with P in registers. The caller has fenced.
    u32 weights[NW];
    auto multiply_pv = [&](int v_stage, bool accumulate) {
#pragma unroll
        for (int k = 0; k < NW / 4; k++) {
            const u64 v = matrix<128>(v_tiles + v_stage * V_BYTES + (k / 4) * V_SPAN_BYTES) + 2 * (k % 4);
            wgmma_pv(product, weights + 4 * k, v, k > 0 || accumulate);
        }
        wgmma_commit();
    };
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
        const Tile t = tile_at(index);
        const int kv_h = t.h / p.group;
        const int row0 = t.m0 + row_in_tile, row1 = row0 + 8;
        const float* const k_scale = p.k_scale + t.key_row / 128;
        const float* const v_scale = p.v_scale + t.key_row / 128;
        {
            const float* const q_scale = p.q_scale + t.row - t.m0;
            rows.scale0 = q_scale[min(row0, p.q_len - 1)];
            rows.scale1 = q_scale[min(row1, p.q_len - 1)];
        }
        rows.maximum0 = rows.maximum1 = LOWEST;
        rows.sum0 = rows.sum1 = 0.f;
        float v_unit = 0.f;  // log2 of the unit of `product`
        int summed = 0;      // blocks in `product`
#pragma unroll
        for (int j = 0; j < NT; j++) product[j] = 0;
#pragma unroll
        for (int j = 0; j < NOUT; j++) output[j] = 0.f;
        barrier_wait(q_full, q_phase);
        q_phase ^= 1;

        float factor0 = 0.f, factor1 = 0.f;  // PV == 1: of the product in flight
        float next_factor0 = 0.f, next_factor1 = 0.f;
        auto row_maximum = [&](int& x) {
            x = max(x, __shfl_xor_sync(~0u, x, 1));
            x = max(x, __shfl_xor_sync(~0u, x, 2));
        };
        // A larger reference maximum for some row of the warp; no product is in flight.
        auto rescale = [&](float alpha0, float alpha1) {
            if (PV != 1) {
#pragma unroll
                for (int j = 0; j < NT; j++) product[j] *= (j & 2) ? alpha1 : alpha0;
            }
            if (PV < 2) {
#pragma unroll
                for (int j = 0; j < NOUT; j++) output[j] *= (j & 2) ? alpha1 : alpha0;
            }
            rows.sum0 *= alpha0;
            rows.sum1 *= alpha1;
        };
        // The largest score of each row among this thread's; masked ones are the least integer.
        auto thread_maximum = [&](const int (&s)[NS], int& x0, int& x1) {
            x0 = max(s[0], s[1]);
            x1 = max(s[2], s[3]);
#pragma unroll
            for (int j = 4; j < NS; j += 4) {
                x0 = max(max(x0, s[j]), s[j + 1]);
                x1 = max(max(x1, s[j + 2]), s[j + 3]);
            }
            if (PV == 1) { row_maximum(x0); row_maximum(x1); }
        };
        // The reference maximum follows the block's; what was summed is rescaled. No product may be in flight.
        auto raise = [&](int x0, int x1, float scale0, float scale1) {
            if (PV != 1) { row_maximum(x0); row_maximum(x1); }
            float n0 = rows.maximum0, n1 = rows.maximum1;
            if (x0 != MASKED_SCORE) n0 = fmaxf(n0, (float)x0 * scale0);
            if (x1 != MASKED_SCORE) n1 = fmaxf(n1, (float)x1 * scale1);
            if (!__all_sync(~0u, rows.maximum0 == LOWEST && rows.maximum1 == LOWEST))
                rescale(exp2_approx(rows.maximum0 - n0), exp2_approx(rows.maximum1 - n1));
            rows.maximum0 = n0;
            rows.maximum1 = n1;
        };
        // P of the block, for take_weights. PV == 1 rounds it against the block's own maximum.
        auto weigh = [&](const int (&s)[NS], u32 (&w0)[RAW], u32 (&w1)[RAW], int x0, int x1, float scale0, float scale1,
                         float unit, bool masked) {
            float shift0 = P_EXPONENT - rows.maximum0, shift1 = P_EXPONENT - rows.maximum1;
            float e0 = 0.f, e1 = 0.f;
            if (PV == 1) {
                e0 = x0 == MASKED_SCORE ? LOWEST : (float)x0 * scale0;
                e1 = x1 == MASKED_SCORE ? LOWEST : (float)x1 * scale1;
                // An ulp less, so that no weight rounds to 256, which would wrap around.
                shift0 = LOG2_255 - e0 - fminf(fabsf(e0), 1.0e6f) * 1.2e-7f;
                shift1 = LOG2_255 - e1 - fminf(fabsf(e1), 1.0e6f) * 1.2e-7f;
            }
#pragma unroll
            for (int g = 0; g < 8; g++) {
                float x[8];
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const int score = s[8 * g + j];
                    x[j] = exp2_approx(fmaf((float)score, (j & 2) ? scale1 : scale0, (j & 2) ? shift1 : shift0));
                    if (masked && score == MASKED_SCORE) x[j] = 0.f;
                }
                if (PV < 2) {
                    w0[g] = PV == 0 ? to_e4m3(x[0], x[1], x[4], x[5]) : to_u8(x[0], x[1], x[4], x[5]);
                    w1[g] = PV == 0 ? to_e4m3(x[2], x[3], x[6], x[7]) : to_u8(x[2], x[3], x[6], x[7]);
                } else {
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        ((j & 2) ? w1 : w0)[(4 * g + (j & 1) + (j >> 2) * 2) % RAW] = __float_as_uint(x[j]);
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
            if (thread == 0) barrier_arrive(v_empty(v_stage));
            summed++;
            if (PV == 1 || (TWO_LEVELS && (summed == PROMOTE || unit != v_unit))) {
                const float f = TWO_LEVELS ? exp2_approx(v_unit) : 1.f;
                const float f0 = TWO_LEVELS ? f : factor0, f1 = TWO_LEVELS ? f : factor1;
#pragma unroll
                for (int j = 0; j < NOUT; j++)  // the row sum has no unit
                    output[j] = fmaf((float)product[j], j >= NO ? 1.f : (j & 2) ? f1 : f0, output[j]);
                summed = 0;
            }
            v_unit = unit;
        };
        auto take_weights = [&](const u32 (&w0)[RAW], const u32 (&w1)[RAW]) {
            factor0 = next_factor0;
            factor1 = next_factor1;
            // Not before the last product is complete, whose operand this is. It must be more than a move: ptxas merges
            // the source of a move with its target, which is then written while the tensor cores read it.
#pragma unroll
            for (int j = 0; j < NW / 2; j++) {
                // Operand registers come in fours: keys 0-15 of row 0, of row 1, keys 16-31 of both (of half as many in 16 bits).
                const int at = 4 * (j / 2) + 2 * (j % 2);
                if (PV < 2) {
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
        auto advance = [&](int& s, u32& ph) {
            if (++s == STAGES) { s = 0; ph ^= 1; }
        };
        auto first_scores = [&]() {  // with nothing in flight
            barrier_wait(k_full(stage), phase);
            wgmma_fence();
            multiply_qk(scores, stage);
            wgmma_wait<0>();
            if (thread == 0) barrier_arrive(k_empty(stage));
        };
        auto last_product = [&](float unit) {
            barrier_wait(v_full(stage), phase);
            wgmma_fence();
            multiply_pv(stage, summed > 0);
            wgmma_wait<0>();
            complete(stage, unit);
            advance(stage, phase);
        };
        // The scores of block i that their query may not see become the least integer.
        auto hide = [&](int i) {
            int first0 = 0, first1 = 0, last0 = p.kv_len, last1 = p.kv_len;
            if (HAS_LOW) { first0 = row0 + p.low; first1 = row1 + p.low; }
            if (HAS_HIGH) { last0 = min(p.kv_len, row0 + p.high + 1); last1 = min(p.kv_len, row1 + p.high + 1); }
#pragma unroll
            for (int j = 0; j < NS; j++) {
                const int column = i * BLOCK_N + (j >> 2) * 8 + 2 * quad + (j & 1);
                bool hidden = column < ((j & 2) ? first1 : first0) || column >= ((j & 2) ? last1 : last0);
                if (KEY_MASK) hidden |= column >= p.kv_len || !p.key_mask[t.b * p.mask_b + column * p.mask_n];
                if (hidden) scores[j] = MASKED_SCORE;
            }
        };
        // One masked block, with nothing else in flight.
        auto masked_block = [&](int i) {
            const float scale0 = rows.scale0 * k_scale[i], scale1 = rows.scale1 * k_scale[i], unit = v_scale[i];
            first_scores();
            hide(i);
            int x0, x1;
            thread_maximum(scores, x0, x1);
            raise(x0, x1, scale0, scale1);
            u32 w0[RAW], w1[RAW];
            if (summed == 0) v_unit = unit;
            weigh(scores, w0, w1, x0, x1, scale0, scale1, unit, true);
            take_weights(w0, w1);
            last_product(i + 1 < t.end ? v_scale[i + 1] : unit);
        };

        int i = t.begin;
        v_unit = i < t.end ? v_scale[i] : 0.f;
        if (HAS_LOW || KEY_MASK)
            for (; i < t.full_begin; i++) masked_block(i);
        // A single masked block at the end, as causality makes it, is the last of the others' pipeline.
        const int end = t.end - t.full_end <= 1 ? t.end : t.full_end;
        if (i < end) {
            int previous = -1;  // the stage of the V tile that the product in flight reads
            float k_next = k_scale[i], v_next = v_scale[i];
            // From the scores of block i to P; the product of block i - 1 is complete afterwards.
            auto attend = [&](bool masked) {
                const float scale0 = rows.scale0 * k_next, scale1 = rows.scale1 * k_next, unit = v_next;
                if (masked) hide(i);
                int x0, x1;
                thread_maximum(scores, x0, x1);
                bool slow = (float)x0 * scale0 > rows.maximum0 + HEADROOM || (float)x1 * scale1 > rows.maximum1 + HEADROOM;
                slow = __any_sync(~0u, slow);
                u32 w0[RAW], w1[RAW];
                if (slow) {
                    wgmma_wait<0>();
                    if (previous >= 0) complete(previous, unit);
                    previous = -1;
                    raise(x0, x1, scale0, scale1);
                }
                weigh(scores, w0, w1, x0, x1, scale0, scale1, unit, masked);
                // Keeps the arithmetic above before the wait, beside the product in flight.
#pragma unroll
                for (int j = 0; j < RAW; j++) asm volatile("" : "+r"(w0[j]), "+r"(w1[j]) :: "memory");
                if (p.zero) barrier_wait(q_empty, 0);  // never: but the branch keeps ptxas from moving the wait up
                wgmma_wait<0>();
                if (previous >= 0) complete(previous, unit);
                take_weights(w0, w1);
            };
            first_scores();
            if (i + 1 < end) {
                // The next scores are computed, then this block's product, which goes on during the next softmax.
                int k_stage = stage;
                u32 k_phase = phase;
                advance(k_stage, k_phase);
                barrier_wait(k_full(k_stage), k_phase);
                barrier_wait(v_full(stage), phase);
                for (; i + 1 < end; i++) {
                    attend(false);
                    wgmma_fence();
                    multiply_qk(scores, k_stage);
                    multiply_pv(stage, PV != 1 && summed > 0);
                    // Meanwhile, what the next round needs.
                    previous = stage;
                    const int done = k_stage;
                    stage = k_stage;
                    phase = k_phase;
                    advance(k_stage, k_phase);
                    k_next = k_scale[i + 1];
                    v_next = v_scale[i + 1];
                    barrier_wait(v_full(stage), phase);
                    if (i + 2 < end) barrier_wait(k_full(k_stage), k_phase);
                    wgmma_wait<1>();
                    if (thread == 0) barrier_arrive(k_empty(done));
                }
            }
            attend(i >= t.full_end);
            last_product(i + 1 < t.end ? v_scale[i + 1] : v_next);
            i++;
        }
        for (; i < t.end; i++) masked_block(i);
        if (thread == 0) barrier_arrive(q_empty);

        // Normalise and write.
        float result[NO];
        if (PV == 1) {
            rows.sum0 += __shfl_xor_sync(~0u, rows.sum0, 1);
            rows.sum0 += __shfl_xor_sync(~0u, rows.sum0, 2);
            rows.sum1 += __shfl_xor_sync(~0u, rows.sum1, 1);
            rows.sum1 += __shfl_xor_sync(~0u, rows.sum1, 2);
#pragma unroll
            for (int j = 0; j < NO; j++) result[j] = output[j % NOUT];
        } else {
            const float unit = TWO_LEVELS ? exp2_approx(v_unit) : 1.f;
            float sums[NT];
#pragma unroll
            for (int j = 0; j < NT; j++)
                sums[j] = TWO_LEVELS ? fmaf(summed > 0 ? (float)product[j] : 0.f, j >= NO ? 1.f : unit, output[j % NOUT]) : (float)product[j];
#pragma unroll
            for (int j = 0; j < NO; j++) result[j] = sums[j];
            rows.sum0 = __shfl_sync(~0u, sums[NT - 4], lane & ~3);
            rows.sum1 = __shfl_sync(~0u, sums[NT - 2], lane & ~3);
        }
        const float inverse0 = rows.sum0 == 0.f ? 0.f : 1.f / rows.sum0, inverse1 = rows.sum1 == 0.f ? 0.f : 1.f / rows.sum1;
        const float* const channel = p.v_channel + (long long)(t.b * (p.heads / p.group) + kv_h) * 3 * V_HEAD_DIM;
        const long long at = t.b * p.out_b + t.h * p.out_h;
        const long long at0 = at + row0 * p.out_m, at1 = at + row1 * p.out_m;
#pragma unroll
        for (int j = 0; j < V_HEAD_DIM / 8; j++) {
            const int d = 8 * j + 2 * quad;
            const float c0 = PV < 2 ? channel[d] : 1.f, c1 = PV < 2 ? channel[d + 1] : 1.f;
            const float a0 = result[4 * j] * inverse0 * c0, a1 = result[4 * j + 1] * inverse0 * c1;
            const float b0 = result[4 * j + 2] * inverse1 * c0, b1 = result[4 * j + 3] * inverse1 * c1;
            if (d < p.v_dim) {  // a multiple of 8
                if (OUT == 2) {
                    if (row0 < p.q_len) *(float2*)((float*)p.out + at0 + d) = make_float2(a0, a1);
                    if (row1 < p.q_len) *(float2*)((float*)p.out + at1 + d) = make_float2(b0, b1);
                } else {
                    if (row0 < p.q_len) *(u32*)((unsigned short*)p.out + at0 + d) = OUT == 0 ? to_bf16(a0, a1) : to_f16(a0, a1);
                    if (row1 < p.q_len) *(u32*)((unsigned short*)p.out + at1 + d) = OUT == 0 ? to_bf16(b0, b1) : to_f16(b0, b1);
                }
            }
        }
        if (RETURN_LSE && quad == 0) {
            float* const lse = p.lse + t.b * p.lse_b + t.h * p.lse_h;
            const float* const shift = p.q_shift + t.row - t.m0;
            const float exponent = PV == 1 ? LOG2_255 : P_EXPONENT;
            if (row0 < p.q_len)
                lse[row0] = (rows.sum0 == 0.f ? __int_as_float(0xff800000) : rows.maximum0 + log2f(rows.sum0) - exponent) * 0.69314718f + shift[row0];
            if (row1 < p.q_len)
                lse[row1] = (rows.sum1 == 0.f ? __int_as_float(0xff800000) : rows.maximum1 + log2f(rows.sum1) - exponent) * 0.69314718f + shift[row1];
        }
    }
}
