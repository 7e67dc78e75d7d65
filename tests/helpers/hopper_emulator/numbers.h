// Number formats of 8 and 16 bits.
#pragma once

namespace emulator {

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

}  // namespace emulator
