/* local_attention; its backward is in a file of its own. Included once for each instruction set, by kernels.h.

   A task is a band of rows of a head of an image. It walks down the rows of queries; the rows of
   keys and values in their window stand in a ring of scratch memory. Nothing else of the size of a
   map is kept: what scratch memory grows with is the width of the map. The task may project its
   queries, keys and values itself, row by row: then no map of theirs exists at all.

   Positions outside the map are zeros with a logit of OUTSIDE. That is finite, so that queries
   outside the map, whose results nobody reads, stay free of NaN. */

#define OUTSIDE (-1e30f)

typedef struct {
    const AttentionCall *call;
    /* Rows as they are, and rows that are seen with shifts: those start at the first column that any
       shift reaches, so that most loads are aligned. */
    Layout plain, shifted;
    Layout kept;                      /* of weights and grad_logits: padded by whole vectors */
    int64_t n, head, channel;         /* image, head and its first channel */
    int64_t begin, end;               /* rows of the band */
    int64_t size, radius;             /* of the window */
    int64_t col_radius, cols;         /* of the columns that any position can see */
    int64_t first, last;              /* row offsets that any query of the current row can see */
    Map query_map, key_map, value_map; /* of this image and head; rings where they are projected */
    float *projected;                 /* ring of rows of [width][columns] */
    float *query_ring;                /* [radius + 1] plain rows */
    float *projection;                /* [in_channels][columns], in panels */
    float *bias;                      /* [columns] */
    int64_t columns;                  /* 3 * head_dim, and some for whole vectors */
    int64_t next_projected;           /* row */
    float **keys, **values;           /* [size] rows of the current window */
    float **grad_keys, **grad_values; /* [size] */
    int64_t next_row;                 /* of keys, the first that is not in the ring yet */
    float *key_ring, *value_ring, *grad_key_ring, *grad_value_ring;
    float *query, *grad_output, *result; /* plain rows of all channels */
    float *shifted_query, *shifted_grad_output;
    float *residual;                  /* a plain row, where there is one */
    float *logsumexp;                 /* a plain row of one channel */
    V *logits, *grads;                /* [size * cols], of one vector of queries */
    V *row_logits, *col_logits;       /* [size] */
    V *col_mask;                      /* [vectors * cols]: 0, or OUTSIDE */
    float *weights, *grad_logits;     /* [size * cols] kept rows of one channel */
    V *grad_rel_rows, *grad_rel_cols; /* [size * head_dim / 2] */
} Task;

/* Hands out scratch memory; counts it where there is none yet. */
static void *take(char **scratch, int64_t count, size_t size) {
    char *start = *scratch;
    *scratch = start + (count * size + 63) / 64 * 64;
    return start;
}

/* Lays out `task` at `scratch` and returns the end of it. */
static char *lay_out(Task *task, char *scratch, bool backward) {
    const int64_t channels = task->call->head_dim, window = task->size * task->cols;
    const int64_t plain = channels * task->plain.floats;
    /* Loads of what is shifted reach a vector too far. */
    const int64_t shifted = channels * task->shifted.floats, ring = task->size * shifted + LANES;
    task->keys = take(&scratch, task->size, sizeof(float *));
    task->values = take(&scratch, task->size, sizeof(float *));
    task->key_ring = take(&scratch, ring, sizeof(float));
    task->value_ring = take(&scratch, ring, sizeof(float));
    task->query = take(&scratch, plain, sizeof(float));
    task->result = take(&scratch, plain, sizeof(float));
    if (task->call->residual.data) task->residual = take(&scratch, plain, sizeof(float));
    task->logsumexp = take(&scratch, task->plain.floats, sizeof(float));
    task->logits = take(&scratch, window, sizeof(V));
    task->row_logits = take(&scratch, task->size, sizeof(V));
    task->col_logits = take(&scratch, task->size, sizeof(V));
    task->col_mask = take(&scratch, task->plain.vectors * task->cols, sizeof(V));
    if (task->call->in_channels) {
        task->projected = take(&scratch, task->plain.width * task->columns, sizeof(float));
        task->projection =
            take(&scratch, task->call->in_channels * task->columns, sizeof(float));
        task->bias = take(&scratch, task->columns, sizeof(float));
        task->query_ring = take(&scratch, (task->radius + 1) * plain, sizeof(float));
    }
    if (!backward) return scratch;
    task->grad_keys = take(&scratch, task->size, sizeof(float *));
    task->grad_values = take(&scratch, task->size, sizeof(float *));
    task->grad_key_ring = take(&scratch, task->size * plain, sizeof(float));
    task->grad_value_ring = take(&scratch, task->size * plain, sizeof(float));
    task->grad_output = take(&scratch, plain, sizeof(float));
    task->shifted_query = take(&scratch, shifted + LANES, sizeof(float));
    task->shifted_grad_output = take(&scratch, shifted + LANES, sizeof(float));
    task->grads = take(&scratch, window, sizeof(V));
    task->weights = take(&scratch, window * task->kept.floats, sizeof(float));
    task->grad_logits = take(&scratch, window * task->kept.floats, sizeof(float));
    task->grad_rel_rows = take(&scratch, task->size * channels / 2, sizeof(V));
    task->grad_rel_cols = take(&scratch, task->size * channels / 2, sizeof(V));
    return scratch;
}

static void shape_task(Task *task, const AttentionCall *call) {
    task->call = call;
    task->size = call->kernel_size;
    task->radius = call->kernel_size / 2;
    task->col_radius = task->radius < call->width ? task->radius : call->width - 1;
    task->cols = 2 * task->col_radius + 1;
    task->plain = make_layout(call->height, call->width);
    task->shifted = padded(task->plain, task->col_radius);
    task->kept = padded(task->plain, ceil_div(task->col_radius, LANES) * LANES);
    task->columns = ceil_div(3 * call->head_dim, LANES) * LANES;
}

static int64_t scratch_bytes(const AttentionCall *call, bool backward) {
    Task task;
    shape_task(&task, call);
    char *const nowhere = (char *)64;
    return lay_out(&task, nowhere, backward) - nowhere;
}

/* Where a row stands in a ring of rows of this layout. */
INLINE int64_t slot_of(const Task *task, const Layout *layout, int64_t row) {
    int64_t slot = row % task->size;
    return (slot < 0 ? slot + task->size : slot) * task->call->head_dim * layout->floats;
}

/* The same map from an image and a channel on. */
INLINE Map map_from(const Map *map, int64_t n, int64_t channel) {
    Map from = *map;
    int64_t start = n * map->stride_n + channel * map->stride_c;
    from.data = (char *)map->data + start * (map->dtype == FLOAT32 ? 4 : 2);
    return from;
}

/* Makes the map of queries a ring of rows that are projected when they are needed, and those of keys
   and values the row that is projected last. */
static void start_projection(Task *task) {
    const AttentionCall *call = task->call;
    const int64_t channels = call->head_dim, in = call->in_channels, columns = task->columns;
    memset(task->projection, 0, in * columns * sizeof(float));
    memset(task->bias, 0, columns * sizeof(float));
    for (int64_t part = 0; part < 3; part++) {
        int64_t row = (part * call->heads + task->head) * channels;
        pack_panels(call->projection + row * in, part * channels, channels, in, task->projection,
                    columns);
        if (call->bias)
            memcpy(task->bias + part * channels, call->bias + row, channels * sizeof(float));
    }
    task->query_map = (Map){.data = task->query_ring,
                            .stride_c = task->plain.floats,
                            .stride_h = channels * task->plain.floats,
                            .stride_w = 1,
                            .dtype = FLOAT32,
                            .ring = task->radius + 1};
    task->key_map = (Map){.data = task->projected + channels,
                          .stride_c = 1,
                          .stride_w = columns,
                          .dtype = FLOAT32};
    task->value_map = task->key_map;
    task->value_map.data = task->projected + 2 * channels;
    task->next_projected = 0;
}

/* Puts a row that was just projected where its queries, keys and values are used. */
static void distribute_row(Task *task, int64_t row) {
    const int64_t channels = task->call->head_dim, slot = slot_of(task, &task->shifted, row);
    read_padded(&task->shifted, &task->key_map, 0, 0, channels, row, task->key_ring + slot);
    read_padded(&task->shifted, &task->value_map, 0, 0, channels, row, task->value_ring + slot);
    transpose(task->projected, task->columns, task->plain.width, channels,
              task->query_ring + row_start(&task->query_map, 0, 0, row), task->plain.floats);
}

/* Projects the rows before `until` that are not in the ring yet; those before `from` are not needed. */
static void project_rows(Task *task, int64_t from, int64_t until) {
    const AttentionCall *call = task->call;
    const Layout *s = &task->plain;
    if (!call->in_channels) return;
    if (until > s->height) until = s->height;
    if (task->next_projected < from) task->next_projected = from;
    for (; task->next_projected < until; task->next_projected++) {
        const int64_t row = task->next_projected;
        const float *x =
            (const float *)call->input.data + row_start(&call->input, task->n, 0, row);
        project_row(x, x + call->input.stride_h, call->input.stride_w, s->width, call->in_channels,
                    task->projection, task->columns, task->bias, task->projected);
        distribute_row(task, row);
    }
}

static void start_task(Task *task, const AttentionCall *call, int64_t index, char *scratch,
                       bool backward) {
    shape_task(task, call);
    lay_out(task, scratch, backward);
    const Layout *s = &task->plain;
    task->head = index / call->bands % call->heads;
    task->n = index / call->bands / call->heads;
    task->channel = task->head * call->head_dim;
    int64_t band = index % call->bands;
    task->begin = call->height * band / call->bands;
    task->end = call->height * (band + 1) / call->bands;
    task->next_row = INT64_MIN;
    if (call->in_channels) {
        start_projection(task);
    } else {
        task->query_map = map_from(&call->query, task->n, task->channel);
        task->key_map = map_from(&call->key, task->n, task->channel);
        task->value_map = map_from(&call->value, task->n, task->channel);
    }
    for (int64_t t = 0; t < s->vectors; t++)
        for (int64_t o = 0; o < task->cols; o++)
            for (int lane = 0; lane < LANES; lane++) {
                int64_t x = t * LANES + lane + o - task->col_radius;
                task->col_mask[t * task->cols + o][lane] = x >= 0 && x < s->width ? 0 : OUTSIDE;
            }
}

/* Makes the window of the queries of `row` the current one. */
static void move_window(Task *task, int64_t row) {
    const AttentionCall *call = task->call;
    const Layout *s = &task->shifted;
    const int64_t top = row - task->radius, channels = call->head_dim;
    /* Rows outside the map are left out. */
    task->first = top >= 0 ? 0 : -top;
    task->last = top + task->size <= s->height ? task->size - 1 : s->height - 1 - top;
    project_rows(task, top, row + task->radius + 1);
    for (int64_t a = task->first; a <= task->last; a++) {
        int64_t slot = slot_of(task, s, top + a);
        task->keys[a] = task->key_ring + slot;
        task->values[a] = task->value_ring + slot;
        if (top + a < task->next_row || call->in_channels) continue;
        read_padded(s, &task->key_map, 0, 0, channels, top + a, task->keys[a]);
        read_padded(s, &task->value_map, 0, 0, channels, top + a, task->values[a]);
    }
}

INLINE V embedding_dot(const float *x, int64_t stride, const float *embedding, int64_t channels) {
    V total = {0};
    for (int64_t c = 0; c < channels; c++) total += load(x + c * stride) * embedding[c];
    return total;
}

/* q . r of a vector of queries at `query`, factorised into rows and columns, and the mask. */
static void position_logits(Task *task, const float *query, int64_t vector) {
    const AttentionCall *call = task->call;
    const int64_t half = call->head_dim / 2, stride = task->plain.floats;
    const int64_t first_col = task->radius - task->col_radius;
    for (int64_t a = task->first; a <= task->last; a++) {
        task->row_logits[a] = (V){0};
        if (call->rel_rows)
            task->row_logits[a] = embedding_dot(
                query, stride, call->rel_rows + (task->head * task->size + a) * half, half);
    }
    for (int64_t o = 0; o < task->cols; o++) {
        task->col_logits[o] = task->col_mask[vector * task->cols + o];
        if (call->rel_cols)
            task->col_logits[o] += embedding_dot(
                query + half * stride, stride,
                call->rel_cols + (task->head * task->size + first_col + o) * half, half);
    }
}

/* The logits of a vector of queries; those of the rows in the window only. Returns their maximum. */
static V compute_logits(Task *task, int64_t vector) {
    const int64_t at = vector * LANES, cols = task->cols;
    const float *query = task->query + at;
    position_logits(task, query, vector);
    V highest = splat(-INFINITY);
    for (int64_t a = task->first; a <= task->last; a++) {
        V *logits = task->logits + a * cols;
        dots(query, task->plain.floats, task->keys[a] + at, task->shifted.floats, cols,
             task->call->head_dim, logits);
        for (int64_t o = 0; o < cols; o++) {
            logits[o] += task->row_logits[a] + task->col_logits[o];
            highest = maximum(highest, logits[o]);
        }
    }
    return highest;
}

/* result = sum over the window of weights times the rows of keys or values. */
static void weighted_sum(Task *task, const V *weights, float *const *rows, int64_t vector) {
    const int64_t at = vector * LANES, channels = task->call->head_dim;
    float *result = task->result + at;
    for (int64_t c = 0; c < channels; c++) store(result + c * task->plain.floats, (V){0});
    for (int64_t a = task->first; a <= task->last; a++)
        add_weighted(weights + a * task->cols, rows[a] + at, task->shifted.floats, task->cols,
                     channels, result, task->plain.floats);
}

/* A vector of the output, and of the log-sum-exp. */
static void attend(Task *task, int64_t vector) {
    const int64_t at = vector * LANES, stride = task->plain.floats;
    const V highest = compute_logits(task, vector);
    const V total = exponentials(task->logits + task->first * task->cols,
                                 (task->last + 1 - task->first) * task->cols, highest);
    store(task->logsumexp + at, highest + logarithm(total));
    weighted_sum(task, task->logits, task->values, vector);
    V scale = 1.0f / total;
    for (int64_t c = 0; c < task->call->head_dim; c++) {
        float *result = task->result + c * stride + at;
        V sum = load(result) * scale;
        if (task->call->residual.data) sum += load(task->residual + c * stride + at);
        store(result, sum);
    }
}

INLINE Map logsumexp_map(const AttentionCall *call) {
    int64_t plane = call->height * call->width;
    return (Map){call->logsumexp, call->heads * plane, plane, call->width, 1, FLOAT32, 0};
}

/* Asks, while a vector of this row of queries is computed, for a part of what the next row reads and
   of what this row writes. */
static void prefetch(const Task *task, int64_t row, int64_t vector, const Map *to_write) {
    const AttentionCall *call = task->call;
    const Layout *s = &task->plain;
    const int64_t n = task->n, channel = task->channel, channels = call->head_dim;
    if (!call->in_channels) {
        prefetch_row(s, &task->query_map, 0, 0, channels, row + 1, vector, s->vectors, false);
        prefetch_row(s, &task->key_map, 0, 0, channels, task->next_row, vector, s->vectors, false);
        prefetch_row(s, &task->value_map, 0, 0, channels, task->next_row, vector, s->vectors,
                     false);
    }
    prefetch_row(s, to_write, n, channel, channels, row, vector, s->vectors, true);
}

static void forward_task(const void *arguments, int64_t index, char *scratch) {
    const AttentionCall *call = arguments;
    Task task;
    start_task(&task, call, index, scratch, false);
    const Layout *s = &task.plain;
    const Map logsumexp = logsumexp_map(call);
    const int64_t channels = call->head_dim;
    for (int64_t row = task.begin; row < task.end; row++) {
        move_window(&task, row);
        task.next_row = row + task.radius + 1;
        read_padded(s, &task.query_map, 0, 0, channels, row, task.query);
        if (call->residual.data)
            read_padded(s, &call->residual, task.n, task.channel, channels, row, task.residual);
        for (int64_t vector = 0; vector < s->vectors; vector++) {
            prefetch(&task, row, vector, &call->output);
            if (call->residual.data)
                prefetch_row(s, &call->residual, task.n, task.channel, channels, row + 1, vector,
                             s->vectors, false);
            attend(&task, vector);
        }
        write_unpadded(s, &call->output, task.n, task.channel, channels, row, task.result);
        write_unpadded(s, &logsumexp, task.n, task.head, 1, row, task.logsumexp);
    }
}
