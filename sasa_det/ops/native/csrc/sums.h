/* The two inner loops, which all time goes to. Included once for each instruction set.

   x, y and sums are rows of some channels, `stride` floats apart, at the vector that is worked on;
   y is seen with `cols` shifts by columns, which are `step` floats apart. */

#if LANES == 16
#define AT_ONCE 13 /* columns, with 32 registers */
#else
#define AT_ONCE 8
#endif
#define MOST_AT_ONCE 13
#define UNROLL _Pragma("GCC unroll 13")

INLINE int chunk_of(int64_t left) {
    if (left <= AT_ONCE) return (int)left;
    return left < 2 * AT_ONCE ? (int)((left + 1) / 2) : AT_ONCE;
}

/* Calls BODY(count, step) with compile-time constants, so that sums live in registers and shifts are
   immediate. */
#define WITH_COUNT(count, step)                                                                    \
    switch (count) {                                                                               \
    case 1: BODY(1, step); break;                                                                  \
    case 2: BODY(2, step); break;                                                                  \
    case 3: BODY(3, step); break;                                                                  \
    case 4: BODY(4, step); break;                                                                  \
    case 5: BODY(5, step); break;                                                                  \
    case 6: BODY(6, step); break;                                                                  \
    case 7: BODY(7, step); break;                                                                  \
    case 8: BODY(8, step); break;                                                                  \
    case 9: BODY(9, step); break;                                                                  \
    case 10: BODY(10, step); break;                                                                \
    case 11: BODY(11, step); break;                                                                \
    case 12: BODY(12, step); break;                                                                \
    default: BODY(13, step); break;                                                                \
    }
#define WITH_CONSTANTS(count, step)                                                                \
    switch (step) {                                                                                \
    case 1: WITH_COUNT(count, 1); break;                                                           \
    case 2: WITH_COUNT(count, 2); break;                                                           \
    case 4: WITH_COUNT(count, 4); break;                                                           \
    case 8: WITH_COUNT(count, 8); break;                                                           \
    default: WITH_COUNT(count, 16); break;                                                         \
    }

INLINE void dots_of(const int count, const int step, const float *x, int64_t x_stride,
                    const float *y, int64_t stride, int64_t channels, V *dots) {
    V total[MOST_AT_ONCE];
    UNROLL for (int o = 0; o < count; o++) total[o] = (V){0};
    for (int64_t c = 0; c < channels; c++, x += x_stride, y += stride) {
        V factor = load(x);
        UNROLL for (int o = 0; o < count; o++) total[o] += factor * load_shifted(y, o * step);
    }
    UNROLL for (int o = 0; o < count; o++) dots[o] = total[o];
}

/* dots[o] = sum over channels of x times y shifted by column o. */
static void dots(const float *x, int64_t x_stride, const float *y, int64_t stride, int64_t step,
                 int64_t cols, int64_t channels, V *dots) {
    for (int64_t o = 0, count; o < cols; o += count) {
        count = chunk_of(cols - o);
#define BODY(n, s) dots_of(n, s, x, x_stride, y + o * step, stride, channels, dots + o)
        WITH_CONSTANTS(count, step)
#undef BODY
    }
}

INLINE void add_weighted_of(const int count, const int step, const V *weights, const float *y,
                            int64_t stride, int64_t channels, float *sums, int64_t sums_stride) {
    V weight[MOST_AT_ONCE];
    UNROLL for (int o = 0; o < count; o++) weight[o] = weights[o];
    for (int64_t c = 0; c < channels; c++, y += stride, sums += sums_stride) {
        V total = load(sums);
        UNROLL for (int o = 0; o < count; o++) total += weight[o] * load_shifted(y, o * step);
        store(sums, total);
    }
}

/* For each channel, sums += sum over columns of weights[o] times y shifted by column o. */
static void add_weighted(const V *weights, const float *y, int64_t stride, int64_t step,
                         int64_t cols, int64_t channels, float *sums, int64_t sums_stride) {
    for (int64_t o = 0, count; o < cols; o += count) {
        count = chunk_of(cols - o);
#define BODY(n, s)                                                                                 \
    add_weighted_of(n, s, weights + o, y + o * step, stride, channels, sums, sums_stride)
        WITH_CONSTANTS(count, step)
#undef BODY
    }
}
