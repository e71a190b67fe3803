/* A row of queries, keys and values of a head, as the 1x1 convolution that they are. Included once for
   each instruction set, by kernels.h.

   Weights stand in panels of some columns (output channels), each [channels][columns of the panel]. */

#define PANEL 3 /* vectors of columns, at most */
/* out[p] = start + sum over channels of x[p] times weights, for some positions p; added to out[p] where
   there is no start. `step` and `weights_step` are from one channel to the next. Asks for the positions
   of the row `next`, where it is given, line by line in between. */
INLINE void project_tile(const int vectors, const int positions, const float *x, int64_t stride,
                         int64_t step, const float *weights, int64_t weights_step, int64_t channels,
                         const float *start, float *out, int64_t columns, const float *next) {
    V total[POSITIONS * PANEL], weight[PANEL];
    UNROLL for (int p = 0; p < positions; p++)
        UNROLL for (int v = 0; v < vectors; v++)
            total[p * vectors + v] = start ? load(start + v * LANES) : (V){0};
    for (int64_t line = 0; line < channels; line += LINE) {
        const int64_t end = line + LINE < channels ? line + LINE : channels;
        if (next)
            UNROLL for (int p = 0; p < positions; p++)
                prefetch_line(next + p * stride + line, false);
        UNROLL_BY_4 for (int64_t c = line; c < end; c++, weights += weights_step) {
            UNROLL for (int v = 0; v < vectors; v++) weight[v] = load(weights + v * LANES);
            UNROLL for (int p = 0; p < positions; p++)
                UNROLL for (int v = 0; v < vectors; v++)
                    total[p * vectors + v] += x[p * stride + c * step] * weight[v];
        }
    }
    /* Sums of sums: rounding does not grow with all that is added up. */
    if (!start)
        UNROLL for (int p = 0; p < positions; p++)
            UNROLL for (int v = 0; v < vectors; v++)
                total[p * vectors + v] += load(out + p * columns + v * LANES);
    UNROLL for (int p = 0; p < positions; p++)
        UNROLL for (int v = 0; v < vectors; v++)
            store(out + p * columns + v * LANES, total[p * vectors + v]);
}

/* A panel's columns of a row of positions. */
INLINE void project_panel(const int vectors, const float *x, int64_t stride, int64_t step,
                          int64_t width, const float *weights, int64_t weights_step,
                          int64_t channels, const float *start, float *out, int64_t columns,
                          const float *next) {
    for (int64_t p = 0, count; p < width; p += count) {
        count = width - p < POSITIONS ? width - p : POSITIONS;
#define TILE(positions)                                                                            \
    project_tile(vectors, positions, x + p * stride, stride, step, weights, weights_step,          \
                 channels, start, out + p * columns, columns, next ? next + p * stride : NULL)
        switch (count) {
        case 1: TILE(1); break;
        case 2: TILE(2); break;
        case 3: TILE(3); break;
#if POSITIONS == 8
        case 4: TILE(4); break;
        case 5: TILE(5); break;
        case 6: TILE(6); break;
        case 7: TILE(7); break;
#endif
        default: TILE(POSITIONS); break;
        }
#undef TILE
    }
}

INLINE int64_t panel_at(int64_t column, int64_t columns) {
    int64_t left = columns - column;
    return left < PANEL * LANES ? left : PANEL * LANES;
}

/* Calls BODY(vectors) with the constant for each panel of the columns, which `column` is the first of. */
#define EACH_PANEL(columns)                                                                        \
    for (int64_t column = 0, panel; column < columns; column += panel)                             \
        switch ((panel = panel_at(column, columns)) / LANES) {                                     \
        case 1: BODY(1); break;                                                                    \
        case 2: BODY(2); break;                                                                    \
        default: BODY(3); break;                                                                   \
        }

/* out[position][column] = start[column] + sum over channels of x[position][channel] times the weight;
   added to it where there is no start. `columns` is a multiple of LANES. `next`, where it is given, is the
   row that will be projected after this one. */
static void project_row(const float *x, const float *next, int64_t stride, int64_t width,
                        int64_t channels, const float *weights, int64_t columns,
                        const float *start, float *out) {
    const int64_t at_once = 256; /* channels: a panel is to stay in the first-level cache */
    for (int64_t c = 0, count; c < channels; c += count) {
        count = channels - c < at_once ? channels - c : at_once;
#define BODY(vectors)                                                                              \
    project_panel(vectors, x + c, stride, 1, width, weights + column * channels + c * panel,       \
                  vectors * LANES, count, c == 0 && start ? start + column : NULL, out + column,   \
                  columns, next && column + panel == columns ? next + c : NULL)
        EACH_PANEL(columns)
#undef BODY
    }
}

/* sums[channel][column] += sum over positions of x[position][channel] times rows[position][column]: what
   a row gives to the gradient of the weights. */
static void add_products(const float *x, int64_t stride, int64_t channels, int64_t positions,
                         const float *rows, int64_t columns, float *sums) {
#define BODY(vectors)                                                                              \
    project_panel(vectors, x, 1, stride, channels, rows + column, columns, positions, NULL,        \
                  sums + column, columns, NULL)
    EACH_PANEL(columns)
#undef BODY
}

/* Puts `count` columns from `first` on, of which `rows` has [count][channels], into panels. */
static void pack_panels(const float *rows, int64_t first, int64_t count, int64_t channels,
                        float *weights, int64_t columns) {
    for (int64_t column = 0, panel; column < columns; column += panel) {
        panel = panel_at(column, columns);
        int64_t from = first > column ? first : column;
        int64_t until = first + count < column + panel ? first + count : column + panel;
        if (from < until)
            transpose(rows + (from - first) * channels, channels, until - from, channels,
                      weights + column * channels + from - column, panel);
    }
}
