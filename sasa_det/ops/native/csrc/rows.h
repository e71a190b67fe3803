/* Rows between maps and scratch memory. Included once for each instruction set, by kernels.h. */

/* How rows stand in scratch memory: `pack` rows share a vector, row r and column x being at
   pad + x * pack + r. A shift by a column then is a shift by `pack` floats, and a map narrower than
   a vector leaves few lanes empty. */
typedef struct {
    int64_t height, width;
    int64_t pack, vectors; /* rows in a vector, vectors in a row */
    int64_t pad, floats;   /* of a row: before its first column, and in all */
} Layout;

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static Layout make_layout(int64_t height, int64_t width) {
    Layout best = {.height = height, .width = width};
    int64_t least = INT64_MAX;
    for (int64_t pack = 1; pack <= LANES; pack *= 2) {
        int64_t vectors = ceil_div(width, LANES / pack);
        int64_t work = vectors * ceil_div(height, pack);
        if (work < least) {
            least = work;
            best.pack = pack;
            best.vectors = vectors;
        }
    }
    best.floats = best.vectors * LANES;
    return best;
}

/* The same with `pad` floats more at both ends, at least. */
static Layout padded(Layout layout, int64_t pad) {
    layout.pad = pad;
    layout.floats += ceil_div(2 * pad, LANES) * LANES;
    return layout;
}

INLINE float read(const Map *map, int64_t at) {
    if (map->dtype == FLOAT32) return ((const float *)map->data)[at];
    union { uint32_t bits; float value; } x = {.bits = (uint32_t)((const uint16_t *)map->data)[at] << 16};
    return x.value;
}

INLINE uint16_t to_bfloat16(float value) {
    union { float value; uint32_t bits; } x = {.value = value};
    if (value != value) return 0x7fc0;
    return (uint16_t)((x.bits + 0x7fff + ((x.bits >> 16) & 1)) >> 16); /* to nearest, ties to even */
}

/* Rows first_row ... first_row + pack - 1 of some channels, zeros where they leave the map. */
static void read_rows(const Layout *s, const Map *map, int64_t n, int64_t channel, int64_t channels,
                      int64_t first_row, float *rows) {
    const bool whole = s->pack == 1 && map->dtype == FLOAT32 && map->stride_w == 1;
    const bool inside = first_row >= 0 && first_row + s->pack <= s->height;
    for (int64_t c = 0; c < channels; c++) {
        float *row = rows + c * s->floats;
        int64_t used = s->pad + s->width * s->pack;
        if (!inside) memset(row, 0, s->floats * sizeof(float));
        memset(row, 0, s->pad * sizeof(float));
        memset(row + used, 0, (s->floats - used) * sizeof(float));
    }
    for (int64_t r = 0; r < s->pack; r++) {
        int64_t y = first_row + r;
        if (y < 0 || y >= s->height) continue;
        int64_t start = n * map->stride_n + channel * map->stride_c + y * map->stride_h;
        if (whole) {
            for (int64_t c = 0; c < channels; c++)
                memcpy(rows + c * s->floats + s->pad,
                       (const float *)map->data + start + c * map->stride_c,
                       s->width * sizeof(float));
        } else if (map->stride_w == 1) {
            for (int64_t c = 0; c < channels; c++)
                for (int64_t x = 0; x < s->width; x++)
                    rows[c * s->floats + s->pad + x * s->pack + r] =
                        read(map, start + c * map->stride_c + x);
        } else {
            for (int64_t x = 0; x < s->width; x++)
                for (int64_t c = 0; c < channels; c++)
                    rows[c * s->floats + s->pad + x * s->pack + r] =
                        read(map, start + c * map->stride_c + x * map->stride_w);
        }
    }
}

INLINE void write(const Map *map, int64_t at, float value, bool add) {
    if (map->dtype == BFLOAT16)
        ((uint16_t *)map->data)[at] = to_bfloat16(value);
    else if (add)
        ((float *)map->data)[at] += value;
    else
        ((float *)map->data)[at] = value;
}

/* The inverse of read_rows, for the rows from `begin` to `end` that lie in the map. `add` adds them
   to a float32 map. */
static void write_rows(const Layout *s, const Map *map, int64_t n, int64_t channel,
                       int64_t channels, int64_t first_row, const float *rows, int64_t begin,
                       int64_t end, bool add) {
    for (int64_t r = 0; r < s->pack; r++) {
        int64_t y = first_row + r;
        if (y < begin || y >= end) continue;
        int64_t start = n * map->stride_n + channel * map->stride_c + y * map->stride_h;
        if (map->stride_w == 1 && s->pack == 1 && map->dtype == FLOAT32 && !add) {
            for (int64_t c = 0; c < channels; c++)
                memcpy((float *)map->data + start + c * map->stride_c,
                       rows + c * s->floats + s->pad, s->width * sizeof(float));
        } else if (map->stride_w == 1) {
            for (int64_t c = 0; c < channels; c++)
                for (int64_t x = 0; x < s->width; x++)
                    write(map, start + c * map->stride_c + x,
                          rows[c * s->floats + s->pad + x * s->pack + r], add);
        } else {
            for (int64_t x = 0; x < s->width; x++)
                for (int64_t c = 0; c < channels; c++)
                    write(map, start + c * map->stride_c + x * map->stride_w,
                          rows[c * s->floats + s->pad + x * s->pack + r], add);
        }
    }
}
