/* What a program instance needs beside arithmetic: the width of panels, atomics, and giving way to other programs. */
#ifndef LSTM_TRITON_PROGRAM_H
#define LSTM_TRITON_PROGRAM_H

#include "kernel.h"
#include <sched.h>

/* To see what the products take (bench/shares.py): the same kernels without them, whose results mean nothing. */
#ifdef LSTM_TRITON_WITHOUT_PRODUCTS
#define dot_f32(...) ((void)0)
#endif

/* Columns of a panel of a matrix with so many columns, of elements `f32`, `f64`, or a half that is kept as float. */
#define PANEL_f32 PANEL_F32
#define PANEL_f16 PANEL_F32
#define PANEL_bf16 PANEL_F32
#define PANEL_f64 PANEL_F64
#define PANEL(element, columns) ((columns) < PANEL_##element ? (columns) : PANEL_##element)

/* A program that waits for another one spins at first, then leaves it the processor: there may be fewer than programs. */
INLINE void give_way(unsigned *rounds) {
    if (++*rounds % 64 == 0)
        sched_yield();
}

/* Atomic updates that return the old value; `order` is one of C11's. */
#define DEFINE_ATOMIC(T, U, S)                                                                                         \
    INLINE T atomic_add_##S(T *p, T x, int order) { return __atomic_fetch_add(p, x, order); }                          \
    INLINE T atomic_and_##S(T *p, T x, int order) { return __atomic_fetch_and(p, x, order); }                          \
    INLINE T atomic_or_##S(T *p, T x, int order) { return __atomic_fetch_or(p, x, order); }                            \
    INLINE T atomic_xor_##S(T *p, T x, int order) { return __atomic_fetch_xor(p, x, order); }                          \
    INLINE T atomic_exch_##S(T *p, T x, int order) { return __atomic_exchange_n(p, x, order); }                        \
    INLINE T atomic_cas_##S(T *p, T expected, T x, int order) {                                                        \
        __atomic_compare_exchange_n(p, &expected, x, 0, order, __ATOMIC_RELAXED);                                      \
        return expected;                                                                                               \
    }                                                                                                                  \
    DEFINE_ATOMIC_EXTREMUM(T, T, max_##S, >)                                                                           \
    DEFINE_ATOMIC_EXTREMUM(T, T, min_##S, <)                                                                           \
    DEFINE_ATOMIC_EXTREMUM(T, U, umax_##S, >)                                                                          \
    DEFINE_ATOMIC_EXTREMUM(T, U, umin_##S, <)
#define DEFINE_ATOMIC_EXTREMUM(T, U, NAME, ABOVE)                                                                      \
    INLINE T atomic_##NAME(T *p, T x, int order) {                                                                     \
        T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                                  \
        while (!__atomic_compare_exchange_n(p, &old, (U)x ABOVE(U) old ? x : old, 1, order, __ATOMIC_RELAXED))         \
            ;                                                                                                          \
        return old;                                                                                                    \
    }
DEFINE_ATOMIC(int32_t, uint32_t, i32)
DEFINE_ATOMIC(int64_t, uint64_t, i64)

#define DEFINE_ATOMIC_FLOAT(T, I, S)                                                                                   \
    INLINE T atomic_fadd_##S(T *p, T x, int order) {                                                                   \
        I *bits = (I *)p, old = __atomic_load_n(bits, __ATOMIC_RELAXED);                                               \
        while (!__atomic_compare_exchange_n(bits, &old, bits_of_##S(S##_of_bits(old) + x), 1, order,                   \
                                            __ATOMIC_RELAXED))                                                         \
            ;                                                                                                          \
        return S##_of_bits(old);                                                                                       \
    }                                                                                                                  \
    INLINE T atomic_exch_##S(T *p, T x, int order) {                                                                   \
        return S##_of_bits(__atomic_exchange_n((I *)p, bits_of_##S(x), order));                                        \
    }
DEFINE_ATOMIC_FLOAT(float, uint32_t, f32)
DEFINE_ATOMIC_FLOAT(double, uint64_t, f64)

#endif
