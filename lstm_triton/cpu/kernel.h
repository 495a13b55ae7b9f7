/* What the C that a kernel becomes is written in: elementwise functions that the compiler can vectorise, conversions
 * to and from 16-bit floats, and the matrix product of two tiles.
 *
 * Meant for gcc and clang with -O3 -march=native -fno-math-errno -fno-trapping-math -ffp-contract=fast, but not
 * -ffast-math: NaN, infinities, signed zeros and denormal numbers are as IEEE 754 has them. */
#ifndef LSTM_TRITON_KERNEL_H
#define LSTM_TRITON_KERNEL_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline, unused))

/* IVDEP before a loop: no iteration needs what another one writes (and gcc is not to write out a short loop before it
 * can vectorise it). UNROLL before a loop of constant length: repeat its
 * body instead, so that what it indexes by the loop's counter can live in registers. */
#ifdef __clang__
#define IVDEP _Pragma("clang loop vectorize(assume_safety)")
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define IVDEP _Pragma("GCC ivdep") _Pragma("GCC unroll 1")
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* ---- The bits of a number ---- */

INLINE uint32_t bits_of_f32(float x) { uint32_t b; memcpy(&b, &x, sizeof b); return b; }
INLINE uint64_t bits_of_f64(double x) { uint64_t b; memcpy(&b, &x, sizeof b); return b; }
INLINE float f32_of_bits(uint32_t b) { float x; memcpy(&x, &b, sizeof x); return x; }
INLINE double f64_of_bits(uint64_t b) { double x; memcpy(&x, &b, sizeof x); return x; }

/* ---- Minimum and maximum ----
 * Of a number and NaN, minnum and maxnum return the number, minimum and maximum NaN. Which zero comes of -0 and +0 is
 * not defined. */

INLINE float minnum_f32(float a, float b) { return a < b || b != b ? a : b; }
INLINE float maxnum_f32(float a, float b) { return a > b || b != b ? a : b; }
INLINE float minimum_f32(float a, float b) { return a < b || a != a ? a : b; }
INLINE float maximum_f32(float a, float b) { return a > b || a != a ? a : b; }
INLINE double minnum_f64(double a, double b) { return a < b || b != b ? a : b; }
INLINE double maxnum_f64(double a, double b) { return a > b || b != b ? a : b; }
INLINE double minimum_f64(double a, double b) { return a < b || a != a ? a : b; }
INLINE double maximum_f64(double a, double b) { return a > b || a != a ? a : b; }

/* ---- Exponentials ----
 *
 * Where the result is known, it replaces what the formula made of such an x: limiting x beforehand would take more
 * instructions, as the compiler doesn't see a minimum in it (of NaN and signed zeros) and works out each case.
 *
 * Rounding to an integer is adding and subtracting ROUND (1.5 times the power of two whose last bit is 1). As its low
 * bits are zero but for an exponent's bias, the sum's low bits are then that of 2^n, and a shift makes 2^n of them. */

#define ROUND_F32 (0x1.8p23f + 127)
#define ROUND_F64 (0x1.8p52 + 1023)

INLINE float power_f32(float rounding) { return f32_of_bits(bits_of_f32(rounding) << 23); }
INLINE double power_f64(double rounding) { return f64_of_bits(bits_of_f64(rounding) << 52); }

/* ln 2 in two parts; the first has so few bits that an exponent's multiple of it is exact. */
#define LN2_HIGH_F32 0x1.62e4p-1f
#define LN2_LOW_F32 0x1.7f7d1cp-20f
#define LN2_HIGH_F64 0x1.62e42feep-1
#define LN2_LOW_F64 0x1.a39ef35793c76p-33
#define LOG2E_F32 0x1.715476p0f
#define LOG2E_LOW_F32 0x1.4ae0cp-26f
#define LOG2E_F64 0x1.71547652b82fep0
#define LOG2E_LOW_F64 0x1.777d0ffda0d24p-56

/* exp(x) = p(x - 2 n ln 2) 2^n 2^n. Taking twice n leaves |r| up to ln 2, which costs the polynomial two terms, but
 * both powers are normal numbers however small or large the result is, and of the products only the last rounds. */
INLINE float exp_f32(float x) {
    float t = x * (0.5f * LOG2E_F32) + ROUND_F32, n = t - ROUND_F32, s = power_f32(t);
    float r = x - n * (2 * LN2_HIGH_F32) - n * (2 * LN2_LOW_F32);
    float p = 0.000196113499f;
    p = p * r + 0.00141046813f;
    p = p * r + 0.00833610911f;
    p = p * r + 0.0416612588f;
    p = p * r + 0.166666135f;
    p = p * r + 0.500000358f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    p = x < -104.0f ? 0.0f : p * s * s;
    return x > 89.0f ? INFINITY : p;
}

INLINE double exp_f64(double x) {
    double t = x * (0.5 * LOG2E_F64) + ROUND_F64, n = t - ROUND_F64, s = power_f64(t);
    double r = x - n * (2 * LN2_HIGH_F64) - n * (2 * LN2_LOW_F64);
    double p = 1.5935330528508525e-10;
    p = p * r + 2.106262448543954e-09;
    p = p * r + 2.5055043095190786e-08;
    p = p * r + 2.755615439139303e-07;
    p = p * r + 2.75573005627537e-06;
    p = p * r + 2.4801590846497937e-05;
    p = p * r + 0.00019841269893100842;
    p = p * r + 0.0013888888883544122;
    p = p * r + 0.008333333333269417;
    p = p * r + 0.04166666666670236;
    p = p * r + 0.1666666666666694;
    p = p * r + 0.4999999999999993;
    p = p * r + 1.0;
    p = p * r + 1.0;
    p = x < -746.0 ? 0.0 : p * s * s;
    return x > 710.0 ? (double)INFINITY : p;
}

/* 2^x = p(x - n) 2^(n - c) 2^c, exact for an integer x. c keeps the power of a large or small n a normal number. */
INLINE float exp2_f32(float x) {
    float round = x < 0 ? ROUND_F32 + 64 : ROUND_F32 - 64, back = x < 0 ? 0x1p-64f : 0x1p64f;
    float t = x + round, r = x - (t - round);
    float p = 0.00015353359f;
    p = p * r + 0.0013398875f;
    p = p * r + 0.00961843692f;
    p = p * r + 0.0555033237f;
    p = p * r + 0.240226477f;
    p = p * r + 0.693147182f;
    p = p * r + 1.0f;
    p = x < -151.0f ? 0.0f : p * power_f32(t) * back;
    return x > 129.0f ? INFINITY : p;
}

INLINE double exp2_f64(double x) {
    double round = x < 0 ? ROUND_F64 + 512 : ROUND_F64 - 512, back = x < 0 ? 0x1p-512 : 0x1p512;
    double t = x + round, r = x - (t - round);
    double p = 2.562578185953338e-11;
    p = p * r + 4.45657026733788e-10;
    p = p * r + 7.054974218808153e-09;
    p = p * r + 1.0178051943414207e-07;
    p = p * r + 1.3215486595597846e-06;
    p = p * r + 1.5252733854315563e-05;
    p = p * r + 0.00015403530393639915;
    p = p * r + 0.0013333558146392693;
    p = p * r + 0.00961812910762833;
    p = p * r + 0.05550410866482169;
    p = p * r + 0.24022650695910072;
    p = p * r + 0.6931471805599453;
    p = p * r + 1.0;
    p = x < -1076.0 ? 0.0 : p * power_f64(t) * back;
    return x > 1025.0 ? (double)INFINITY : p;
}

/* tanh(|x|) = -e / (e + 2) with e = exp(-2|x|) - 1 = 2^n (exp(r) - 1) + 2^n - 1, which keeps all digits of a small x.
 * For accuracy, the exponent is the negative one (just below 2, where a small x has its denominator, numbers lie twice
 * as close as just above), and the denominator isn't made of the rounded e. */
INLINE float tanh_f32(float x) {
    float y = -2 * fabsf(x);
    float t = y * LOG2E_F32 + ROUND_F32, n = t - ROUND_F32, s = power_f32(t);
    float r = y - n * LN2_HIGH_F32 - n * LN2_LOW_F32;
    float p = 0.00138824806f;
    p = p * r + 0.00836664811f;
    p = p * r + 0.0416672044f;
    p = p * r + 0.16666542f;
    p = p * r + 0.49999997f;
    p = p * (r * r) + r;
    p = (p * s + (s - 1)) / (p * s + (s + 1));
    return copysignf(y < -20.0f ? 1.0f : p, x);
}

INLINE double tanh_f64(double x) {
    double y = -2 * fabs(x);
    double t = y * LOG2E_F64 + ROUND_F64, n = t - ROUND_F64, s = power_f64(t);
    double high = y - n * LN2_HIGH_F64, r = high - n * LN2_LOW_F64, low = high - r - n * LN2_LOW_F64;
    double p = 2.0875559443508615e-09;
    p = p * r + 2.5109194246075395e-08;
    p = p * r + 2.7557402511495276e-07;
    p = p * r + 2.7557243806597633e-06;
    p = p * r + 2.4801587171953303e-05;
    p = p * r + 0.00019841269886474835;
    p = p * r + 0.0013888888888963058;
    p = p * r + 0.008333333333321515;
    p = p * r + 0.041666666666666505;
    p = p * r + 0.16666666666666677;
    p = p * r + 0.5;
    p = p * (r * r) + low + r;
    p = (p * s + (s - 1)) / (p * s + (s + 1));
    return copysign(y < -40.0 ? 1.0 : p, x);
}

/* ---- Logarithms ----
 * x = 2^n (1 + f) with 1 + f between sqrt(1/2) and sqrt(2); log(1 + f) = f + w, where w is small and f exact. */

INLINE float split_f32(float x, float *n, float *f) {
    int denormal = x < 0x1p-126f;
    uint32_t b = bits_of_f32(denormal ? x * 0x1p23f : x);
    int32_t e = (int32_t)(b - 0x3f3504f3) >> 23;
    *n = (float)e - (denormal ? 23.0f : 0.0f);
    float g = *f = f32_of_bits(b - ((uint32_t)e << 23)) - 1;
    float p = 0.0674628317f;
    p = p * g - 0.116754033f;
    p = p * g + 0.118881889f;
    p = p * g - 0.124056324f;
    p = p * g + 0.142195538f;
    p = p * g - 0.166679934f;
    p = p * g + 0.200021178f;
    p = p * g - 0.250000089f;
    p = p * g + 0.333333135f;
    return g * g * (g * p - 0.5f);
}

INLINE double split_f64(double x, double *n, double *f) {
    int denormal = x < 0x1p-1022;
    uint64_t b = bits_of_f64(denormal ? x * 0x1p52 : x);
    uint64_t e = (b - 0x3fe6a09e667f3bcd + ((uint64_t)1023 << 52)) >> 52; /* n + 1023: few processors convert int64 */
    *n = f64_of_bits(e | 0x4330000000000000) - (denormal ? 0x1p52 + 1023 + 52 : 0x1p52 + 1023);
    double g = *f = f64_of_bits(b - (e << 52) + ((uint64_t)1023 << 52)) - 1;
    double s = g / (2 + g), z = s * s, half = 0.5 * g * g;
    double p = 1.479819860511658591e-01; /* log(1 + f) = log((1 + s) / (1 - s)), as in fdlibm */
    p = p * z + 1.531383769920937332e-01;
    p = p * z + 1.818357216161805012e-01;
    p = p * z + 2.222219843214978396e-01;
    p = p * z + 2.857142874366239149e-01;
    p = p * z + 3.999999999940941908e-01;
    p = p * z + 6.666666666666735130e-01;
    return s * (half + z * p) - half;
}

/* y = log(x), but for the x that have no exponent. */
INLINE float log_ends_f32(float x, float y) {
    float end = x < 0 ? NAN : x;
    end = x == 0 ? -INFINITY : end;
    return x > 0 && x < INFINITY ? y : end;
}
INLINE double log_ends_f64(double x, double y) {
    double end = x < 0 ? (double)NAN : x;
    end = x == 0 ? -(double)INFINITY : end;
    return x > 0 && x < (double)INFINITY ? y : end;
}

INLINE float log_f32(float x) {
    float n, f, w = split_f32(x, &n, &f);
    return log_ends_f32(x, n * LN2_HIGH_F32 + (f + (n * LN2_LOW_F32 + w)));
}
INLINE double log_f64(double x) {
    double n, f, w = split_f64(x, &n, &f);
    return log_ends_f64(x, n * LN2_HIGH_F64 + (f + (n * LN2_LOW_F64 + w)));
}
INLINE float log2_f32(float x) {
    float n, f, w = split_f32(x, &n, &f);
    return log_ends_f32(x, n + (f * LOG2E_F32 + (w * LOG2E_F32 + f * LOG2E_LOW_F32)));
}
INLINE double log2_f64(double x) {
    double n, f, w = split_f64(x, &n, &f);
    return log_ends_f64(x, n + (f * LOG2E_F64 + (w * LOG2E_F64 + f * LOG2E_LOW_F64)));
}

/* ---- The rest of the functions ---- */

INLINE float sqrt_f32(float x) { return sqrtf(x); }
INLINE double sqrt_f64(double x) { return sqrt(x); }
INLINE float rsqrt_f32(float x) { return 1 / sqrtf(x); }
INLINE double rsqrt_f64(double x) { return 1 / sqrt(x); }
INLINE float abs_f32(float x) { return fabsf(x); }
INLINE double abs_f64(double x) { return fabs(x); }
INLINE float floor_f32(float x) { return floorf(x); }
INLINE double floor_f64(double x) { return floor(x); }
INLINE float ceil_f32(float x) { return ceilf(x); }
INLINE double ceil_f64(double x) { return ceil(x); }
INLINE float sin_f32(float x) { return sinf(x); }
INLINE double sin_f64(double x) { return sin(x); }
INLINE float cos_f32(float x) { return cosf(x); }
INLINE double cos_f64(double x) { return cos(x); }
INLINE float erf_f32(float x) { return erff(x); }
INLINE double erf_f64(double x) { return erf(x); }

/* The upper half of a product; of 64 bits, made of products of 32 bits, which processors have for vectors. */
INLINE uint32_t mulhi_u32(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
INLINE uint64_t mulhi_u64(uint64_t a, uint64_t b) {
    uint64_t a0 = (uint32_t)a, a1 = a >> 32, b0 = (uint32_t)b, b1 = b >> 32;
    uint64_t middle = a1 * b0 + (a0 * b0 >> 32), other = a0 * b1 + (uint32_t)middle;
    return a1 * b1 + (middle >> 32) + (other >> 32);
}

/* ---- 16-bit floats ----
 * A float16 or bfloat16 is held as its bits in a uint16_t. Conversions round to nearest, ties to even. */

INLINE float f32_of_bf16(uint16_t h) { return f32_of_bits((uint32_t)h << 16); }

INLINE uint16_t bf16_of_f32(float x) {
    uint32_t b = bits_of_f32(x), rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
    return (uint16_t)(x != x ? b >> 16 | 0x40 : rounded); /* a NaN's carry could make it a zero */
}

INLINE float round_bf16(float x) {
    uint32_t b = bits_of_f32(x), rounded = (b + 0x7fff + (b >> 16 & 1)) & 0xffff0000;
    return x != x ? x : f32_of_bits(rounded);
}

/* A number's bits, moved to where a float has them, are 2^112 too small, denormal ones included. */
INLINE float f32_of_f16(uint16_t h) {
    uint32_t b = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t scaled = bits_of_f32(f32_of_bits(b) * 0x1p112f);
    return f32_of_bits(sign | (b >= 0x0f800000 ? b | 0x7f800000 : scaled));
}

/* The last place of a float16 as large as |x| is that of a float 2^13 times as large, so adding such a power of two
 * rounds. 65520 is the first number that rounds to infinity; 2^-14 is the least that isn't denormal. */
INLINE float round_f16_magnitude(float a) {
    uint32_t exponent = bits_of_f32(a) & 0x7f800000;
    exponent = exponent < 0x38800000 ? 0x38800000 : exponent;
    float power = f32_of_bits(exponent + (13 << 23)), rounded = (a + power) - power;
    rounded = a >= 65520.0f ? INFINITY : rounded;
    return a != a ? a : rounded;
}

INLINE float round_f16(float x) { return copysignf(round_f16_magnitude(fabsf(x)), x); }

/* Once rounded, a number times 2^-112 has its bits where a float16 does, 13 places up. */
INLINE uint16_t f16_of_f32(float x) {
    float a = round_f16_magnitude(fabsf(x));
    uint32_t b = bits_of_f32(a * 0x1p-112f) >> 13;
    b = a == INFINITY ? 0x7c00 : b;
    b = a != a ? 0x7e00 : b;
    return (uint16_t)((bits_of_f32(x) >> 16 & 0x8000) | b);
}

/* Rounds to odd: of the two floats around x, the one whose last bit is 1. What is then rounded to fewer bits comes out
 * as if rounded from x itself. */
INLINE float f32_odd_of_f64(double x) {
    float f = (float)x;
    double back = (double)f;
    uint32_t over = fabs(back) > fabs(x), inexact = back != x;
    return f32_of_bits((bits_of_f32(f) - over) | inexact);
}

INLINE uint16_t f16_of_f64(double x) { return f16_of_f32(f32_odd_of_f64(x)); }
INLINE uint16_t bf16_of_f64(double x) { return bf16_of_f32(f32_odd_of_f64(x)); }
INLINE double f64_of_f16(uint16_t h) { return (double)f32_of_f16(h); }
INLINE double f64_of_bf16(uint16_t h) { return (double)f32_of_bf16(h); }

/* ---- The matrix product ----
 *
 * dot_f32: C[m*scm + n] += sum over k of A[m*sam + k*sak] * B[n/PANEL*sbp + k*sbk + n%PANEL], PANEL for PANEL_F32.
 * That is B packed in panels of PANEL columns, one after the other (sbk = PANEL or less, if B is narrower, and
 * sbp = K*sbk), and also a row-major B (sbk its row stride, sbp = PANEL). Sizes are 1 and above; no alignment is
 * assumed. dot_f64 is the same for double. Called with constant sizes, it becomes little more than one loop over k.
 *
 * A tile of C, ROWS by PANEL, stays in registers while k runs. A panel is as wide as two vectors: eight or more of the
 * processor's registers then hold sums, enough to keep its multipliers busy, and the powers of two that kernels have
 * for sizes come out even. */

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define ROWS 8
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define ROWS 4
#elif defined(__aarch64__)
#define VECTOR_BYTES 16
#define ROWS 8
#else
#define VECTOR_BYTES 16
#define ROWS 4
#endif

#define VECTORS 2
#define PANEL_F32 (VECTORS * VECTOR_BYTES / 4)
#define PANEL_F64 (VECTORS * VECTOR_BYTES / 8)

typedef float f32x1;
typedef float f32x2 __attribute__((vector_size(8), aligned(4), may_alias));
typedef float f32x4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef double f64x1;
typedef double f64x2 __attribute__((vector_size(16), aligned(8), may_alias));
#if VECTOR_BYTES >= 32
typedef float f32x8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef double f64x4 __attribute__((vector_size(32), aligned(8), may_alias));
#endif
#if VECTOR_BYTES >= 64
typedef float f32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef double f64x8 __attribute__((vector_size(64), aligned(8), may_alias));
#endif

/* Makes gcc load a vector once instead of once per multiplication by it, which its model of some processors prefers. */
#if defined(__x86_64__) && !defined(__clang__)
#define LOADED(V) __asm__("" : "+v"(V))
#else
#define LOADED(V)
#endif

/* tile_<V>: rows by vectors of type V, both constants. If these are too few sums to hide a multiplication's latency,
 * several neighbouring k have sums of their own.
 *
 * strip_<V>: as many tiles, one below the other, as M rows take. */
#define TILE_SUMS 8
#define DEFINE_STRIP(T, V)                                                                                             \
    INLINE void tile_##V(const T *A, long sam, long sak, const T *B, long sbk, T *C, long scm, const int rows,         \
                         const int vectors, int K) {                                                                   \
        enum { LANES = sizeof(V) / sizeof(T) };                                                                        \
        const int split = rows * vectors >= TILE_SUMS ? 1 : TILE_SUMS / (rows * vectors);                              \
        V sums[TILE_SUMS][ROWS][VECTORS];                                                                              \
        UNROLL for (int s = 0; s < split; s++)                                                                         \
            UNROLL for (int m = 0; m < rows; m++)                                                                      \
                UNROLL for (int v = 0; v < vectors; v++)                                                               \
                    sums[s][m][v] = s ? (V){0} : *(const V *)(C + m * scm + v * LANES);                                \
        const int whole = K - K % split;                                                                               \
        for (int k = 0; k < whole; k += split)                                                                         \
            UNROLL for (int s = 0; s < split; s++) {                                                                   \
                V b[VECTORS];                                                                                          \
                UNROLL for (int v = 0; v < vectors; v++) {                                                             \
                    b[v] = *(const V *)(B + (k + s) * sbk + v * LANES);                                                \
                    if (rows > 1) LOADED(b[v]);                                                                        \
                }                                                                                                      \
                UNROLL for (int m = 0; m < rows; m++)                                                                  \
                    UNROLL for (int v = 0; v < vectors; v++) sums[s][m][v] += A[m * sam + (k + s) * sak] * b[v];       \
            }                                                                                                          \
        for (int k = whole; k < K; k++)                                                                                \
            UNROLL for (int m = 0; m < rows; m++)                                                                      \
                UNROLL for (int v = 0; v < vectors; v++)                                                               \
                    sums[0][m][v] += A[m * sam + k * sak] * *(const V *)(B + k * sbk + v * LANES);                     \
        UNROLL for (int m = 0; m < rows; m++)                                                                          \
            UNROLL for (int v = 0; v < vectors; v++) {                                                                 \
                UNROLL for (int s = 1; s < split; s++) sums[0][m][v] += sums[s][m][v];                                 \
                *(V *)(C + m * scm + v * LANES) = sums[0][m][v];                                                       \
            }                                                                                                          \
    }                                                                                                                  \
    INLINE void strip_##V(const T *A, long sam, long sak, const T *B, long sbk, T *C, long scm, const int vectors,     \
                          int M, int K) {                                                                              \
        int m = 0;                                                                                                     \
        for (; m + ROWS <= M; m += ROWS) tile_##V(A + m * sam, sam, sak, B, sbk, C + m * scm, scm, ROWS, vectors, K);  \
        if (ROWS > 4 && m + 4 <= M) {                                                                                  \
            tile_##V(A + m * sam, sam, sak, B, sbk, C + m * scm, scm, 4, vectors, K);                                  \
            m += 4;                                                                                                    \
        }                                                                                                              \
        if (m + 2 <= M) {                                                                                              \
            tile_##V(A + m * sam, sam, sak, B, sbk, C + m * scm, scm, 2, vectors, K);                                  \
            m += 2;                                                                                                    \
        }                                                                                                              \
        if (m < M) tile_##V(A + m * sam, sam, sak, B, sbk, C + m * scm, scm, 1, vectors, K);                           \
    }

DEFINE_STRIP(float, f32x1)
DEFINE_STRIP(float, f32x2)
DEFINE_STRIP(float, f32x4)
DEFINE_STRIP(double, f64x1)
DEFINE_STRIP(double, f64x2)
#if VECTOR_BYTES >= 32
DEFINE_STRIP(float, f32x8)
DEFINE_STRIP(double, f64x4)
#endif
#if VECTOR_BYTES >= 64
DEFINE_STRIP(float, f32x16)
DEFINE_STRIP(double, f64x8)
#endif

/* The columns that a panel doesn't fill, from the widest vectors to single numbers. */
#define NARROW_STRIP(V, LANES)                                                                                         \
    if (N - n >= LANES) {                                                                                              \
        strip_##V(A, sam, sak, B, sbk, C + n, scm, 1, M, K);                                                           \
        n += LANES, B += LANES;                                                                                        \
    }

INLINE void dot_f32(const float *A, long sam, long sak, const float *B, long sbk, long sbp, float *C, long scm, int M,
                    int N, int K) {
    int n = 0;
    for (; n + PANEL_F32 <= N; n += PANEL_F32, B += sbp)
#if VECTOR_BYTES >= 64
        strip_f32x16(A, sam, sak, B, sbk, C + n, scm, VECTORS, M, K);
    NARROW_STRIP(f32x16, 16)
    NARROW_STRIP(f32x8, 8)
#elif VECTOR_BYTES >= 32
        strip_f32x8(A, sam, sak, B, sbk, C + n, scm, VECTORS, M, K);
    NARROW_STRIP(f32x8, 8)
#else
        strip_f32x4(A, sam, sak, B, sbk, C + n, scm, VECTORS, M, K);
#endif
    NARROW_STRIP(f32x4, 4)
    NARROW_STRIP(f32x2, 2)
    NARROW_STRIP(f32x1, 1)
}

INLINE void dot_f64(const double *A, long sam, long sak, const double *B, long sbk, long sbp, double *C, long scm,
                    int M, int N, int K) {
    int n = 0;
    for (; n + PANEL_F64 <= N; n += PANEL_F64, B += sbp)
#if VECTOR_BYTES >= 64
        strip_f64x8(A, sam, sak, B, sbk, C + n, scm, VECTORS, M, K);
    NARROW_STRIP(f64x8, 8)
    NARROW_STRIP(f64x4, 4)
#elif VECTOR_BYTES >= 32
        strip_f64x4(A, sam, sak, B, sbk, C + n, scm, VECTORS, M, K);
    NARROW_STRIP(f64x4, 4)
#else
        strip_f64x2(A, sam, sak, B, sbk, C + n, scm, VECTORS, M, K);
#endif
    NARROW_STRIP(f64x2, 2)
    NARROW_STRIP(f64x1, 1)
}

#endif
