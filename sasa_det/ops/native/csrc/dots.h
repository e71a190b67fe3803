/* Dot products of rows by channel, a vector of positions at a time. Included once for each instruction
   set, by kernels.h. */

#if LANES == 16
#define MOST_DOTS 13 /* at once, with 32 registers */
#else
#define MOST_DOTS 8
#endif

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

/* dots[o] += sum over channels of x times y shifted by column o. Both are a vector of positions of rows
   whose channels are a stride apart. */
static void add_dots(const float *x, int64_t x_stride, const float *y, int64_t stride, int64_t cols,
                     int64_t channels, V *dots) {
    for (int64_t o = 0, count; o < cols; o += count) {
        count = chunk_of(cols - o, MOST_DOTS);
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
        count = chunk_of(offsets - o, MOST_DOTS);
#define BODY(n) embedding_dots_of(n, x, stride, embeddings + o * channels, channels, dots + o)
        UP_TO_13(count)
#undef BODY
    }
}
