/* The two inner loops, which all time goes to. Included once for each instruction set.

   x, y and sums are rows of some channels, `stride` floats apart, at the vector that is worked on;
   y is seen with `cols` shifts by a column. */

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

/* Calls BODY(count) with a compile-time constant, so that sums live in registers and shifts are
   immediate. */
#define WITH_COUNT(count)                                                                          \
    switch (count) {                                                                               \
    case 1: BODY(1); break;                                                                        \
    case 2: BODY(2); break;                                                                        \
    case 3: BODY(3); break;                                                                        \
    case 4: BODY(4); break;                                                                        \
    case 5: BODY(5); break;                                                                        \
    case 6: BODY(6); break;                                                                        \
    case 7: BODY(7); break;                                                                        \
    case 8: BODY(8); break;                                                                        \
    case 9: BODY(9); break;                                                                        \
    case 10: BODY(10); break;                                                                      \
    case 11: BODY(11); break;                                                                      \
    case 12: BODY(12); break;                                                                      \
    default: BODY(13); break;                                                                      \
    }

INLINE void dots_of(const int count, const float *x, int64_t x_stride,
                    const float *y, int64_t stride, int64_t channels, V *dots) {
    V total[MOST_AT_ONCE];
    UNROLL for (int o = 0; o < count; o++) total[o] = (V){0};
    for (int64_t c = 0; c < channels; c++, x += x_stride, y += stride) {
        V factor = load(x);
        UNROLL for (int o = 0; o < count; o++) total[o] += factor * load_shifted(y, o);
    }
    UNROLL for (int o = 0; o < count; o++) dots[o] = total[o];
}

/* dots[o] = sum over channels of x times y shifted by column o. */
static void dots(const float *x, int64_t x_stride, const float *y, int64_t stride,
                 int64_t cols, int64_t channels, V *dots) {
    for (int64_t o = 0, count; o < cols; o += count) {
        count = chunk_of(cols - o);
#define BODY(n) dots_of(n, x, x_stride, y + o, stride, channels, dots + o)
        WITH_COUNT(count)
#undef BODY
    }
}

INLINE void add_weighted_of(const int count, const V *weights, const float *y,
                            int64_t stride, int64_t channels, float *sums, int64_t sums_stride) {
    V weight[MOST_AT_ONCE];
    UNROLL for (int o = 0; o < count; o++) weight[o] = weights[o];
    for (int64_t c = 0; c < channels; c++, y += stride, sums += sums_stride) {
        V total = load(sums);
        UNROLL for (int o = 0; o < count; o++) total += weight[o] * load_shifted(y, o);
        store(sums, total);
    }
}

/* For each channel, sums += sum over columns of weights[o] times y shifted by column o. */
static void add_weighted(const V *weights, const float *y, int64_t stride,
                         int64_t cols, int64_t channels, float *sums, int64_t sums_stride) {
    for (int64_t o = 0, count; o < cols; o += count) {
        count = chunk_of(cols - o);
#define BODY(n) add_weighted_of(n, weights + o, y + o, stride, channels, sums, sums_stride)
        WITH_COUNT(count)
#undef BODY
    }
}
