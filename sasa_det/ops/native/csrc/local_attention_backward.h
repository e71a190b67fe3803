/* The backward of local_attention: weights are computed anew from the log-sum-exp. Included once for
   each instruction set, by kernels.h. */

/* Weights and gradients of the logits of a vector of queries, kept for the keys and values. */
static void logit_gradients(Task *task, int64_t vector) {
    const int64_t at = vector * LANES, cols = task->cols, kept = task->kept.floats;
    const int64_t begin = task->first * cols, end = (task->last + 1) * cols;
    V mean = {0};
    compute_logits(task, vector);
    exponentials(task->logits + begin, end - begin, load(task->logsumexp + at));
    for (int64_t a = task->first; a <= task->last; a++)
        dots(task->grad_output + at, task->plain.floats, task->values[a] + at,
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

/* What some channels of a vector of queries give by their dot products with embeddings: adds to the
   gradients of the queries, `result`, and of the embeddings, [channels][size]. */
static void embedding_gradients(const V *logits, int64_t first, int64_t last, const float *query,
                                const float *embeddings, float *result, int64_t stride,
                                int64_t channels, int64_t size, V *grad_embeddings) {
    for (int64_t c = 0; c < channels; c++) {
        const V factor = load(query + c * stride);
        V total = load(result + c * stride);
        for (int64_t offset = first; offset <= last; offset++) {
            total += logits[offset] * embeddings[offset * channels + c];
            grad_embeddings[c * size + offset] += logits[offset] * factor;
        }
        store(result + c * stride, total);
    }
}

/* A vector of the gradient of the query, and what it adds to that of the embeddings. */
static void query_gradient(Task *task, int64_t vector) {
    const AttentionCall *call = task->call;
    const int64_t at = vector * LANES, cols = task->cols, half = call->head_dim / 2;
    const int64_t stride = task->plain.floats, size = task->size;
    const int64_t embeddings = task->head * size * half, first_col = task->radius - task->col_radius;
    V *const rows = task->row_logits, *const columns = task->col_logits + first_col;
    weighted_sum(task, task->grads, task->keys, vector);
    if (!call->rel_rows) return;
    for (int64_t o = 0; o < cols; o++) columns[o] = (V){0};
    for (int64_t a = task->first; a <= task->last; a++) {
        rows[a] = (V){0};
        for (int64_t o = 0; o < cols; o++) {
            rows[a] += task->grads[a * cols + o];
            columns[o] += task->grads[a * cols + o];
        }
    }
    embedding_gradients(rows, task->first, task->last, task->query + at,
                        call->rel_rows + embeddings, task->result + at, stride, half, size,
                        task->grad_rel_rows);
    embedding_gradients(task->col_logits, first_col, first_col + cols - 1,
                        task->query + half * stride + at, call->rel_cols + embeddings,
                        task->result + half * stride + at, stride, half, size,
                        task->grad_rel_cols);
}

/* Adds to a row of the gradients of keys or values what a row of queries, seen from row offset `a`,
   gives: the sum over columns of `kept` weights times `rows`. */
static void add_to_row(Task *task, const float *kept, const float *rows, int64_t a, float *sums) {
    const int64_t cols = task->cols;
    for (int64_t vector = 0; vector < task->plain.vectors; vector++) {
        int64_t at = vector * LANES;
        V *weights = task->grads; /* done with by now */
        /* The query that sees a key o columns to its right stands o columns to the key's left. */
        for (int64_t o = 0; o < cols; o++)
            weights[o] = load(kept + (a * cols + cols - 1 - o) * task->kept.floats +
                              task->kept.pad + at + o - task->col_radius);
        add_weighted(weights, rows + at, task->shifted.floats, cols, task->call->head_dim,
                     sums + at, task->plain.floats);
    }
}

/* Adds what the current row of queries gives to the keys and values of its window. */
static void key_value_gradients(Task *task) {
    for (int64_t a = task->first; a <= task->last; a++) {
        add_to_row(task, task->grad_logits, task->shifted_query, a, task->grad_keys[a]);
        add_to_row(task, task->weights, task->shifted_grad_output, a, task->grad_values[a]);
    }
}

/* Writes the finished rows of the gradients' rings, those before `until`, if they are the band's. */
static void flush_gradients(const Task *task, int64_t *flushed, int64_t until) {
    const AttentionCall *call = task->call;
    const Layout *s = &task->plain;
    for (; *flushed < until; (*flushed)++) {
        const int64_t row = *flushed, slot = slot_of(task, s, row);
        if (row < task->begin || row >= task->end) continue;
        write_unpadded(s, &call->grad_key, task->n, task->channel, call->head_dim, row,
                       task->grad_key_ring + slot);
        write_unpadded(s, &call->grad_value, task->n, task->channel, call->head_dim, row,
                       task->grad_value_ring + slot);
    }
}

static void write_embedding_gradients(const Task *task, int64_t index) {
    const AttentionCall *call = task->call;
    const int64_t half = call->head_dim / 2, count = task->size * half;
    const int64_t part = (task->n * call->bands + index % call->bands) * 2 * call->heads;
    float *rows = call->grad_embeddings + (part + task->head) * count;
    float *cols = rows + call->heads * count;
    for (int64_t a = 0; a < task->size; a++)
        for (int64_t c = 0; c < half; c++) {
            rows[a * half + c] = sum_of_lanes(task->grad_rel_rows[c * task->size + a]);
            cols[a * half + c] = sum_of_lanes(task->grad_rel_cols[c * task->size + a]);
        }
}

static void backward_task(const void *arguments, int64_t index, char *scratch) {
    const AttentionCall *call = arguments;
    Task task;
    start_task(&task, call, index, scratch, true);
    const Layout *s = &task.plain;
    const Map logsumexp = logsumexp_map(call);
    const int64_t channels = call->head_dim, row_floats = channels * s->floats;
    const int64_t window = task.size * task.cols, count = task.size * (channels / 2);
    /* The padding stays zero. */
    memset(task.weights, 0, window * task.kept.floats * sizeof(float));
    memset(task.grad_logits, 0, window * task.kept.floats * sizeof(float));
    memset(task.grad_rel_rows, 0, count * sizeof(V));
    memset(task.grad_rel_cols, 0, count * sizeof(V));
    /* Queries of the neighbouring bands see keys of this one. */
    int64_t from = task.begin - task.radius, until = task.end + task.radius;
    if (from < 0) from = 0;
    if (until > call->height) until = call->height;
    int64_t flushed = from - task.radius;
    for (int64_t row = from; row < until; row++) {
        flush_gradients(&task, &flushed, row - task.radius);
        move_window(&task, row);
        for (int64_t a = 0; a < task.size; a++) {
            int64_t slot = slot_of(&task, s, row - task.radius + a);
            task.grad_keys[a] = task.grad_key_ring + slot;
            task.grad_values[a] = task.grad_value_ring + slot;
            if (row - task.radius + a < task.next_row) continue;
            memset(task.grad_keys[a], 0, row_floats * sizeof(float));
            memset(task.grad_values[a], 0, row_floats * sizeof(float));
        }
        task.next_row = row + task.radius + 1;
        read_padded(&task.shifted, &task.query_map, 0, 0, channels, row, task.shifted_query);
        read_padded(&task.shifted, &call->grad_output, task.n, task.channel, channels, row,
                    task.shifted_grad_output);
        strip_padding(&task.shifted, task.shifted_query, s, channels, task.query);
        strip_padding(&task.shifted, task.shifted_grad_output, s, channels, task.grad_output);
        read_padded(s, &logsumexp, task.n, task.head, 1, row, task.logsumexp);
        const bool own = row >= task.begin && row < task.end;
        for (int64_t vector = 0; vector < s->vectors; vector++) {
            prefetch(&task, row, vector, &call->grad_query);
            prefetch_row(s, &call->grad_output, task.n, task.channel, channels, row + 1, vector,
                         s->vectors, false);
            prefetch_row(s, &call->grad_key, task.n, task.channel, channels, row - task.radius,
                         vector, s->vectors, true);
            prefetch_row(s, &call->grad_value, task.n, task.channel, channels, row - task.radius,
                         vector, s->vectors, true);
            logit_gradients(&task, vector);
            if (own) query_gradient(&task, vector);
        }
        if (own)
            write_unpadded(s, &call->grad_query, task.n, task.channel, channels, row, task.result);
        key_value_gradients(&task);
    }
    flush_gradients(&task, &flushed, task.next_row);
    if (call->rel_rows) write_embedding_gradients(&task, index);
}
