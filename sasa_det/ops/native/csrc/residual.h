/* A 1x1 convolution, a residual and ReLU: how a bottleneck ends. Included once for each instruction set,
   by kernels.h.

   A task is a band of positions and a group of output channels, whose weights stay in the second-level
   cache. */

typedef struct {
    int64_t columns; /* of the group, and some for whole vectors */
    float *weights;  /* [in_channels][columns], in panels */
    float *bias;     /* [columns] */
    float *sums;     /* [POSITIONS_AT_ONCE][columns] */
} ResidualTask;

#define POSITIONS_AT_ONCE (4 * POSITIONS)

/* Output channels of a group: whole panels, about the same in each group, of 64 Ki weights at most. */
static int64_t group_channels(const ResidualCall *call) {
    const int64_t panel = PANEL * LANES, panels = ceil_div(call->out_channels, panel);
    const int64_t most = 65536 / (panel * call->in_channels);
    const int64_t groups = ceil_div(panels, most > 1 ? most : 1);
    return ceil_div(panels, groups) * panel;
}

static int64_t residual_groups(const ResidualCall *call) {
    return ceil_div(call->out_channels, group_channels(call));
}

static char *lay_out_residual(ResidualTask *task, const ResidualCall *call, char *scratch) {
    task->columns = group_channels(call);
    task->weights = take(&scratch, call->in_channels * task->columns, sizeof(float));
    task->bias = take(&scratch, task->columns, sizeof(float));
    task->sums = take(&scratch, POSITIONS_AT_ONCE * task->columns, sizeof(float));
    return scratch;
}

static int64_t residual_scratch_bytes(const ResidualCall *call) {
    ResidualTask task;
    char *const nowhere = (char *)64;
    return lay_out_residual(&task, call, nowhere) - nowhere;
}

/* Packs the weights of the group whose first output channel this is; returns how many it has. */
static int64_t pack_group(ResidualTask *task, const ResidualCall *call, int64_t first) {
    const int64_t in = call->in_channels, left = call->out_channels - first;
    const int64_t channels = left < task->columns ? left : task->columns;
    task->columns = ceil_div(channels, LANES) * LANES;
    memset(task->weights, 0, in * task->columns * sizeof(float));
    memset(task->bias, 0, task->columns * sizeof(float));
    pack_panels(call->weight + first * in, 0, channels, in, task->weights, task->columns);
    if (call->bias) memcpy(task->bias, call->bias + first, channels * sizeof(float));
    return channels;
}

/* NaN stays NaN. */
INLINE void rectified_sum(const float *x, const float *y, int64_t count, float *sum) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        store(sum + i, maximum((V){0}, load(x + i) + load(y + i)));
    for (; i < count; i++) {
        const float total = x[i] + y[i];
        sum[i] = total <= 0 ? 0 : total;
    }
}

static void residual_task(const void *arguments, int64_t index, char *scratch) {
    const ResidualCall *call = arguments;
    ResidualTask task;
    lay_out_residual(&task, call, scratch);
    const int64_t band = index % call->bands, in = call->in_channels, out = call->out_channels;
    const int64_t begin = call->positions * band / call->bands;
    const int64_t end = call->positions * (band + 1) / call->bands;
    const int64_t first = index / call->bands * task.columns;
    const int64_t channels = pack_group(&task, call, first);
    for (int64_t p = begin, count; p < end; p += count) {
        count = end - p < POSITIONS_AT_ONCE ? end - p : POSITIONS_AT_ONCE;
        const float *x = call->input + p * in;
        /* As many positions as these are asked for: none beyond the last. */
        const int64_t next = end - p - count < count ? 0 : count;
        for (int64_t i = 0; i < count; i++)
            for (int64_t c = 0; c < channels; c += LINE)
                prefetch_line(call->residual + (p + i) * out + first + c, false);
        project_row(x, x + next * in, in, count, in, task.weights, task.columns, task.bias, task.sums);
        for (int64_t i = 0; i < count; i++) {
            const int64_t at = (p + i) * out + first;
            rectified_sum(call->residual + at, task.sums + i * task.columns, channels,
                          call->output + at);
        }
    }
}
