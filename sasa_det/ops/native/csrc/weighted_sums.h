/* Sums over positions, of rows by position. Included once for each instruction set.

   Weights are [row][offset], each a vector of positions. */

/* ADD_WEIGHTED_OF defines a function for a type of vector of `lanes` channels, of which it takes one or
   two: sums[p] += sum over rows and `count` offsets of weights times rows[p + offset]. */
#define ADD_WEIGHTED_OF(name, Vector, lanes)                                                       \
    INLINE void name(const int count, const int vectors, const float *weights, int64_t offsets,    \
                     const float *const *rows, int64_t row_count, int64_t row_start,               \
                     int64_t depth, float *sums) {                                                 \
        Vector total[POSITIONS * 2] = {{0}}, value[2];                                             \
        for (int64_t row = 0; row < row_count; row++, weights += offsets * LANES) {                \
            const float *x = rows[row] + row_start;                                                \
            /* Each vector is loaded once, for all positions that see it. */                       \
            UNROLL for (int seen = 0; seen < POSITIONS + count - 1; seen++, x += depth) {          \
                UNROLL for (int v = 0; v < vectors; v++)                                           \
                    value[v] = *(const Vector *)(x + v * lanes);                                   \
                UNROLL for (int p = 0; p < POSITIONS; p++) {                                       \
                    const int offset = seen - p;                                                   \
                    if (offset < 0 || offset >= count) continue;                                   \
                    const float weight = weights[offset * LANES + p];                              \
                    UNROLL for (int v = 0; v < vectors; v++)                                       \
                        total[p * vectors + v] += weight * value[v];                               \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
        UNROLL for (int p = 0; p < POSITIONS; p++)                                                 \
            UNROLL for (int v = 0; v < vectors; v++)                                               \
                *(Vector *)(sums + p * depth + v * lanes) += total[p * vectors + v];               \
    }
ADD_WEIGHTED_OF(add_weighted_of, UnalignedV, LANES)
#if LANES == 16
typedef float HalfV __attribute__((vector_size(32), may_alias, aligned(4)));
ADD_WEIGHTED_OF(add_weighted_of_half, HalfV, 8)
#endif

/* How many channels a position has by position: whole vectors, or half of one if that is enough. */
INLINE int64_t depth_of(int64_t channels) {
    if (LANES == 16 && channels <= 8) return 8;
    return ceil_div(channels, LANES) * LANES;
}

/* sums[p] += sum over rows and offsets of weights times rows[p + offset], for a vector of positions of
   `depth` channels; rows are seen from `row_start` on. */
static void add_weighted(const V *weights, int64_t offsets, const float *const *rows, int64_t row_count,
                         int64_t row_start, int64_t depth, float *sums) {
    for (int64_t p = 0; p < LANES; p += POSITIONS)
        for (int64_t c = 0; c < depth; c += 2 * LANES)
            for (int64_t o = 0, count; o < offsets; o += count) {
                count = chunk_of(offsets - o, 7);
#define ADD(add, n, vectors)                                                                       \
    add(n, vectors, (const float *)(weights + o) + p, offsets, rows, row_count,                    \
        row_start + (p + o) * depth + c, depth, sums + p * depth + c)
                if (depth - c >= 2 * LANES) {
#define BODY(n) ADD(add_weighted_of, n, 2)
                    UP_TO_7(count, __builtin_unreachable())
#undef BODY
                } else if (depth - c >= LANES) {
#define BODY(n) ADD(add_weighted_of, n, 1)
                    UP_TO_7(count, __builtin_unreachable())
#undef BODY
                }
#if LANES == 16
                else {
#define BODY(n) ADD(add_weighted_of_half, n, 1)
                    UP_TO_7(count, __builtin_unreachable())
#undef BODY
                }
#endif
#undef ADD
            }
}
