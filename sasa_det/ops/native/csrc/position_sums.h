/* Sums over positions, of rows by position. Included by weighted_sums.h once for each type of vector of
   channels: CHANNELS, of CHANNEL_LANES floats; IN_CHANNELS(name) is a function's name for it. */

/* sums[p] += scale[p] times the sum over rows and `count` offsets of weights times rows[p + offset], for
   some positions p and one or two vectors of channels. Weights are [row][offset], each a vector of
   positions. */
INLINE void IN_CHANNELS(add_weighted_of)(const int count, const int vectors, const float *weights,
                                         const float *scale, int64_t offsets,
                                         const float *const *rows, int64_t row_count,
                                         int64_t row_start, int64_t depth, float *sums) {
    CHANNELS total[POSITIONS * 2] = {{0}}, value[2];
    for (int64_t row = 0; row < row_count; row++, weights += offsets * LANES) {
        const float *x = rows[row] + row_start;
        /* Each vector is loaded once, for all positions that see it. */
        UNROLL for (int seen = 0; seen < POSITIONS + count - 1; seen++, x += depth) {
            UNROLL for (int v = 0; v < vectors; v++)
                value[v] = *(const CHANNELS *)(x + v * CHANNEL_LANES);
            UNROLL for (int p = 0; p < POSITIONS; p++) {
                const int offset = seen - p;
                if (offset < 0 || offset >= count) continue;
                const float weight = weights[offset * LANES + p];
                UNROLL for (int v = 0; v < vectors; v++) total[p * vectors + v] += weight * value[v];
            }
        }
    }
    UNROLL for (int p = 0; p < POSITIONS; p++)
        UNROLL for (int v = 0; v < vectors; v++)
            *(CHANNELS *)(sums + p * depth + v * CHANNEL_LANES) += scale[p] * total[p * vectors + v];
}

/* What a vector of queries gives by the dot products of a vector of its channels with `count`
   embeddings: adds to the gradients of the queries, `result`, and of the embeddings. */
INLINE void IN_CHANNELS(embedding_gradients_of)(const int count, const V *logits, const float *queries,
                                                const float *embeddings, int64_t depth, float *result,
                                                float *grad_embeddings) {
    CHANNELS total[MOST_OFFSETS], embedding[MOST_OFFSETS];
    UNROLL for (int o = 0; o < count; o++) {
        total[o] = *(const CHANNELS *)(grad_embeddings + o * depth);
        embedding[o] = *(const CHANNELS *)(embeddings + o * depth);
    }
    for (int p = 0; p < LANES; p++) {
        const CHANNELS query = *(const CHANNELS *)(queries + p * depth);
        CHANNELS sum = *(const CHANNELS *)(result + p * depth);
        UNROLL for (int o = 0; o < count; o++) {
            const float factor = ((const float *)(logits + o))[p];
            total[o] += factor * query;
            sum += factor * embedding[o];
        }
        *(CHANNELS *)(result + p * depth) = sum;
    }
    UNROLL for (int o = 0; o < count; o++) *(CHANNELS *)(grad_embeddings + o * depth) = total[o];
}

/* The two for any number of channels and offsets. */

static void IN_CHANNELS(add_weighted)(const V *weights, const float *scale, int64_t offsets,
                                      const float *const *rows, int64_t row_count,
                                      int64_t row_start, int64_t depth, float *sums) {
    for (int64_t p = 0; p < LANES; p += POSITIONS)
        for (int64_t c = 0; c < depth; c += 2 * CHANNEL_LANES)
            for (int64_t o = 0, count; o < offsets; o += count) {
                count = chunk_of(offsets - o, MOST_OFFSETS);
#define ADD(n, vectors)                                                                            \
    IN_CHANNELS(add_weighted_of)(n, vectors, (const float *)(weights + o) + p, scale + p, offsets, \
                                 rows, row_count, row_start + (p + o) * depth + c, depth,                \
                                 sums + p * depth + c)
                if (depth - c >= 2 * CHANNEL_LANES) {
#define BODY(n) ADD(n, 2)
                    UP_TO_7(count)
#undef BODY
                } else {
#define BODY(n) ADD(n, 1)
                    UP_TO_7(count)
#undef BODY
                }
#undef ADD
            }
}

static void IN_CHANNELS(embedding_gradients)(const V *logits, int64_t offsets, int64_t begin,
                                             int64_t end, const float *queries,
                                             const float *embeddings, int64_t depth, float *result,
                                             float *grad_embeddings) {
    for (int64_t c = begin / CHANNEL_LANES * CHANNEL_LANES; c < end; c += CHANNEL_LANES)
        for (int64_t o = 0, count; o < offsets; o += count) {
            count = chunk_of(offsets - o, MOST_OFFSETS);
#define BODY(n)                                                                                    \
    IN_CHANNELS(embedding_gradients_of)(n, logits + o, queries + c, embeddings + o * depth + c,    \
                                        depth, result + c, grad_embeddings + o * depth + c)
            UP_TO_7(count)
#undef BODY
        }
}
