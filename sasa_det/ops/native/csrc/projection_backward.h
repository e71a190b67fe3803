/* From the gradients of a head's queries, keys and values to those of its projection and of its input,
   block by block of rows, so that no map of the former exists. Included once for each instruction set, by
   kernels.h.

   All heads add to the same gradient of the input, one after another, so that no sum depends on who is
   first: each waits with its rows until the one before it, which has begun before it, is done there. */

#define BLOCK_POSITIONS 160 /* at least, where the map has them: the more, the less often sums are read */

typedef struct {
    int64_t rows;    /* of a block */
    int64_t columns; /* 3 * head_dim, and some for whole vectors */
    int64_t inputs;  /* in_channels, and some more, as grad_input has them */
    float *block;    /* [rows][width][columns]: gradients of queries, keys and values */
    float *weights;  /* [3 * head_dim][inputs], in panels */
    float *zeros;    /* [inputs] */
    float *sums;     /* [in_channels][columns]: the gradient of the weights */
    float *bias;     /* [columns]: its gradient */
    float *query_ring; /* [radius + 1][width][head_dim]: gradients of queries wait for those of keys */
} ProjectionGradients;

/* All of it has to be zero at first. */
static void lay_out_gradients(ProjectionGradients *gradients, const AttentionCall *call,
                              int64_t columns, int64_t ring_rows, char **scratch) {
    ProjectionGradients *const g = gradients;
    const int64_t rows = ceil_div(BLOCK_POSITIONS, call->width), channels = 3 * call->head_dim;
    g->rows = rows < call->height ? rows : call->height;
    g->columns = columns;
    g->inputs = ceil_div(call->in_channels, WIDEST) * WIDEST;
    g->block = take(scratch, g->rows * call->width * g->columns, sizeof(float));
    g->weights = take(scratch, channels * g->inputs, sizeof(float));
    g->zeros = take(scratch, g->inputs, sizeof(float));
    g->sums = take(scratch, call->in_channels * g->columns, sizeof(float));
    g->bias = take(scratch, g->columns, sizeof(float));
    g->query_ring = take(scratch, ring_rows * call->width * call->head_dim, sizeof(float));
}

/* The weights of a head, as those of a projection back to the input. */
static void pack_weights(const ProjectionGradients *gradients, const AttentionCall *call, int64_t head) {
    const int64_t in = call->in_channels, inputs = gradients->inputs, channels = call->head_dim;
    for (int64_t first = 0, panel; first < inputs; first += panel) {
        panel = panel_at(first, inputs);
        const int64_t left = in > first ? in - first : 0, count = left < panel ? left : panel;
        for (int64_t i = 0; i < 3 * channels; i++) {
            const int64_t row = (i / channels * call->heads + head) * channels + i % channels;
            copy(gradients->weights + first * 3 * channels + i * panel,
                 call->projection + row * in + first, count);
        }
    }
}

/* Waits until as many heads as come before this one are done. */
static void wait_for_turn(const int32_t *done, int64_t turn) {
    for (int64_t tries = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) != turn; tries++)
        if (tries > 1000) sched_yield(); /* there may be fewer processors than threads */
}

/* Where the block has this row of the map. */
INLINE float *block_row(const ProjectionGradients *gradients, const AttentionCall *call, int64_t row) {
    return gradients->block + row % gradients->rows * call->width * gradients->columns;
}

/* Adds to the gradients of the weights, and of the bias, what some rows of the block give. */
static void add_to_weights(const ProjectionGradients *gradients, const AttentionCall *call, int64_t n,
                           int64_t first, int64_t rows) {
    const Map *const input = &call->input;
    const int64_t positions = rows * call->width, columns = gradients->columns;
    const float *const block = block_row(gradients, call, first);
    /* A single row, or a single column, may have any stride. */
    const int64_t stride = call->height > 1 ? input->stride_h / call->width : input->stride_w;
    add_products((const float *)input->data + row_start(input, n, 0, first), stride,
                 call->in_channels, positions, block, columns, gradients->sums);
    if (!call->bias) return;
    for (int64_t c = 0; c < columns; c++) {
        float sum = 0;
        for (int64_t p = 0; p < positions; p++) sum += block[p * columns + c];
        gradients->bias[c] += sum;
    }
}

/* Adds to the gradient of the input what some rows of the block give. */
static void add_to_input(const ProjectionGradients *gradients, const AttentionCall *call, int64_t n,
                         int64_t turn, int64_t first, int64_t rows) {
    const ProjectionGradients *const g = gradients;
    const Map *const grad_input = &call->grad_input;
    int32_t *const done = call->heads_done + n * call->height + first;
    wait_for_turn(done, turn);
    project_row(block_row(g, call, first), NULL, g->columns, rows * call->width, 3 * call->head_dim,
                g->weights, g->inputs, turn == 0 ? g->zeros : NULL,
                (float *)grad_input->data + row_start(grad_input, n, 0, first));
    __atomic_store_n(done, (int32_t)turn + 1, __ATOMIC_RELEASE);
}

/* Writes the gradients of the weights, and of the bias, to the partial sums `part`. */
static void write_gradients(const ProjectionGradients *gradients, const AttentionCall *call,
                            int64_t part, int64_t head) {
    const int64_t in = call->in_channels, channels = call->head_dim, columns = gradients->columns;
    for (int64_t i = 0; i < 3; i++) {
        const int64_t row = ((part * 3 + i) * call->heads + head) * channels;
        transpose(gradients->sums + i * channels, columns, in, channels,
                  call->grad_projection + row * in, in);
        if (call->bias) copy(call->grad_bias + row, gradients->bias + i * channels, channels);
    }
}
