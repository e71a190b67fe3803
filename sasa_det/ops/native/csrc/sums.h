/* The three inner loops, which all time goes to. Included once for each instruction set.

   x, y, g are rows of some channels, `stride` floats apart, at the vector that is worked on. Columns
   are `step` floats apart; `cols` of them, from -radius on, are visited. */

#define AT_ONCE 8

INLINE int chunk_of(int64_t left) {
    if (left <= AT_ONCE) return (int)left;
    return left < 2 * AT_ONCE ? (int)((left + 1) / 2) : AT_ONCE;
}

/* Calls `body(count)` with a compile-time count, so that accumulators live in registers. */
#define WITH_CONSTANT(count, body)                                                                 \
    switch (count) {                                                                               \
    case 1: body(1); break;                                                                        \
    case 2: body(2); break;                                                                        \
    case 3: body(3); break;                                                                        \
    case 4: body(4); break;                                                                        \
    case 5: body(5); break;                                                                        \
    case 6: body(6); break;                                                                        \
    case 7: body(7); break;                                                                        \
    default: body(8); break;                                                                       \
    }

INLINE void dots_of(const int count, const float *x, const float *y, int64_t stride, int64_t step,
                    int64_t channels, V *dots) {
    V total[AT_ONCE];
    for (int o = 0; o < count; o++) total[o] = (V){0};
    for (int64_t c = 0; c < channels; c++) {
        V factor = load(x + c * stride);
        for (int o = 0; o < count; o++) total[o] += factor * load(y + c * stride + o * step);
    }
    for (int o = 0; o < count; o++) dots[o] = total[o];
}

/* dots[o] = sum over channels of x times y shifted by column o. */
static void dots(const float *x, const float *y, int64_t stride, int64_t step, int64_t radius,
                 int64_t channels, V *dots) {
    int64_t cols = 2 * radius + 1;
    for (int64_t o = 0, count; o < cols; o += count) {
        count = chunk_of(cols - o);
#define BODY(n) dots_of(n, x, y + (o - radius) * step, stride, step, channels, dots + o)
        WITH_CONSTANT(count, BODY)
#undef BODY
    }
}

INLINE void weighted_sum_of(const int count, const V *weights, float *const *rows, int64_t num_rows,
                            int64_t at, int64_t stride, int64_t step, int64_t cols, float *out) {
    V total[AT_ONCE];
    for (int c = 0; c < count; c++) total[c] = (V){0};
    for (int64_t a = 0; a < num_rows; a++) {
        const float *y = rows[a] + at;
        for (int64_t o = 0; o < cols; o++) {
            V weight = weights[a * cols + o];
            for (int c = 0; c < count; c++) total[c] += weight * load(y + c * stride + o * step);
        }
    }
    for (int c = 0; c < count; c++) store(out + c * stride, total[c]);
}

/* out = sum over the window of weights times rows[a] shifted by column o. */
static void weighted_sum(const V *weights, float *const *rows, int64_t num_rows, int64_t at,
                         int64_t stride, int64_t step, int64_t radius, int64_t channels,
                         float *out) {
    for (int64_t c = 0, count; c < channels; c += count) {
        count = chunk_of(channels - c);
        int64_t from = at + c * stride - radius * step;
        float *to = out + c * stride;
#define BODY(n) weighted_sum_of(n, weights, rows, num_rows, from, stride, step, 2 * radius + 1, to)
        WITH_CONSTANT(count, BODY)
#undef BODY
    }
}

INLINE void add_shifted_of(const int count, const float *weights, int64_t weights_stride,
                           const float *x, int64_t stride, int64_t step, int64_t channels,
                           float *g) {
    V weight[AT_ONCE];
    for (int o = 0; o < count; o++) weight[o] = load(weights + o * weights_stride - o * step);
    for (int64_t c = 0; c < channels; c++) {
        V total = load(g + c * stride);
        for (int o = 0; o < count; o++) total += weight[o] * load(x + c * stride - o * step);
        store(g + c * stride, total);
    }
}

/* g += sum over columns of weights[o] times x, both at the query that sees g at column o. */
static void add_shifted(const float *weights, int64_t weights_stride, const float *x,
                        int64_t stride, int64_t step, int64_t radius, int64_t channels, float *g) {
    int64_t cols = 2 * radius + 1;
    for (int64_t o = 0, count; o < cols; o += count) {
        count = chunk_of(cols - o);
        int64_t shift = (o - radius) * step;
        const float *w = weights + o * weights_stride - shift;
#define BODY(n) add_shifted_of(n, w, weights_stride, x - shift, stride, step, channels, g)
        WITH_CONSTANT(count, BODY)
#undef BODY
    }
}
