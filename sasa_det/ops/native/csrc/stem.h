/* The stem's attention, pooled to the maximum of each block and two moments. Included once for each
   instruction set, by kernels.h.

   A vector holds the same position of LANES neighbouring blocks. With x the few channels of a pixel,
   the logits of a query p and a key s of its block are
       x_p . content . x_s + x_p . rel_rows[row of s - row of p] + x_p . rel_cols[...],
   all weights folded with those of the queries and keys beforehand: nothing of head_dim remains in
   them. Positions outside the image are zeros with a logit of OUTSIDE; they take no part in the sums
   either. A task is a band of rows of blocks of an image. */

typedef struct {
    const StemCall *call;
    int64_t n, begin, end;     /* image, and rows of blocks */
    int64_t vectors;           /* in a row of blocks */
    int64_t positions;         /* block_size * block_size */
    V *pixels;                 /* [vectors][positions][in_channels] of the current row of blocks */
    V *outside;                /* [vectors][positions]: 0, or OUTSIDE */
    V *inside;                 /* [vectors][positions]: 1, or 0 */
    V *values;                 /* [positions][head_dim] of one vector and head */
    V *weights;                /* [positions, queries][positions, keys] */
    V *outputs;                /* [positions][head_dim]; in the backward later their gradients */
    V *best, *best_at;         /* [head_dim]: the maximum and its position */
    V *sums;                   /* [2][out_channels] */
    V *grad_content;           /* [heads][in_channels][in_channels] */
    V *grad_rel_rows, *grad_rel_cols; /* [heads][2 * block_size - 1][in_channels] */
    V *grad_value_weights;     /* [heads][positions][head_dim][in_channels] */
} StemTask;

/* Lays out `task` at `scratch` and returns the end of it. */
static char *lay_out_stem(StemTask *task, char *scratch, bool backward) {
    const StemCall *c = task->call;
    const int64_t p = task->positions, offsets = 2 * c->block_size - 1;
    task->pixels = take(&scratch, task->vectors * p * c->in_channels, sizeof(V));
    task->outside = take(&scratch, task->vectors * p, sizeof(V));
    task->inside = take(&scratch, task->vectors * p, sizeof(V));
    task->values = take(&scratch, p * c->head_dim, sizeof(V));
    task->weights = take(&scratch, p * p, sizeof(V));
    task->outputs = take(&scratch, p * c->head_dim, sizeof(V));
    task->best = take(&scratch, c->head_dim, sizeof(V));
    task->best_at = take(&scratch, c->head_dim, sizeof(V));
    task->sums = take(&scratch, 2 * c->heads * c->head_dim, sizeof(V));
    if (!backward) return scratch;
    task->grad_content = take(&scratch, c->heads * c->in_channels * c->in_channels, sizeof(V));
    task->grad_rel_rows = take(&scratch, c->heads * offsets * c->in_channels, sizeof(V));
    task->grad_rel_cols = take(&scratch, c->heads * offsets * c->in_channels, sizeof(V));
    task->grad_value_weights =
        take(&scratch, c->heads * p * c->head_dim * c->in_channels, sizeof(V));
    return scratch;
}

static void shape_stem(StemTask *task, const StemCall *call) {
    task->call = call;
    task->positions = call->block_size * call->block_size;
    task->vectors = ceil_div(ceil_div(call->width, call->block_size), LANES);
}

static int64_t stem_scratch_bytes(const StemCall *call, bool backward) {
    StemTask task;
    shape_stem(&task, call);
    char *const nowhere = (char *)64;
    return lay_out_stem(&task, nowhere, backward) - nowhere;
}

static void start_stem(StemTask *task, const StemCall *call, int64_t index, char *scratch,
                       bool backward) {
    shape_stem(task, call);
    char *end = lay_out_stem(task, scratch, backward);
    memset(task->sums, 0, end - (char *)task->sums); /* the sums and what follows them */
    int64_t rows = ceil_div(call->height, call->block_size), band = index % call->bands;
    task->n = index / call->bands;
    task->begin = rows * band / call->bands;
    task->end = rows * (band + 1) / call->bands;
}

/* The pixels of a row of blocks. */
static void read_blocks(StemTask *task, int64_t row) {
    const StemCall *c = task->call;
    const Map *image = &c->image;
    for (int64_t t = 0; t < task->vectors; t++)
        for (int64_t p = 0; p < task->positions; p++) {
            int64_t y = row * c->block_size + p / c->block_size;
            int64_t i = t * task->positions + p;
            for (int64_t lane = 0; lane < LANES; lane++) {
                int64_t x = (t * LANES + lane) * c->block_size + p % c->block_size;
                bool inside = y < c->height && x < c->width;
                task->inside[i][lane] = inside;
                task->outside[i][lane] = inside ? 0 : OUTSIDE;
                int64_t at = task->n * image->stride_n + y * image->stride_h + x * image->stride_w;
                for (int64_t channel = 0; channel < c->in_channels; channel++)
                    task->pixels[i * c->in_channels + channel][lane] =
                        inside ? ((float *)image->data)[at + channel * image->stride_c] : 0;
            }
        }
}

/* Values of all positions of a vector of blocks. */
INLINE void stem_values(StemTask *task, const V *pixels, int64_t head, const int in,
                        const int head_dim) {
    const float *weight = task->call->value_weights + head * task->positions * head_dim * in;
    for (int64_t i = 0; i < task->positions * head_dim; i++) {
        V value = {0};
        for (int c = 0; c < in; c++) value += pixels[i / head_dim * in + c] * weight[i * in + c];
        task->values[i] = value;
    }
}

/* The softmax of one query over the keys of its block. */
INLINE void stem_softmax(StemTask *task, const V *pixels, const V *outside, int64_t head,
                         int64_t query, const int in, const int block) {
    const StemCall *call = task->call;
    const float *content = call->content + head * in * in;
    const V *x = pixels + query * in;
    V u[in], col_logits[block], *weights = task->weights + query * block * block;
    for (int j = 0; j < in; j++) {
        u[j] = (V){0};
        for (int i = 0; i < in; i++) u[j] += x[i] * content[i * in + j];
    }
    const int64_t row_offset = head * (2 * block - 1) + block - 1 - query / block;
    const int64_t col_offset = head * (2 * block - 1) + block - 1 - query % block;
    for (int b = 0; b < block; b++) {
        col_logits[b] = (V){0};
        for (int i = 0; i < in; i++)
            col_logits[b] += x[i] * call->rel_cols[(col_offset + b) * in + i];
    }
    V highest = splat(-INFINITY), total = {0};
    for (int a = 0; a < block; a++) {
        V row_logit = {0};
        for (int i = 0; i < in; i++)
            row_logit += x[i] * call->rel_rows[(row_offset + a) * in + i];
        for (int b = 0; b < block; b++) {
            const int s = a * block + b;
            V logit = outside[s] + row_logit + col_logits[b];
            for (int j = 0; j < in; j++) logit += u[j] * pixels[s * in + j];
            weights[s] = logit;
            highest = maximum(highest, logit);
        }
    }
    for (int s = 0; s < block * block; s++) {
        weights[s] = exponential(weights[s] - highest);
        total += weights[s];
    }
    V scale = 1.0f / total;
    for (int s = 0; s < block * block; s++) weights[s] *= scale;
}

/* The attention of one head in a vector of blocks, and its maximum in each block. */
INLINE void stem_attend(StemTask *task, int64_t vector, int64_t head, const int in, const int block,
                        const int head_dim) {
    const int positions = block * block;
    const V *pixels = task->pixels + vector * positions * in;
    const V *outside = task->outside + vector * positions;
    stem_values(task, pixels, head, in, head_dim);
    for (int d = 0; d < head_dim; d++) task->best[d] = splat(-INFINITY);
    for (int query = 0; query < positions; query++) {
        stem_softmax(task, pixels, outside, head, query, in, block);
        V total[head_dim], *outputs = task->outputs + query * head_dim;
        for (int d = 0; d < head_dim; d++) total[d] = (V){0};
        for (int s = 0; s < positions; s++)
            for (int d = 0; d < head_dim; d++)
                total[d] += task->weights[query * positions + s] * task->values[s * head_dim + d];
        for (int d = 0; d < head_dim; d++) {
            outputs[d] = total[d];
            V candidate = total[d] + outside[query];
            IntV better = candidate > task->best[d];
            task->best[d] = maximum(task->best[d], candidate);
            task->best_at[d] = (V)(((IntV)splat(query) & better) | ((IntV)task->best_at[d] & ~better));
        }
    }
}

/* The paper's stem, for which loops are compiled with constants. */
INLINE bool has_usual_shape(const StemCall *c) {
    return c->in_channels == 3 && c->block_size == 4 && c->head_dim == 8;
}

static void stem_attend_any(StemTask *task, int64_t vector, int64_t head) {
    const StemCall *c = task->call;
    if (has_usual_shape(c))
        stem_attend(task, vector, head, 3, 4, 8);
    else
        stem_attend(task, vector, head, c->in_channels, c->block_size, c->head_dim);
}

/* Copies between a vector of a channel's row of blocks in a map, and memory. */
INLINE float *blocks_at(const StemTask *task, const Map *map, int64_t channel, int64_t row,
                        int64_t vector) {
    return (float *)map->data + task->n * map->stride_n + channel * map->stride_c +
           row * map->stride_h + vector * LANES * map->stride_w;
}

INLINE int64_t lanes_used(const StemTask *task, int64_t vector) {
    int64_t left = ceil_div(task->call->width, task->call->block_size) - vector * LANES;
    return left < LANES ? left : LANES;
}

static void stem_forward_task(const void *arguments, int64_t index, char *scratch) {
    const StemCall *call = arguments;
    StemTask task;
    start_stem(&task, call, index, scratch, false);
    const int64_t head_dim = call->head_dim, channels = call->heads * head_dim;
    for (int64_t row = task.begin; row < task.end; row++) {
        read_blocks(&task, row);
        for (int64_t head = 0; head < call->heads; head++)
            for (int64_t vector = 0; vector < task.vectors; vector++) {
                stem_attend_any(&task, vector, head);
                for (int64_t i = 0; i < task.positions * head_dim; i++) {
                    int64_t channel = head * head_dim + i % head_dim;
                    V output = task.outputs[i] *
                               task.inside[vector * task.positions + i / head_dim];
                    task.sums[channel] += output;
                    task.sums[channels + channel] += output * output;
                }
                for (int64_t d = 0; d < head_dim; d++)
                    memcpy(blocks_at(&task, &call->maximum, head * head_dim + d, row, vector),
                           task.best + d, lanes_used(&task, vector) * sizeof(float));
            }
    }
    for (int64_t i = 0; i < 2 * channels; i++)
        call->sums[index * 2 * channels + i] = sum_of_lanes(task.sums[i]);
}
