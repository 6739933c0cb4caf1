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

// 2^x = 2^whole * 2^f with f in [-1/2, 1/2]. The polynomial has a relative error of 2e-7 and is exactly 1 at 0, so
// decays close to 1 do not drift over a long sequence. 2^-inf is 0, 2^inf is inf, NaN stays NaN.
INLINE Vec exp2_of(Vec x) {
#if VECTOR_BYTES == 64
    Vec f = (Vec)_mm512_reduce_ps((__m512)x, 8), whole = x - f;
#else
    // The result is 0 below -127 and inf above 128. Comparisons with NaN are false.
    x = choose(x < -127, splat(-127), x);
    x = choose(x > 128, splat(128), x);
    const float shift = 0x1.8p23f + 127;  // x + shift has the biased exponent round(x) + 127 in its low bits
    Vec shifted = x + shift, f = x - (shifted - shift);
#endif
    Vec p = splat(1.3264727e-3f);
    p = p * f + 9.671513e-3f;
    p = p * f + 5.5507336e-2f;
    p = p * f + 2.4022242e-1f;
    p = p * f + 6.93147e-1f;
    p = p * f + 1;
#if VECTOR_BYTES == 64
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    return p * (Vec)((Mask)shifted << 23);
#endif
}

// exp(-|x|): keeps sigmoid and softplus from overflowing.
INLINE Vec exp_minus_abs(Vec x) {
    Vec minus_abs = (Vec)((Mask)x | INT32_MIN);
    return exp2_of(minus_abs * 0x1.715476p0f);
}

INLINE Vec sigmoid(Vec x) {
    Vec e = exp_minus_abs(x);
    return choose(x < 0, e, splat(1)) / (1 + e);
}

INLINE Vec softplus(Vec x) {
    // max(x, 0) + log1p(e), with log1p(e) = 2 atanh(s) as an odd polynomial of s = e / (2 + e) <= 1/3.
    Vec e = exp_minus_abs(x);
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
