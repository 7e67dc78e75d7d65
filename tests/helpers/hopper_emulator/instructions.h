// The other instructions.
#pragma once

namespace emulator {

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
void cvt_e4m3x4(u32& r, float a, float b, float c, float d) {
    r = (u32)e4m3_of(d) << 24 | (u32)e4m3_of(c) << 16 | (u32)e4m3_of(b) << 8 | e4m3_of(a);
}
void cvt_bf16x2(u32& r, float high, float low) { r = (u32)bf16_of(high) << 16 | bf16_of(low); }
void cvt_f16x2(u32& r, float high, float low) { r = (u32)f16_of(high) << 16 | f16_of(low); }
void pack(u32& r, unsigned short low, unsigned short high) { r = (u32)high << 16 | low; }
void add_f16x2(u32& r, u32 a, u32 b) {
    r = (u32)f16_of(of_f16(a >> 16) + of_f16(b >> 16)) << 16 | f16_of(of_f16(a & 0xFFFF) + of_f16(b & 0xFFFF));
}
void exclusive_or(u32& r, u32 a, u32 b) { r = a ^ b; }

}  // namespace emulator
