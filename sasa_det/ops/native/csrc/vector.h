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

/* The largest of some vectors, lane by lane: four at a time, as each has to wait for the one before. */
INLINE V maximum_of(const V *x, int64_t count) {
    V highest[4] = {x[0], x[0], x[0], x[0]};
    int64_t i = 0;
    for (; i + 4 <= count; i += 4)
        for (int j = 0; j < 4; j++) highest[j] = maximum(highest[j], x[i + j]);
    for (; i < count; i++) highest[0] = maximum(highest[0], x[i]);
    return maximum(maximum(highest[0], highest[1]), maximum(highest[2], highest[3]));
}

INLINE float sum_of_lanes(V x) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += x[lane];
    return total;
}

/* exp to about 1e-7 of its value, of some vectors; what is below exp(-87) becomes exp(-87). Step by
   step for all of them: one alone is a chain in which each step waits for the one before. */
INLINE void exponentials_of(const int count, const V *x, V highest, V *results) {
    const float round = 12582912.0f; /* 1.5 * 2**23: adding it rounds to an integer */
    const float coefficients[] = {8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f};
    V shifted[4], r[4], p[4];
#define EACH _Pragma("GCC unroll 4") for (int i = 0; i < count; i++)
    /* In this order NaN stays NaN. */
    EACH r[i] = maximum(splat(-87.0f), x[i] - highest);
    EACH shifted[i] = r[i] * 1.44269504f + round;
    /* log(2) in two parts, so that r is exact */
    EACH r[i] = r[i] - (shifted[i] - round) * 0.693145752f;
    EACH r[i] = r[i] - (shifted[i] - round) * 1.42860677e-6f;
    EACH p[i] = splat(1.38888889e-3f);
    _Pragma("GCC unroll 6") for (int step = 0; step < 6; step++)
        EACH p[i] = p[i] * r[i] + coefficients[step];
    /* The low bits of `shifted` are n: times 2**n by adding to the exponent. */
    EACH results[i] = (V)((IntV)p[i] + ((IntV)shifted[i] << 23));
#undef EACH
}

/* x = exp(x - highest) for `count` vectors; returns their sum. */
INLINE V exponentials(V *x, int64_t count, V highest) {
    V total[4] = {{0}}, r[4];
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        exponentials_of(4, x + i, highest, r);
        for (int j = 0; j < 4; j++) {
            x[i + j] = r[j];
            total[j] += r[j];
        }
    }
    for (; i < count; i++) {
        exponentials_of(1, x + i, highest, x + i);
        total[0] += x[i];
    }
    return (total[0] + total[1]) + (total[2] + total[3]);
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
