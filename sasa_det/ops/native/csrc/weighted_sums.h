/* Sums over positions, of rows by position: a position's channels fill whole vectors, or half of one if
   that is enough. Included once for each instruction set, by kernels.h. */

#define MOST_OFFSETS 7 /* at once */

#define CHANNELS UnalignedV
#define CHANNEL_LANES LANES
#define IN_CHANNELS(name) name##_of_vectors
#include "position_sums.h"
#undef CHANNELS
#undef CHANNEL_LANES
#undef IN_CHANNELS

#if LANES == 16
typedef float HalfV __attribute__((vector_size(32), may_alias, aligned(4)));
#define CHANNELS HalfV
#define CHANNEL_LANES 8
#define IN_CHANNELS(name) name##_of_halves
#include "position_sums.h"
#undef CHANNELS
#undef CHANNEL_LANES
#undef IN_CHANNELS
#endif

INLINE bool fills_half(int64_t channels) { return LANES == 16 && channels <= 8; }

INLINE int64_t depth_of(int64_t channels) {
    return fills_half(channels) ? 8 : ceil_div(channels, LANES) * LANES;
}

/* sums[p] += scale[p] times the sum over rows and offsets of weights times rows[p + offset], for a vector
   of positions of `depth` channels. Rows are seen from `row_start` on; weights are [row][offset], each a
   vector of positions. */
static void add_weighted(const V *weights, V scale, int64_t offsets, const float *const *rows,
                         int64_t row_count, int64_t row_start, int64_t depth, float *sums) {
    const float *const scales = (const float *)&scale;
#if LANES == 16
    if (fills_half(depth)) {
        add_weighted_of_halves(weights, scales, offsets, rows, row_count, row_start, depth, sums);
        return;
    }
#endif
    add_weighted_of_vectors(weights, scales, offsets, rows, row_count, row_start, depth, sums);
}

/* What a vector of queries gives by the dot products of its channels from `begin` to `end` with
   embeddings: adds to the gradients of the queries, `result`, and of the embeddings. */
static void embedding_gradients(const V *logits, int64_t offsets, int64_t begin, int64_t end,
                                const float *queries, const float *embeddings, int64_t depth,
                                float *result, float *grad_embeddings) {
#if LANES == 16
    if (fills_half(depth)) {
        embedding_gradients_of_halves(logits, offsets, begin, end, queries, embeddings, depth, result,
                                      grad_embeddings);
        return;
    }
#endif
    embedding_gradients_of_vectors(logits, offsets, begin, end, queries, embeddings, depth, result,
                                   grad_embeddings);
}
