/* The inner loops, which most time goes to beside the projection. Included once for each instruction set. */

#if LANES == 16
#define AT_ONCE 13 /* dot products */
#define POSITIONS 8 /* whose channels are summed up at once, with 32 registers */
#else
#define AT_ONCE 8
#define POSITIONS 4
#endif
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_BY_4 _Pragma("GCC unroll 4")

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* How many of `left` to compute at once, if there may be `most`: about the same each time. */
INLINE int chunk_of(int64_t left, int most) {
    if (left <= most) return (int)left;
    return left < 2 * most ? (int)((left + 1) / 2) : most;
}

/* Calls BODY(count) with a compile-time constant, so that sums live in registers and shifts are
   immediate. */
#define UP_TO_7(count, otherwise)                                                                  \
    switch (count) {                                                                               \
    case 1: BODY(1); break;                                                                        \
    case 2: BODY(2); break;                                                                        \
    case 3: BODY(3); break;                                                                        \
    case 4: BODY(4); break;                                                                        \
    case 5: BODY(5); break;                                                                        \
    case 6: BODY(6); break;                                                                        \
    case 7: BODY(7); break;                                                                        \
    default: otherwise;                                                                            \
    }
#define UP_TO_13(count)                                                                            \
    UP_TO_7(count, switch (count) {                                                                \
        case 8: BODY(8); break;                                                                    \
        case 9: BODY(9); break;                                                                    \
        case 10: BODY(10); break;                                                                  \
        case 11: BODY(11); break;                                                                  \
        case 12: BODY(12); break;                                                                  \
        default: BODY(13); break;                                                                  \
    })

INLINE void add_dots_of(const int count, const float *x, int64_t x_stride, const float *y,
                        int64_t stride, int64_t channels, V *dots) {
    V total[13];
    UNROLL for (int o = 0; o < count; o++) total[o] = dots[o];
    for (int64_t c = 0; c < channels; c++, x += x_stride, y += stride) {
        V factor = load(x);
        UNROLL for (int o = 0; o < count; o++) total[o] += factor * load_shifted(y, o);
    }
    UNROLL for (int o = 0; o < count; o++) dots[o] = total[o];
}

/* dots[o] += sum over channels of x times y shifted by column o. Both are a vector of positions of rows of
   channels, which are a stride apart. */
static void add_dots(const float *x, int64_t x_stride, const float *y, int64_t stride, int64_t cols,
                     int64_t channels, V *dots) {
    for (int64_t o = 0, count; o < cols; o += count) {
        count = chunk_of(cols - o, AT_ONCE);
#define BODY(n) add_dots_of(n, x, x_stride, y + o, stride, channels, dots + o)
        UP_TO_13(count)
#undef BODY
    }
}

INLINE void embedding_dots_of(const int count, const float *x, int64_t stride,
                              const float *embeddings, int64_t channels, V *dots) {
    V total[13];
    UNROLL for (int o = 0; o < count; o++) total[o] = (V){0};
    for (int64_t c = 0; c < channels; c++) {
        V factor = load(x + c * stride);
        UNROLL for (int o = 0; o < count; o++) total[o] += factor * embeddings[o * channels + c];
    }
    UNROLL for (int o = 0; o < count; o++) dots[o] = total[o];
}

/* dots[o] = sum over channels of x, as above, times the embedding of offset o. */
static void embedding_dots(const float *x, int64_t stride, const float *embeddings, int64_t offsets,
                           int64_t channels, V *dots) {
    for (int64_t o = 0, count; o < offsets; o += count) {
        count = chunk_of(offsets - o, AT_ONCE);
#define BODY(n) embedding_dots_of(n, x, stride, embeddings + o * channels, channels, dots + o)
        UP_TO_13(count)
#undef BODY
    }
}
