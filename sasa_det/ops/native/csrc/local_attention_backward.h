/* The backward of local_attention: weights are computed anew from the log-sum-exp. Included once for
   each instruction set, by kernels.h. */

/* Weights and gradients of the logits of a vector of queries, kept for the keys and values. */
static void logit_gradients(Task *task, int64_t vector) {
    const int64_t at = vector * LANES, cols = task->cols, kept = task->kept.floats;
    const V logsumexp = load(task->logsumexp + at);
    V mean = {0};
    compute_logits(task, vector);
    for (int64_t a = task->first; a <= task->last; a++) {
        V *weights = task->logits + a * cols, *grads = task->grads + a * cols;
        dots(task->grad_output + at, task->plain.floats, task->values[a] + at,
             task->shifted.floats, cols, task->call->head_dim, grads);
        for (int64_t o = 0; o < cols; o++) {
            weights[o] = exponential(weights[o] - logsumexp);
            store(task->weights + (a * cols + o) * kept + task->kept.pad + at, weights[o]);
            mean += weights[o] * grads[o];
        }
    }
    for (int64_t i = task->first * cols; i < (task->last + 1) * cols; i++) {
        task->grads[i] = task->logits[i] * (task->grads[i] - mean);
        store(task->grad_logits + i * kept + task->kept.pad + at, task->grads[i]);
    }
}

/* Adds logit * embedding to the gradient of some channels of the query, and logit * query to that of
   the embedding. */
INLINE void embedding_gradients(V logit, const float *query, const float *embedding, float *result,
                                int64_t stride, int64_t channels, V *grad_embedding) {
    for (int64_t c = 0; c < channels; c++) {
        store(result + c * stride, load(result + c * stride) + logit * embedding[c]);
        grad_embedding[c] += logit * load(query + c * stride);
    }
}

/* A vector of the gradient of the query, and what it adds to that of the embeddings. */
static void query_gradient(Task *task, int64_t vector) {
    const AttentionCall *call = task->call;
    const Layout *s = &task->plain;
    const int64_t at = vector * LANES, cols = task->cols, half = call->head_dim / 2;
    const float *query = task->query + at;
    float *result = task->result + at;
    weighted_sum(task, task->grads, task->keys, vector);
    if (!call->rel_rows) return;
    for (int64_t a = task->first; a <= task->last; a++) {
        V logit = {0};
        for (int64_t o = 0; o < cols; o++) logit += task->grads[a * cols + o];
        embedding_gradients(logit, query, call->rel_rows + (task->head * task->size + a) * half,
                            result, s->floats, half, task->grad_rel_rows + a * half);
    }
    for (int64_t o = 0; o < cols; o++) {
        const int64_t offset = task->radius - task->col_radius + o;
        V logit = {0};
        for (int64_t a = task->first; a <= task->last; a++) logit += task->grads[a * cols + o];
        embedding_gradients(logit, query + half * s->floats,
                            call->rel_cols + (task->head * task->size + offset) * half,
                            result + half * s->floats, s->floats, half,
                            task->grad_rel_cols + offset * half);
    }
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
    const int64_t count = task->size * (call->head_dim / 2);
    const int64_t part = (task->n * call->bands + index % call->bands) * 2 * call->heads;
    float *rows = call->grad_embeddings + (part + task->head) * count;
    float *cols = rows + call->heads * count;
    for (int64_t i = 0; i < count; i++) {
        rows[i] = sum_of_lanes(task->grad_rel_rows[i]);
        cols[i] = sum_of_lanes(task->grad_rel_cols[i]);
    }
}

static void backward_task(const void *arguments, int64_t index, char *scratch) {
    const AttentionCall *call = arguments;
    Task task;
    start_task(&task, call, index, scratch, true);
    const Layout *s = &task.plain;
    const Map logsumexp = logsumexp_map(call);
    const int64_t channels = call->head_dim, row_floats = channels * s->floats, window = task.size * task.cols;
    const int64_t count = task.size * (call->head_dim / 2);
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
