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

/* A row of a map, first as `channels` rows of `width` floats, `stride` apart. */

INLINE float from_bfloat16(uint16_t value) {
    union { uint32_t bits; float value; } x = {.bits = (uint32_t)value << 16};
    return x.value;
}

INLINE uint16_t to_bfloat16(float value) {
    union { float value; uint32_t bits; } x = {.value = value};
    if (value != value) return 0x7fc0;
    return (uint16_t)((x.bits + 0x7fff + ((x.bits >> 16) & 1)) >> 16); /* to nearest, ties to even */
}

static void read_row(const Map *map, int64_t start, int64_t channels, int64_t width, float *row,
                     int64_t stride) {
    const float *floats = (const float *)map->data + start;
    const uint16_t *halves = (const uint16_t *)map->data + start;
    if (map->dtype == FLOAT32 && map->stride_w == 1) {
        for (int64_t c = 0; c < channels; c++)
            memcpy(row + c * stride, floats + c * map->stride_c, width * sizeof(float));
    } else if (map->dtype == FLOAT32 && map->stride_c == 1) {
        transpose(floats, map->stride_w, width, channels, row, stride);
    } else if (map->dtype == FLOAT32) {
        for (int64_t c = 0; c < channels; c++)
            for (int64_t x = 0; x < width; x++)
                row[c * stride + x] = floats[c * map->stride_c + x * map->stride_w];
    } else if (map->stride_w == 1) {
        for (int64_t c = 0; c < channels; c++)
            for (int64_t x = 0; x < width; x++)
                row[c * stride + x] = from_bfloat16(halves[c * map->stride_c + x]);
    } else {
        for (int64_t x = 0; x < width; x++)
            for (int64_t c = 0; c < channels; c++)
                row[c * stride + x] = from_bfloat16(halves[c * map->stride_c + x * map->stride_w]);
    }
}

static void write_row(const Map *map, int64_t start, int64_t channels, int64_t width,
                      const float *row, int64_t stride, bool add) {
    float *floats = (float *)map->data + start;
    uint16_t *halves = (uint16_t *)map->data + start;
    if (add) {
        for (int64_t c = 0; c < channels; c++)
            for (int64_t x = 0; x < width; x++)
                floats[c * map->stride_c + x * map->stride_w] += row[c * stride + x];
    } else if (map->dtype == FLOAT32 && map->stride_w == 1) {
        for (int64_t c = 0; c < channels; c++)
            memcpy(floats + c * map->stride_c, row + c * stride, width * sizeof(float));
    } else if (map->dtype == FLOAT32 && map->stride_c == 1) {
        transpose(row, stride, channels, width, floats, map->stride_w);
    } else if (map->dtype == FLOAT32) {
        for (int64_t c = 0; c < channels; c++)
            for (int64_t x = 0; x < width; x++)
                floats[c * map->stride_c + x * map->stride_w] = row[c * stride + x];
    } else if (map->stride_w == 1) {
        for (int64_t c = 0; c < channels; c++)
            for (int64_t x = 0; x < width; x++)
                halves[c * map->stride_c + x] = to_bfloat16(row[c * stride + x]);
    } else {
        for (int64_t x = 0; x < width; x++)
            for (int64_t c = 0; c < channels; c++)
                halves[c * map->stride_c + x * map->stride_w] = to_bfloat16(row[c * stride + x]);
    }
}

/* packed[x * pack + r] = rows[r][x], or the other way round. */
INLINE void interleave(const int pack, float *packed, float *rows, int64_t distance, int64_t width,
                       bool apart) {
    for (int64_t x = 0; x < width; x++)
        for (int r = 0; r < pack; r++) {
            if (apart)
                rows[r * distance + x] = packed[x * pack + r];
            else
                packed[x * pack + r] = rows[r * distance + x];
        }
}

/* Between packed rows of some channels and `pack` rows of their own in `apart`, each `width` floats a
   channel. */
static void repack(const Layout *s, int64_t channels, float *packed, float *apart, bool take_apart) {
    const int64_t distance = channels * s->width;
    for (int64_t c = 0; c < channels; c++) {
        float *row = packed + c * s->floats + s->pad, *rows = apart + c * s->width;
        switch (s->pack) {
        case 2: interleave(2, row, rows, distance, s->width, take_apart); break;
        case 4: interleave(4, row, rows, distance, s->width, take_apart); break;
        case 8: interleave(8, row, rows, distance, s->width, take_apart); break;
        default: interleave(16, row, rows, distance, s->width, take_apart); break;
        }
    }
}

INLINE int64_t row_start(const Map *map, int64_t n, int64_t channel, int64_t y) {
    if (map->ring) y %= map->ring;
    return n * map->stride_n + channel * map->stride_c + y * map->stride_h;
}

/* Rows first_row ... first_row + pack - 1 of some channels, zeros where they leave the map. `apart` is
   scratch memory for `pack` rows of `width` floats a channel. */
static void read_rows(const Layout *s, const Map *map, int64_t n, int64_t channel, int64_t channels,
                      int64_t first_row, float *rows, float *apart) {
    const int64_t used = s->pad + s->width * s->pack;
    for (int64_t c = 0; c < channels; c++) {
        memset(rows + c * s->floats, 0, s->pad * sizeof(float));
        memset(rows + c * s->floats + used, 0, (s->floats - used) * sizeof(float));
    }
    for (int64_t r = 0; r < s->pack; r++) {
        const int64_t y = first_row + r, size = channels * s->width;
        float *row = s->pack == 1 ? rows + s->pad : apart + r * size;
        int64_t stride = s->pack == 1 ? s->floats : s->width;
        if (y >= 0 && y < s->height)
            read_row(map, row_start(map, n, channel, y), channels, s->width, row, stride);
        else
            for (int64_t c = 0; c < channels; c++)
                memset(row + c * stride, 0, s->width * sizeof(float));
    }
    if (s->pack > 1) repack(s, channels, rows, apart, false);
}

/* Copies a row between layouts that differ in their padding only. */
static void strip_padding(const Layout *from, const float *rows, const Layout *to, int64_t channels,
                          float *stripped) {
    for (int64_t c = 0; c < channels; c++)
        memcpy(stripped + c * to->floats, rows + c * from->floats + from->pad,
               to->floats * sizeof(float));
}

/* The inverse of read_rows, for the rows from `begin` to `end` that lie in the map. `add` adds them
   to a float32 map. */
static void write_rows(const Layout *s, const Map *map, int64_t n, int64_t channel,
                       int64_t channels, int64_t first_row, float *rows, float *apart,
                       int64_t begin, int64_t end, bool add) {
    if (s->pack > 1) repack(s, channels, rows, apart, true);
    for (int64_t r = 0; r < s->pack; r++) {
        const int64_t y = first_row + r, stride = s->pack == 1 ? s->floats : s->width;
        if (y < begin || y >= end) continue;
        write_row(map, row_start(map, n, channel, y), channels, s->width,
                  s->pack == 1 ? rows + s->pad : apart + r * channels * s->width, stride, add);
    }
}

INLINE void prefetch_line(const char *p, const bool to_write) {
    if (to_write)
        __builtin_prefetch(p, 1, 2);
    else
        __builtin_prefetch(p, 0, 2);
}

/* Asks for a part of what read_rows will read or write_rows write, so that it is at hand by then: rows of a map lie too
   far apart for the processor to foresee them. */
static void prefetch_rows(const Layout *s, const Map *map, int64_t n, int64_t channel,
                          int64_t channels, int64_t first_row, int64_t part, int64_t parts,
                          const bool to_write) {
    const int64_t bytes = map->dtype == FLOAT32 ? 4 : 2, line = 64 / bytes;
    for (int64_t r = 0; r < s->pack; r++) {
        int64_t y = first_row + r;
        if (y < 0 || y >= s->height) continue;
        const char *data = (const char *)map->data + row_start(map, n, channel, y) * bytes;
        bool by_channel = map->stride_w == 1;
        int64_t outer = by_channel ? channels : s->width;
        int64_t inner = by_channel ? s->width : channels;
        int64_t stride = by_channel ? map->stride_c : map->stride_w;
        for (int64_t i = outer * part / parts; i < outer * (part + 1) / parts; i++)
            for (int64_t j = 0; j < inner; j += line)
                prefetch_line(data + (i * stride + j) * bytes, to_write);
    }
}
