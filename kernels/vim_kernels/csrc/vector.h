// Vectors of channels: as many neighbouring channels as fit in a register, in the precision of the library.
#pragma once

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#ifdef DOUBLE
typedef double real;
typedef int64_t bits;
#else
typedef float real;
typedef int32_t bits;
#endif
typedef real Vec __attribute__((vector_size(VECTOR_BYTES)));
typedef bits Mask __attribute__((vector_size(VECTOR_BYTES)));  // a lane of -1 is true, of 0 false
typedef real Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

enum { LANES = VECTOR_BYTES / sizeof(real) };

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

INLINE Vec splat(real x) { return x - (Vec){0}; }

// Channels past the last one of a group are 0 in registers and absent from memory.
INLINE Vec load(const real *p, int lanes) {
    if (lanes == LANES) return *(const Unaligned *)p;
    Vec v = {0};
    memcpy(&v, p, lanes * sizeof(real));
    return v;
}

INLINE void store(real *p, Vec v, int lanes) {
    if (lanes == LANES)
        *(Unaligned *)p = v;
    else
        memcpy(p, &v, lanes * sizeof(real));
}

// Load, and prefetch the next tile: its rows are too far apart for the hardware prefetcher.
INLINE Vec stream(const real *p, int lanes) {
    __builtin_prefetch(p + LANES);
    return load(p, lanes);
}

INLINE Vec choose(Mask m, Vec yes, Vec no) { return (Vec)(((Mask)yes & m) | ((Mask)no & ~m)); }

INLINE real sum_lanes(Vec v) {
    real sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

#ifdef DOUBLE

#define EACH_LANE(expression)                   \
    Vec r;                                      \
    for (int i = 0; i < LANES; i++) {           \
        double v = x[i];                        \
        r[i] = expression;                      \
    }                                           \
    return r

INLINE Vec exp2_of(Vec x) { EACH_LANE(exp2(v)); }
INLINE Vec softplus(Vec x) { EACH_LANE(v > 20 ? v : log1p(exp(v))); }
INLINE Vec sigmoid(Vec x) { EACH_LANE(1 / (1 + exp(-v))); }
INLINE Vec softplus_slope(Vec x) { EACH_LANE(v > 20 ? 1 : 1 / (1 + exp(-v))); }

#else

// 2^x. It is exactly 1 at 0, so decays close to 1 do not drift over a long sequence. 2^-inf is 0, 2^inf is inf, and NaN
// stays NaN.
#if VECTOR_BYTES == 64

static const float POWERS[16] = {  // 2^(k / 16)
    0x1p0f, 0x1.0b5586p0f, 0x1.172b84p0f, 0x1.2387a6p0f, 0x1.306fep0f, 0x1.3dea64p0f, 0x1.4bfdaep0f, 0x1.5ab07ep0f,
    0x1.6a09e6p0f, 0x1.7a1148p0f, 0x1.8ace54p0f, 0x1.9c4918p0f, 0x1.ae89fap0f, 0x1.c199bep0f, 0x1.d5818ep0f,
    0x1.ea4afap0f,
};

// 2^x = 2^whole * 2^(k / 16) * 2^f with f in [-1/32, 1/32]. The polynomial has a relative error of 2e-9. A table costs
// fewer multiply-adds, of which a scan is full, than the higher degree for all f in [-1/2, 1/2].
INLINE Vec exp2_of(Vec x) {
    Vec shifted = x + 0x1.8p19f;  // its low bits are k
    Vec f = (Vec)_mm512_reduce_ps((__m512)x, 4 << 4), rounded = x - f;
    Vec p = splat(5.550214e-2f);
    p = p * f + 2.4023429e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1;
    p *= (Vec)_mm512_permutexvar_ps((__m512i)shifted, _mm512_loadu_ps(POWERS));
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)rounded);  // times 2^floor(rounded)
}

#else

// 2^x = 2^whole * 2^f with f in [-1/2, 1/2]. The polynomial has a relative error of 2e-7.
INLINE Vec exp2_of(Vec x) {
    // The result is 0 below -127 and inf above 128. Comparisons with NaN are false.
    x = choose(x < -127, splat(-127), x);
    x = choose(x > 128, splat(128), x);
    const float shift = 0x1.8p23f + 127;  // x + shift has the biased exponent round(x) + 127 in its low bits
    Vec shifted = x + shift, f = x - (shifted - shift);
    Vec p = splat(1.3264727e-3f);
    p = p * f + 9.671513e-3f;
    p = p * f + 5.5507336e-2f;
    p = p * f + 2.4022242e-1f;
    p = p * f + 6.93147e-1f;
    p = p * f + 1;
    return p * (Vec)((Mask)shifted << 23);
}

#endif

INLINE Vec sigmoid(Vec x) { return 1 / (1 + exp2_of(x * -0x1.715476p0f)); }

INLINE Vec softplus(Vec x) {
    // max(x, 0) + log1p(e) with e = exp(-|x|). log1p(e) = 2 atanh(s) is an odd polynomial of s = e / (2 + e) <= 1/3.
    Vec minus_abs = (Vec)((Mask)x | INT32_MIN), e = exp2_of(minus_abs * 0x1.715476p0f);
    Vec s = e / (2 + e), q = s * s;
    Vec p = splat(0.28178358f);
    p = p * q + 0.27960598f;
    p = p * q + 0.4002491f;
    p = p * q + 0.66666317f;
    p = p * q + 2;
    return choose(x > 0, x, splat(0)) + s * p;
}

INLINE Vec softplus_slope(Vec x) { return sigmoid(x); }

#endif
