/* local_attention; its backward is in a file of its own. Included once for each instruction set, by
   kernels.h.

   A task is a band of rows of a head of an image. It walks down the rows of queries; the rows of
   keys and values in their window stand in a ring of scratch memory. Nothing else of the size of a
   map is kept: what scratch memory grows with is the width of the map. The task may project its
   queries, keys and values itself, row by row: then no map of theirs exists at all.

   Positions outside the map are zeros with a logit of OUTSIDE. That is finite, so that queries
   outside the map, whose results nobody reads, stay free of NaN. */

#define OUTSIDE (-1e30f)

typedef struct {
    const AttentionCall *call;
    bool backward;
    /* Rows by channel as they are, and those that are seen with shifts: they start at the first column
       that any shift reaches, so that most loads are aligned. */
    Layout plain, shifted;
    Layout kept;                      /* of weights and grad_logits: padded by whole vectors */
    Positions around;                 /* of rows by position */
    int64_t n, head, channel;         /* image, head and its first channel */
    int64_t turn;                     /* of the head among all */
    int64_t begin, end;               /* rows of the band */
    int64_t size, radius;             /* of the window */
    /* Of the rows and columns that any position can see: a window may be larger than the map. */
    int64_t row_radius, rows, col_radius, cols;
    int64_t first, last;              /* row offsets that any query of the current row can see */
    Map query_map, key_map, value_map; /* of this image and head; rings where they are projected */
    Map grad_query_map, grad_key_map, grad_value_map;
    float *projected;                 /* a row of [width][columns] */
    float *query_ring;                /* [row_radius + 1][width][head_dim] */
    float *projection;                /* [in_channels][columns], in panels */
    float *bias;                      /* [columns] */
    int64_t columns;                  /* 3 * head_dim, and some for whole vectors */
    int64_t next_projected;           /* row */
    int64_t next_row;                 /* of keys, the first that is not in the ring yet */
    /* [rows] of the current window, and the rings that they stand in: keys by channel; by position
       what is summed up, the values, or in the backward keys; values by channel in the backward. */
    const float **keys, **summed, **values;
    float *key_ring, *summed_ring, *value_ring;
    float *query, *grad_output;       /* plain rows of all channels */
    float *position_query, *position_grad_output, *result; /* rows by position */
    float **grad_keys, **grad_values; /* [rows] of the current window, by position */
    float *grad_key_ring, *grad_value_ring;
    float *logsumexp;                 /* a plain row of one channel */
    V *logits, *grads;                /* [rows * cols], of one vector of queries */
    V *row_logits, *col_logits;       /* [rows], [cols] */
    V *col_mask;                      /* [vectors * cols]: 0, or OUTSIDE */
    float *weights, *grad_logits;     /* [rows * cols] kept rows of one channel */
    ProjectionGradients projection_gradients;
    /* [size][depth], where the channels of the row or of the column embeddings are: the others are 0. */
    float *rel_rows, *rel_cols, *grad_rel_rows, *grad_rel_cols;
} Task;

/* Lays out `task` at `scratch` and returns the end of it. What has to be zero at first comes first;
   `zeros` is where that ends. */
static char *lay_out(Task *task, char *scratch, char **zeros) {
    const AttentionCall *call = task->call;
    const int64_t channels = call->head_dim, window = task->rows * task->cols;
    const int64_t plain = channels * task->plain.floats, by_position = task->around.floats;
    /* Loads of what is shifted reach a vector too far. */
    const int64_t ring = task->rows * channels * task->shifted.floats + LANES;
    const int64_t embeddings = task->size * task->around.depth;
    task->key_ring = take(&scratch, ring, sizeof(float));
    task->summed_ring = take(&scratch, task->rows * by_position, sizeof(float));
    task->query = take(&scratch, plain, sizeof(float));
    task->logsumexp = take(&scratch, task->plain.floats, sizeof(float));
    if (task->backward) {
        task->value_ring = take(&scratch, ring, sizeof(float));
        task->grad_output = take(&scratch, plain, sizeof(float));
        task->position_query = take(&scratch, by_position, sizeof(float));
        task->position_grad_output = take(&scratch, by_position, sizeof(float));
        task->weights = take(&scratch, window * task->kept.floats, sizeof(float));
        task->grad_logits = take(&scratch, window * task->kept.floats, sizeof(float));
        task->rel_rows = take(&scratch, embeddings, sizeof(float));
        task->rel_cols = take(&scratch, embeddings, sizeof(float));
        task->grad_rel_rows = take(&scratch, embeddings, sizeof(float));
        task->grad_rel_cols = take(&scratch, embeddings, sizeof(float));
        if (call->in_channels)
            lay_out_gradients(&task->projection_gradients, call, task->columns, task->row_radius + 1,
                              &scratch);
    }
    *zeros = scratch;
    task->keys = take(&scratch, task->rows, sizeof(float *));
    task->summed = take(&scratch, task->rows, sizeof(float *));
    task->result = take(&scratch, by_position, sizeof(float));
    task->logits = take(&scratch, window, sizeof(V));
    task->row_logits = take(&scratch, task->rows, sizeof(V));
    task->col_logits = take(&scratch, task->cols, sizeof(V));
    task->col_mask = take(&scratch, task->plain.vectors * task->cols, sizeof(V));
    if (call->in_channels) {
        task->projected = take(&scratch, call->width * task->columns, sizeof(float));
        task->projection = take(&scratch, call->in_channels * task->columns, sizeof(float));
        task->bias = take(&scratch, task->columns, sizeof(float));
        task->query_ring =
            take(&scratch, (task->row_radius + 1) * call->width * channels, sizeof(float));
    }
    if (!task->backward) return scratch;
    task->values = take(&scratch, task->rows, sizeof(float *));
    task->grad_keys = take(&scratch, task->rows, sizeof(float *));
    task->grad_values = take(&scratch, task->rows, sizeof(float *));
    task->grad_key_ring = take(&scratch, task->rows * by_position, sizeof(float));
    task->grad_value_ring = take(&scratch, task->rows * by_position, sizeof(float));
    task->grads = take(&scratch, window, sizeof(V));
    return scratch;
}

static void shape_task(Task *task, const AttentionCall *call, bool backward) {
    task->call = call;
    task->backward = backward;
    task->size = call->kernel_size;
    task->radius = call->kernel_size / 2;
    task->row_radius = task->radius < call->height ? task->radius : call->height - 1;
    task->rows = 2 * task->row_radius + 1;
    task->col_radius = task->radius < call->width ? task->radius : call->width - 1;
    task->cols = 2 * task->col_radius + 1;
    task->plain = make_layout(call->height, call->width);
    task->shifted = padded(task->plain, task->col_radius);
    task->kept = padded(task->plain, ceil_div(task->col_radius, LANES) * LANES);
    task->around = by_position(&task->plain, task->col_radius, call->head_dim);
    task->columns = ceil_div(3 * call->head_dim, LANES) * LANES;
}

static int64_t scratch_bytes(const AttentionCall *call, bool backward) {
    Task task;
    shape_task(&task, call, backward);
    char *const nowhere = (char *)64, *zeros;
    return lay_out(&task, nowhere, &zeros) - nowhere;
}

/* Which of the rows of a ring this row of the map is. */
INLINE int64_t slot_of(const Task *task, int64_t row) {
    int64_t slot = row % task->rows;
    return slot < 0 ? slot + task->rows : slot;
}

INLINE int64_t channel_slot(const Task *task, int64_t row) {
    return slot_of(task, row) * task->call->head_dim * task->shifted.floats;
}

INLINE int64_t position_slot(const Task *task, int64_t row) {
    return slot_of(task, row) * task->around.floats;
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
                            .stride_c = 1,
                            .stride_h = call->width * channels,
                            .stride_w = channels,
                            .dtype = FLOAT32,
                            .ring = task->row_radius + 1};
    task->key_map = (Map){.data = task->projected + channels,
                          .stride_c = 1,
                          .stride_w = columns,
                          .dtype = FLOAT32};
    task->value_map = task->key_map;
    task->value_map.data = task->projected + 2 * channels;
    task->next_projected = 0;
}

/* Puts a row of keys and values, at the maps' row `from`, where they are used. */
static void read_keys_values(Task *task, int64_t row, int64_t from) {
    const int64_t channels = task->call->head_dim;
    const int64_t by_channel = channel_slot(task, row), by_position = position_slot(task, row);
    const Map *const summed = task->backward ? &task->key_map : &task->value_map;
    read_by_channel(&task->shifted, &task->key_map, 0, 0, channels, from, task->key_ring + by_channel);
    read_by_position(&task->around, summed, 0, 0, channels, from, task->summed_ring + by_position);
    if (task->backward)
        read_by_channel(&task->shifted, &task->value_map, 0, 0, channels, from,
                        task->value_ring + by_channel);
}

/* Puts a row that was just projected where its queries, keys and values are used. */
static void distribute_row(Task *task, int64_t row) {
    const int64_t channels = task->call->head_dim;
    float *const queries = task->query_ring + row_start(&task->query_map, 0, 0, row);
    read_keys_values(task, row, 0);
    for (int64_t x = 0; x < task->plain.width; x++)
        copy(queries + x * channels, task->projected + x * task->columns, channels);
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

/* Which head is computed at a turn. In channels_last some heads share each cache line, which threads would
   have to take from each other: they come far apart. */
static int64_t head_at(const AttentionCall *call, int64_t turn) {
    const int64_t sharing = LINE / call->head_dim, lines = sharing > 1 ? call->heads / sharing : 0;
    if (turn >= sharing * lines) return turn;
    return turn % lines * sharing + turn / lines;
}

static void start_task(Task *task, const AttentionCall *call, int64_t index, char *scratch,
                       bool backward) {
    char *zeros;
    shape_task(task, call, backward);
    lay_out(task, scratch, &zeros);
    memset(scratch, 0, zeros - scratch);
    const Layout *s = &task->plain;
    task->turn = index / call->bands % call->heads;
    task->head = head_at(call, task->turn);
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
    const int64_t top = row - task->row_radius;
    /* Rows outside the map are left out. */
    task->first = top >= 0 ? 0 : -top;
    task->last =
        top + task->rows <= task->plain.height ? task->rows - 1 : task->plain.height - 1 - top;
    project_rows(task, top, row + task->row_radius + 1);
    for (int64_t a = task->first; a <= task->last; a++) {
        if (top + a >= task->next_row && !task->call->in_channels)
            read_keys_values(task, top + a, top + a);
        task->keys[a] = task->key_ring + channel_slot(task, top + a);
        task->summed[a] = task->summed_ring + position_slot(task, top + a);
        if (task->backward) task->values[a] = task->value_ring + channel_slot(task, top + a);
    }
    task->next_row = row + task->row_radius + 1;
}

/* q . r of a vector of queries at `query`, factorised into rows and columns, and the mask. */
static void position_logits(Task *task, const float *query, int64_t vector) {
    const AttentionCall *call = task->call;
    const int64_t half = call->head_dim / 2, stride = task->plain.floats, cols = task->cols;
    const int64_t begin = task->head * task->size + task->radius; /* offset 0 */
    const int64_t rows = begin - task->row_radius + task->first, columns = begin - task->col_radius;
    if (call->rel_rows) {
        embedding_dots(query, stride, call->rel_rows + rows * half, task->last + 1 - task->first,
                       half, task->row_logits + task->first);
        embedding_dots(query + half * stride, stride, call->rel_cols + columns * half, cols, half,
                       task->col_logits);
    } else {
        memset(task->row_logits, 0, task->rows * sizeof(V));
        memset(task->col_logits, 0, cols * sizeof(V));
    }
    for (int64_t o = 0; o < cols; o++) task->col_logits[o] += task->col_mask[vector * cols + o];
}

/* The logits of a vector of queries; those of the rows in the window only. */
static void compute_logits(Task *task, int64_t vector) {
    const int64_t at = vector * LANES, cols = task->cols;
    const float *query = task->query + at;
    position_logits(task, query, vector);
    for (int64_t a = task->first; a <= task->last; a++) {
        V *logits = task->logits + a * cols;
        for (int64_t o = 0; o < cols; o++) logits[o] = task->row_logits[a] + task->col_logits[o];
        add_dots(query, task->plain.floats, task->keys[a] + at, task->shifted.floats, cols,
                 task->call->head_dim, logits);
    }
}

/* Of a vector of queries in a row by position, the first. */
INLINE int64_t first_of(const Task *task, int64_t vector) {
    return (task->around.pad + vector * LANES) * task->around.depth;
}

/* Adds to `result`, scaled, the sum over the window of weights times the rows that are summed up. */
static void weighted_sum(Task *task, const V *weights, V scale, int64_t vector) {
    const int64_t depth = task->around.depth, first = task->first;
    add_weighted(weights + first * task->cols, scale, task->cols, task->summed + first,
                 task->last + 1 - first, vector * LANES * depth, depth,
                 task->result + first_of(task, vector));
}

/* A vector of the log-sum-exp, and of the output, which is added to `result`. */
static void attend(Task *task, int64_t vector) {
    const int64_t begin = task->first * task->cols, end = (task->last + 1) * task->cols;
    compute_logits(task, vector);
    const V highest = maximum_of(task->logits + begin, end - begin);
    const V total = exponentials(task->logits + begin, end - begin, highest);
    store(task->logsumexp + vector * LANES, highest + logarithm(total));
    weighted_sum(task, task->logits, 1.0f / total, vector);
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

/* Scales and shifts the channels of a row of results. */
static void scale_and_shift(Task *task) {
    const AttentionCall *call = task->call;
    const int64_t channels = call->head_dim, depth = task->around.depth;
    const float *scale = call->output_scale + task->channel;
    const float *shift = call->output_shift + task->channel;
    float *result = task->result + task->around.pad * depth;
    for (int64_t x = 0; x < task->plain.width; x++, result += depth)
        for (int64_t c = 0; c < channels; c++) result[c] = result[c] * scale[c] + shift[c];
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
        read_by_channel(s, &task.query_map, 0, 0, channels, row, task.query);
        if (call->residual.data)
            read_by_position(&task.around, &call->residual, task.n, task.channel, channels, row,
                             task.result);
        else
            memset(task.result, 0, task.around.floats * sizeof(float));
        for (int64_t vector = 0; vector < s->vectors; vector++) {
            prefetch(&task, row, vector, &call->output);
            if (call->residual.data)
                prefetch_row(s, &call->residual, task.n, task.channel, channels, row + 1, vector,
                             s->vectors, false);
            attend(&task, vector);
        }
        if (call->output_scale) scale_and_shift(&task);
        write_by_position(&task.around, &call->output, task.n, task.channel, channels, row, task.result);
        write_by_channel(s, &logsumexp, task.n, task.head, 1, row, task.logsumexp);
    }
}
