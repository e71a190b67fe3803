/* The backward of the stem's attention; the attention itself is computed anew. Included once for
   each instruction set, by kernels.h. */

/* Replaces the outputs of a vector of blocks by their gradients. */
static void stem_output_gradients(StemTask *task, int64_t row, int64_t vector, int64_t head) {
    const StemCall *c = task->call;
    read_row(&c->grad_maximum, blocks_start(task, &c->grad_maximum, head, row, vector), c->head_dim,
             lanes_used(task, vector), (float *)task->grad_best, LANES);
    for (int64_t d = 0; d < c->head_dim; d++) {
        int64_t channel = head * c->head_dim + d;
        float grad_sum = c->grad_sum[channel], grad_square = 2 * c->grad_square_sum[channel];
        for (int64_t p = 0; p < task->positions; p++) {
            V *output = task->outputs + p * c->head_dim + d;
            IntV chosen = task->best_at[d] == splat(p);
            V grad = (grad_sum + grad_square * *output) *
                     task->inside[vector * task->positions + p];
            *output = grad + (V)((IntV)task->grad_best[d] & chosen);
        }
    }
}

/* What one query adds to the gradients of content and position; `grads` are those of its logits. */
INLINE void stem_logit_gradients(StemTask *task, const V *pixels, const V *grads, int64_t head,
                                 int64_t query, const int in, const int block) {
    const V *x = pixels + query * in;
    const int64_t row_offset = head * (2 * block - 1) + block - 1 - query / block;
    const int64_t col_offset = head * (2 * block - 1) + block - 1 - query % block;
    V by_channel[in], by_col[block];
    for (int j = 0; j < in; j++) by_channel[j] = (V){0};
    for (int b = 0; b < block; b++) by_col[b] = (V){0};
    for (int a = 0; a < block; a++) {
        V by_row = {0};
        for (int b = 0; b < block; b++) {
            V grad = grads[a * block + b];
            by_row += grad;
            by_col[b] += grad;
            for (int j = 0; j < in; j++) by_channel[j] += grad * pixels[(a * block + b) * in + j];
        }
        for (int i = 0; i < in; i++)
            task->grad_rel_rows[(row_offset + a) * in + i] += by_row * x[i];
    }
    for (int b = 0; b < block; b++)
        for (int i = 0; i < in; i++)
            task->grad_rel_cols[(col_offset + b) * in + i] += by_col[b] * x[i];
    for (int i = 0; i < in; i++)
        for (int j = 0; j < in; j++)
            task->grad_content[(head * in + i) * in + j] += x[i] * by_channel[j];
}

INLINE void stem_gradients(StemTask *task, int64_t vector, int64_t head, const int in,
                           const int block, const int head_dim) {
    const int positions = block * block;
    const V *pixels = task->pixels + vector * positions * in;
    for (int s = 0; s < positions; s++) {
        V grad_value[head_dim];
        for (int d = 0; d < head_dim; d++) grad_value[d] = (V){0};
        for (int query = 0; query < positions; query++)
            for (int d = 0; d < head_dim; d++)
                grad_value[d] +=
                    task->weights[query * positions + s] * task->outputs[query * head_dim + d];
        V *grad_weight = task->grad_value_weights + (head * positions + s) * head_dim * in;
        for (int d = 0; d < head_dim; d++)
            for (int i = 0; i < in; i++)
                grad_weight[d * in + i] += grad_value[d] * pixels[s * in + i];
    }
    for (int query = 0; query < positions; query++) {
        const V *grad_output = task->outputs + query * head_dim;
        V *weights = task->weights + query * positions, mean = {0}, grads[positions];
        for (int s = 0; s < positions; s++) {
            grads[s] = (V){0};
            for (int d = 0; d < head_dim; d++)
                grads[s] += grad_output[d] * task->values[s * head_dim + d];
            mean += weights[s] * grads[s];
        }
        for (int s = 0; s < positions; s++) grads[s] = weights[s] * (grads[s] - mean);
        stem_logit_gradients(task, pixels, grads, head, query, in, block);
    }
}

static void stem_backward_task(const void *arguments, int64_t index, char *scratch) {
    const StemCall *c = arguments;
    StemTask task;
    start_stem(&task, c, index, scratch, true);
    for (int64_t row = task.begin; row < task.end; row++) {
        read_blocks(&task, row);
        for (int64_t head = 0; head < c->heads; head++)
            for (int64_t vector = 0; vector < task.vectors; vector++) {
                stem_attend_any(&task, vector, head);
                stem_output_gradients(&task, row, vector, head);
                if (has_usual_shape(c))
                    stem_gradients(&task, vector, head, 3, 4, 8);
                else
                    stem_gradients(&task, vector, head, c->in_channels, c->block_size, c->head_dim);
            }
    }
    const int64_t content = c->heads * c->in_channels * c->in_channels;
    const int64_t offsets = c->heads * (2 * c->block_size - 1) * c->in_channels;
    const int64_t values = c->heads * task.positions * c->head_dim * c->in_channels;
    float *grads = c->grad_weights + index * (content + 2 * offsets + values);
    for (int64_t i = 0; i < content; i++) *grads++ = sum_of_lanes(task.grad_content[i]);
    for (int64_t i = 0; i < offsets; i++) *grads++ = sum_of_lanes(task.grad_rel_rows[i]);
    for (int64_t i = 0; i < offsets; i++) *grads++ = sum_of_lanes(task.grad_rel_cols[i]);
    for (int64_t i = 0; i < values; i++) *grads++ = sum_of_lanes(task.grad_value_weights[i]);
}
