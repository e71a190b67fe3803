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
    V *grad_best;              /* [head_dim] */
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
    task->grad_best = take(&scratch, c->head_dim, sizeof(V));
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

/* Which positions of a row of blocks lie in the image. */
static void mark_inside(StemTask *task, int64_t row) {
    const StemCall *c = task->call;
    for (int64_t t = 0; t < task->vectors; t++)
        for (int64_t p = 0; p < task->positions; p++) {
            int64_t y = row * c->block_size + p / c->block_size;
            int64_t i = t * task->positions + p;
            for (int64_t lane = 0; lane < LANES; lane++) {
                int64_t x = (t * LANES + lane) * c->block_size + p % c->block_size;
                bool inside = y < c->height && x < c->width;
                task->inside[i][lane] = inside;
                task->outside[i][lane] = inside ? 0 : OUTSIDE;
            }
        }
}

/* The pixels of a row of blocks; those outside the image are zero. */
INLINE void read_pixels(StemTask *task, int64_t row, const int in, const int block) {
    const StemCall *c = task->call;
    const Map *image = &c->image;
    if ((row + 1) * block > c->height)
        memset(task->pixels, 0, task->vectors * block * block * in * sizeof(V));
    for (int channel = 0; channel < in; channel++)
        for (int a = 0; a < block && row * block + a < c->height; a++) {
            const float *from = (const float *)image->data + task->n * image->stride_n +
                                channel * image->stride_c + (row * block + a) * image->stride_h;
            for (int64_t x = 0; x < task->vectors * LANES; x++) {
                float *to = (float *)(task->pixels + (x / LANES * block + a) * block * in + channel) +
                            x % LANES;
                for (int b = 0; b < block; b++) {
                    int64_t at = x * block + b;
                    to[b * in * LANES] = at < c->width ? from[at * image->stride_w] : 0;
                }
            }
        }
}

/* Values of all positions of a vector of blocks. */
INLINE void stem_values(StemTask *task, const V *pixels, int64_t head, const int in,
                        const int block, const int head_dim) {
    const float *weight = task->call->value_weights + head * block * block * head_dim * in;
    V *values = task->values;
    for (int s = 0; s < block * block; s++, pixels += in)
        for (int d = 0; d < head_dim; d++, weight += in) {
            V value = {0};
            for (int c = 0; c < in; c++) value += pixels[c] * weight[c];
            *values++ = value;
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
    V highest = splat(-INFINITY);
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
    V scale = 1.0f / exponentials(weights, block * block, highest);
    for (int s = 0; s < block * block; s++) weights[s] *= scale;
}

/* The outputs of `count` neighbouring queries. */
INLINE void stem_outputs(StemTask *task, int query, const int count, const int positions,
                         const int head_dim) {
    const V *weights = task->weights + query * positions, *value = task->values;
    V total[count * head_dim], *outputs = task->outputs + query * head_dim;
    for (int i = 0; i < count * head_dim; i++) total[i] = (V){0};
    for (int s = 0; s < positions; s++, value += head_dim)
        for (int q = 0; q < count; q++)
            for (int d = 0; d < head_dim; d++)
                total[q * head_dim + d] += weights[q * positions + s] * value[d];
    for (int i = 0; i < count * head_dim; i++) outputs[i] = total[i];
}

/* The attention of one head in a vector of blocks, and its maximum in each block. */
INLINE void stem_attend(StemTask *task, int64_t vector, int64_t head, const int in, const int block,
                        const int head_dim) {
    const int positions = block * block;
    const V *pixels = task->pixels + vector * positions * in;
    const V *outside = task->outside + vector * positions;
    stem_values(task, pixels, head, in, block, head_dim);
    int query = 0;
    for (; query + 2 <= positions; query += 2) {
        stem_softmax(task, pixels, outside, head, query, in, block);
        stem_softmax(task, pixels, outside, head, query + 1, in, block);
        stem_outputs(task, query, 2, positions, head_dim);
    }
    for (; query < positions; query++) {
        stem_softmax(task, pixels, outside, head, query, in, block);
        stem_outputs(task, query, 1, positions, head_dim);
    }
    for (int d = 0; d < head_dim; d++) {
        V best = splat(-INFINITY), best_at = {0};
        for (int p = 0; p < positions; p++) {
            V candidate = task->outputs[p * head_dim + d] + outside[p];
            IntV better = candidate > best;
            best = maximum(best, candidate);
            best_at = (V)(((IntV)splat(p) & better) | ((IntV)best_at & ~better));
        }
        task->best[d] = best;
        task->best_at[d] = best_at;
    }
}

/* Adds the outputs of a head in a vector of blocks, and their squares, to the sums. */
INLINE void stem_sums(StemTask *task, int64_t vector, int64_t head, const int block,
                      const int head_dim) {
    const StemCall *c = task->call;
    const V *inside = task->inside + vector * block * block;
    V *sums = task->sums + head * head_dim;
    for (int d = 0; d < head_dim; d++) {
        V total = {0}, squares = {0};
        for (int p = 0; p < block * block; p++) {
            V output = task->outputs[p * head_dim + d] * inside[p];
            total += output;
            squares += output * output;
        }
        sums[d] += total;
        sums[c->heads * head_dim + d] += squares;
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

static void stem_sums_any(StemTask *task, int64_t vector, int64_t head) {
    const StemCall *c = task->call;
    if (has_usual_shape(c))
        stem_sums(task, vector, head, 4, 8);
    else
        stem_sums(task, vector, head, c->block_size, c->head_dim);
}

static void read_blocks(StemTask *task, int64_t row) {
    const StemCall *c = task->call;
    /* Only the last row of blocks differs from the others. */
    if (row == task->begin || (row + 1) * c->block_size > c->height) mark_inside(task, row);
    if (has_usual_shape(c))
        read_pixels(task, row, 3, 4);
    else
        read_pixels(task, row, c->in_channels, c->block_size);
}

/* Where a map has a vector of a row of blocks, of a head's first channel. */
INLINE int64_t blocks_start(const StemTask *task, const Map *map, int64_t head, int64_t row,
                            int64_t vector) {
    return row_start(map, task->n, head * task->call->head_dim, row) + vector * LANES * map->stride_w;
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
                stem_sums_any(&task, vector, head);
                write_row(&call->maximum, blocks_start(&task, &call->maximum, head, row, vector),
                          head_dim, lanes_used(&task, vector), (const float *)task.best, LANES);
            }
    }
    for (int64_t i = 0; i < 2 * channels; i++)
        call->sums[index * 2 * channels + i] = sum_of_lanes(task.sums[i]);
}
