/* The backward of local_attention: weights are computed anew from the log-sum-exp. Included once for
   each instruction set, by kernels.h. */

/* Weights and gradients of the logits of a vector of queries, kept for the keys and values. */
static void logit_gradients(Task *task, int64_t vector) {
    const int64_t at = vector * LANES, cols = task->cols, kept = task->kept.floats;
    const int64_t begin = task->first * cols, end = (task->last + 1) * cols;
    V mean = {0};
    compute_logits(task, vector);
    exponentials(task->logits + begin, end - begin, load(task->logsumexp + at));
    memset(task->grads + begin, 0, (end - begin) * sizeof(V));
    for (int64_t a = task->first; a <= task->last; a++)
        add_dots(task->grad_output + at, task->plain.floats, task->values[a] + at,
                 task->shifted.floats, cols, task->call->head_dim, task->grads + a * cols);
    for (int64_t i = begin; i < end; i++) {
        store(task->weights + i * kept + task->kept.pad + at, task->logits[i]);
        mean += task->logits[i] * task->grads[i];
    }
    for (int64_t i = begin; i < end; i++) {
        task->grads[i] = task->logits[i] * (task->grads[i] - mean);
        store(task->grad_logits + i * kept + task->kept.pad + at, task->grads[i]);
    }
}

/* A vector of the gradient of the query, and what it adds to that of the embeddings. */
static void query_gradient(Task *task, int64_t vector) {
    const int64_t cols = task->cols, channels = task->call->head_dim, first = task->first;
    const int64_t depth = task->around.depth, at = first_of(task, vector);
    const int64_t row = (task->radius - task->row_radius + first) * depth;
    const int64_t column = (task->radius - task->col_radius) * depth;
    V *const rows = task->row_logits, *const columns = task->col_logits;
    weighted_sum(task, task->grads, splat(1), vector);
    if (!task->call->rel_rows) return;
    for (int64_t o = 0; o < cols; o++) columns[o] = (V){0};
    for (int64_t a = first; a <= task->last; a++) {
        rows[a] = (V){0};
        for (int64_t o = 0; o < cols; o++) {
            rows[a] += task->grads[a * cols + o];
            columns[o] += task->grads[a * cols + o];
        }
    }
    embedding_gradients(rows + first, task->last + 1 - first, 0, channels / 2, task->position_query + at,
                        task->rel_rows + row, depth, task->result + at, task->grad_rel_rows + row);
    embedding_gradients(columns, cols, channels / 2, channels, task->position_query + at,
                        task->rel_cols + column, depth, task->result + at,
                        task->grad_rel_cols + column);
}

/* Adds to a row of the gradients of keys or values what a row of queries, seen from row offset `a`,
   gives: the sum over columns of `kept` weights times `row`. */
static void add_to_row(Task *task, const float *kept, const float *row, int64_t a, float *sums) {
    const int64_t cols = task->cols, depth = task->around.depth;
    V *const weights = task->grads; /* done with by now */
    for (int64_t vector = 0; vector < task->plain.vectors; vector++) {
        const int64_t at = task->kept.pad + vector * LANES - task->col_radius;
        /* The query that sees a key o columns to its right stands o columns to the key's left. */
        for (int64_t o = 0; o < cols; o++)
            weights[o] = load(kept + (a * cols + cols - 1 - o) * task->kept.floats + at + o);
        add_weighted(weights, splat(1), cols, &row, 1, vector * LANES * depth, depth,
                     sums + first_of(task, vector));
    }
}

/* Adds what the current row of queries gives to the keys and values of its window. */
static void key_value_gradients(Task *task) {
    for (int64_t a = task->first; a <= task->last; a++) {
        add_to_row(task, task->grad_logits, task->position_query, a, task->grad_keys[a]);
        add_to_row(task, task->weights, task->position_grad_output, a, task->grad_values[a]);
    }
}

/* Gives rows of the window that come into sight a place in the gradients' rings. */
static void move_gradients(Task *task, int64_t row, int64_t next_row) {
    const int64_t bytes = task->around.floats * sizeof(float);
    for (int64_t a = 0; a < task->rows; a++) {
        const int64_t slot = position_slot(task, row - task->row_radius + a);
        task->grad_keys[a] = task->grad_key_ring + slot;
        task->grad_values[a] = task->grad_value_ring + slot;
        if (row - task->row_radius + a < next_row) continue;
        memset(task->grad_keys[a], 0, bytes);
        memset(task->grad_values[a], 0, bytes);
    }
}

/* Makes the maps of the gradients of queries, keys and values those of the call; or, where they are
   projected here, a ring and the current block. */
static void start_gradients(Task *task) {
    const AttentionCall *call = task->call;
    const ProjectionGradients *g = &task->projection_gradients;
    if (!call->in_channels) {
        task->grad_query_map = map_from(&call->grad_query, task->n, task->channel);
        task->grad_key_map = map_from(&call->grad_key, task->n, task->channel);
        task->grad_value_map = map_from(&call->grad_value, task->n, task->channel);
        return;
    }
    pack_weights(g, call, task->head);
    task->grad_query_map = task->query_map;
    task->grad_query_map.data = g->query_ring;
    task->grad_key_map = (Map){.data = g->block + call->head_dim,
                               .stride_c = 1,
                               .stride_h = call->width * g->columns,
                               .stride_w = g->columns,
                               .dtype = FLOAT32,
                               .ring = g->rows};
    task->grad_value_map = task->grad_key_map;
    task->grad_value_map.data = g->block + 2 * call->head_dim;
}

/* Completes a row of the block, and uses up the block if that was the last one. */
static void finish_row(Task *task, int64_t row) {
    const AttentionCall *call = task->call;
    const ProjectionGradients *g = &task->projection_gradients;
    const float *const queries = g->query_ring + row_start(&task->grad_query_map, 0, 0, row);
    float *const to = block_row(g, call, row);
    for (int64_t x = 0; x < call->width; x++)
        copy(to + x * g->columns, queries + x * call->head_dim, call->head_dim);
    if ((row + 1) % g->rows && row + 1 < task->end) return;
    int64_t first = row - row % g->rows;
    if (first < task->begin) first = task->begin;
    const int64_t rows = row + 1 - first;
    if (call->grad_projection) add_to_weights(g, call, task->n, first, rows);
    if (call->grad_input.data) add_to_input(g, call, task->n, task->turn, first, rows);
}

/* Writes the finished rows of the gradients' rings, those before `until`, if they are the band's. */
static void flush_gradients(Task *task, int64_t *flushed, int64_t until) {
    const AttentionCall *call = task->call;
    for (; *flushed < until; (*flushed)++) {
        const int64_t row = *flushed, slot = position_slot(task, row);
        if (row < task->begin || row >= task->end) continue;
        write_by_position(&task->around, &task->grad_key_map, 0, 0, call->head_dim, row,
                          task->grad_key_ring + slot);
        write_by_position(&task->around, &task->grad_value_map, 0, 0, call->head_dim, row,
                          task->grad_value_ring + slot);
        if (call->in_channels) finish_row(task, row);
    }
}

/* Puts the embeddings where their channels stand in a row by position. */
static void read_embeddings(Task *task) {
    const AttentionCall *call = task->call;
    const int64_t half = call->head_dim / 2, depth = task->around.depth;
    if (!call->rel_rows) return;
    for (int64_t a = 0; a < task->size; a++) {
        const int64_t from = (task->head * task->size + a) * half;
        copy(task->rel_rows + a * depth, call->rel_rows + from, half);
        copy(task->rel_cols + a * depth + half, call->rel_cols + from, half);
    }
}

static void write_embedding_gradients(const Task *task, int64_t part) {
    const AttentionCall *call = task->call;
    const int64_t half = call->head_dim / 2, count = task->size * half, depth = task->around.depth;
    float *rows = call->grad_embeddings + (part * 2 * call->heads + task->head) * count;
    float *cols = rows + call->heads * count;
    if (!call->rel_rows) return;
    for (int64_t a = 0; a < task->size; a++) {
        copy(rows + a * half, task->grad_rel_rows + a * depth, half);
        copy(cols + a * half, task->grad_rel_cols + a * depth + half, half);
    }
}

/* Reads what the backward needs of a row of queries. */
static void read_queries(Task *task, int64_t row) {
    const AttentionCall *call = task->call;
    const int64_t channels = call->head_dim;
    const Map logsumexp = logsumexp_map(call);
    read_by_channel(&task->plain, &task->query_map, 0, 0, channels, row, task->query);
    read_by_position(&task->around, &task->query_map, 0, 0, channels, row, task->position_query);
    read_by_channel(&task->plain, &call->grad_output, task->n, task->channel, channels, row,
                    task->grad_output);
    read_by_position(&task->around, &call->grad_output, task->n, task->channel, channels, row,
                     task->position_grad_output);
    read_by_channel(&task->plain, &logsumexp, task->n, task->head, 1, row, task->logsumexp);
}

/* Asks, while a vector of this row is computed, for a part of what the backward reads and writes. */
static void prefetch_gradients(const Task *task, int64_t row, int64_t vector) {
    const AttentionCall *call = task->call;
    const Layout *s = &task->plain;
    const int64_t channels = call->head_dim;
    prefetch_row(s, &call->grad_output, task->n, task->channel, channels, row + 1, vector, s->vectors,
                 false);
    if (call->in_channels) return;
    prefetch(task, row, vector, &call->grad_query);
    const int64_t finished = row - task->row_radius;
    prefetch_row(s, &task->grad_key_map, 0, 0, channels, finished, vector, s->vectors, true);
    prefetch_row(s, &task->grad_value_map, 0, 0, channels, finished, vector, s->vectors, true);
}

static void backward_task(const void *arguments, int64_t index, char *scratch) {
    const AttentionCall *call = arguments;
    Task task;
    start_task(&task, call, index, scratch, true);
    start_gradients(&task);
    read_embeddings(&task);
    const Layout *s = &task.plain;
    const int64_t channels = call->head_dim;
    /* Queries of the neighbouring bands see keys of this one. */
    int64_t from = task.begin - task.row_radius, until = task.end + task.row_radius;
    if (from < 0) from = 0;
    if (until > call->height) until = call->height;
    int64_t flushed = from - task.row_radius;
    for (int64_t row = from; row < until; row++) {
        flush_gradients(&task, &flushed, row - task.row_radius);
        move_gradients(&task, row, task.next_row);
        move_window(&task, row);
        read_queries(&task, row);
        memset(task.result, 0, task.around.floats * sizeof(float));
        const bool own = row >= task.begin && row < task.end;
        for (int64_t vector = 0; vector < s->vectors; vector++) {
            prefetch_gradients(&task, row, vector);
            logit_gradients(&task, vector);
            if (own) query_gradient(&task, vector);
        }
        if (own)
            write_by_position(&task.around, &task.grad_query_map, 0, 0, channels, row, task.result);
        key_value_gradients(&task);
    }
    flush_gradients(&task, &flushed, task.next_row);
    const int64_t part = task.n * call->bands + index % call->bands;
    write_embedding_gradients(&task, part);
    if (call->grad_projection) write_gradients(&task.projection_gradients, call, part, task.head);
}
