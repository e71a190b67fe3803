/* A vector of LANES floats. Included once for each instruction set, by kernels.h. */

typedef float V __attribute__((vector_size(4 * LANES), may_alias));
typedef float UnalignedV __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));
typedef int32_t IntV __attribute__((vector_size(4 * LANES), may_alias));

INLINE V load(const float *p) { return *(const UnalignedV *)p; }
INLINE void store(float *p, V x) { *(UnalignedV *)p = x; }
INLINE V splat(float x) { return x - (V){0}; }

/* The vector `shift` floats behind `p`, which is aligned; `shift` is a compile-time constant. A load
   that crosses a cache line costs several times as much as a shuffle of two aligned ones, which the
   compiler loads once for all shifts. */
INLINE V load_shifted(const float *p, const int shift) {
#if LANES == 16
    const __m512i low = _mm512_loadu_si512(p + shift / 16 * 16);
    if (shift % 16 == 0) return (V)low;
    const __m512i high = _mm512_loadu_si512(p + shift / 16 * 16 + 16);
#define CASE(n) case n: return (V)_mm512_alignr_epi32(high, low, n)
    switch (shift % 16) {
        CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7); CASE(8);
        CASE(9); CASE(10); CASE(11); CASE(12); CASE(13); CASE(14);
    default: return (V)_mm512_alignr_epi32(high, low, 15);
    }
#undef CASE
#else
    return load(p + shift);
#endif
}

INLINE V maximum(V a, V b) {
#if LANES == 16
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (V)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (V)_mm_max_ps((__m128)a, (__m128)b);
#else
    IntV greater = a > b;
    return (V)(((IntV)a & greater) | ((IntV)b & ~greater));
#endif
}

INLINE float sum_of_lanes(V x) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += x[lane];
    return total;
}

/* exp to about 1e-7 of its value; what is below exp(-87) becomes exp(-87). */
INLINE V exponential(V x) {
    const float round = 12582912.0f; /* 1.5 * 2**23: adding it rounds to an integer */
    x = maximum(splat(-87.0f), x); /* in this order NaN stays NaN */
    V shifted = x * 1.44269504f + round;
    V n = shifted - round;
    V r = x - n * 0.693145752f; /* log(2) in two parts, so that r is exact */
    r = r - n * 1.42860677e-6f;
    V p = r * 1.38888889e-3f + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    /* The low bits of `shifted` are n: times 2**n by adding to the exponent. */
    return (V)((IntV)p + ((IntV)shifted << 23));
}

/* log of x >= 1 to about 1e-7. */
INLINE V logarithm(V x) {
    IntV bits = (IntV)x - 0x3f3504f3; /* sqrt(1/2): the mantissa goes to [sqrt(1/2), sqrt(2)) */
    IntV exponent = bits >> 23;
    V m = (V)((bits & 0x007fffff) + 0x3f3504f3);
    V s = (m - 1.0f) / (m + 1.0f);
    V s2 = s * s;
    V series = s2 * 0.222222222f + 0.285714286f;
    series = series * s2 + 0.4f;
    series = series * s2 + 0.666666667f;
    series = series * s2 + 2.0f;
    /* x - x keeps NaN, which has an exponent like any other. */
    return __builtin_convertvector(exponent, V) * 0.693147181f + s * series + (x - x);
}
