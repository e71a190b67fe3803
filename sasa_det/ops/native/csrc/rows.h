/* Rows between maps and scratch memory. Included once for each instruction set, by kernels.h.

   In scratch memory a row stands by channel, [channel][x], for sums over its channels, or by position,
   [x][channel], for sums over its positions. */

/* Hands out scratch memory; counts it where there is none yet. */
static void *take(char **scratch, int64_t count, size_t size) {
    char *start = *scratch;
    *scratch = start + (count * size + 63) / 64 * 64;
    return start;
}

/* By channel: column x at pad + x, whole vectors in all. */
typedef struct {
    int64_t height, width;
    int64_t vectors;     /* in a row */
    int64_t pad, floats; /* of a channel: before its first column, and in all */
} Layout;

/* By position: column x at (pad + x) * depth, with `pad` columns more behind the whole vectors. */
typedef struct {
    int64_t width, pad;
    int64_t depth;  /* of a position: its channels, and some for whole vectors */
    int64_t floats; /* of a row */
} Positions;

static Layout make_layout(int64_t height, int64_t width) {
    int64_t vectors = ceil_div(width, LANES);
    return (Layout){height, width, .vectors = vectors, .floats = vectors * LANES};
}

/* The same with `pad` floats more at both ends, at least. */
static Layout padded(Layout layout, int64_t pad) {
    layout.pad = pad;
    layout.floats += ceil_div(2 * pad, LANES) * LANES;
    return layout;
}

static Positions by_position(const Layout *layout, int64_t pad, int64_t channels) {
    const int64_t depth = depth_of(channels);
    return (Positions){layout->width, pad, depth, .floats = (layout->vectors * LANES + 2 * pad) * depth};
}

INLINE float from_bfloat16(uint16_t value) {
    union { uint32_t bits; float value; } x = {.bits = (uint32_t)value << 16};
    return x.value;
}

INLINE uint16_t to_bfloat16(float value) {
    union { float value; uint32_t bits; } x = {.value = value};
    if (value != value) return 0x7fc0;
    return (uint16_t)((x.bits + 0x7fff + ((x.bits >> 16) & 1)) >> 16); /* to nearest, ties to even */
}

INLINE void copy(float *to, const float *from, int64_t count) {
    for (; count >= LANES; count -= LANES, to += LANES, from += LANES) store(to, load(from));
#if LANES == 16
    if (count >= 8) {
        *(HalfV *)to = *(const HalfV *)from;
        count -= 8, to += 8, from += 8;
    }
#endif
    for (; count > 0; count--) *to++ = *from++;
}

/* A row of a map, as `channels` rows of `width` floats, `stride` apart. */
static void read_row(const Map *map, int64_t start, int64_t channels, int64_t width, float *row,
                     int64_t stride) {
    const float *floats = (const float *)map->data + start;
    const uint16_t *halves = (const uint16_t *)map->data + start;
    if (map->dtype == FLOAT32 && map->stride_w == 1) {
        for (int64_t c = 0; c < channels; c++)
            copy(row + c * stride, floats + c * map->stride_c, width);
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
                      const float *row, int64_t stride) {
    float *floats = (float *)map->data + start;
    uint16_t *halves = (uint16_t *)map->data + start;
    if (map->dtype == FLOAT32 && map->stride_w == 1) {
        for (int64_t c = 0; c < channels; c++)
            copy(floats + c * map->stride_c, row + c * stride, width);
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

INLINE int64_t row_start(const Map *map, int64_t n, int64_t channel, int64_t y) {
    if (map->ring) y %= map->ring;
    return n * map->stride_n + channel * map->stride_c + y * map->stride_h;
}

/* Row y of some channels, which is in the map; padding is left alone. */
static void read_by_channel(const Layout *s, const Map *map, int64_t n, int64_t channel,
                            int64_t channels, int64_t y, float *row) {
    read_row(map, row_start(map, n, channel, y), channels, s->width, row + s->pad, s->floats);
}

static void write_by_channel(const Layout *s, const Map *map, int64_t n, int64_t channel,
                             int64_t channels, int64_t y, const float *row) {
    write_row(map, row_start(map, n, channel, y), channels, s->width, row + s->pad, s->floats);
}

INLINE Map transposed(const Map *map) {
    Map swapped = *map;
    swapped.stride_c = map->stride_w;
    swapped.stride_w = map->stride_c;
    return swapped;
}

static void read_by_position(const Positions *s, const Map *map, int64_t n, int64_t channel,
                             int64_t channels, int64_t y, float *row) {
    const Map swapped = transposed(map);
    read_row(&swapped, row_start(map, n, channel, y), s->width, channels, row + s->pad * s->depth,
             s->depth);
}

static void write_by_position(const Positions *s, const Map *map, int64_t n, int64_t channel,
                              int64_t channels, int64_t y, const float *row) {
    const Map swapped = transposed(map);
    write_row(&swapped, row_start(map, n, channel, y), s->width, channels, row + s->pad * s->depth,
              s->depth);
}

#define LINE 16 /* floats in a cache line */

INLINE void prefetch_line(const void *p, const bool to_write) {
    if (to_write)
        __builtin_prefetch(p, 1, 2);
    else
        __builtin_prefetch(p, 0, 2);
}

/* Asks for a part of row y, where the map has it, so that it is at hand when it is read or written: rows
   of a map lie too far apart for the processor to foresee them. */
static void prefetch_row(const Layout *s, const Map *map, int64_t n, int64_t channel,
                         int64_t channels, int64_t y, int64_t part, int64_t parts,
                         const bool to_write) {
    if (y < 0 || y >= s->height) return;
    const int64_t bytes = map->dtype == FLOAT32 ? 4 : 2, line = 64 / bytes;
    const char *data = (const char *)map->data + row_start(map, n, channel, y) * bytes;
    const bool by_channel = map->stride_w == 1;
    const int64_t outer = by_channel ? channels : s->width;
    const int64_t inner = by_channel ? s->width : channels;
    const int64_t stride = by_channel ? map->stride_c : map->stride_w;
    for (int64_t i = outer * part / parts; i < outer * (part + 1) / parts; i++)
        for (int64_t j = 0; j < inner; j += line)
            prefetch_line(data + (i * stride + j) * bytes, to_write);
}
