/* Included once for each instruction set, by kernels.h. */

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLE
#endif
#endif

#ifdef HAS_SHUFFLE

typedef float V8 __attribute__((vector_size(32), may_alias, aligned(4)));

INLINE void transpose_8x8(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
    V8 a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = *(const V8 *)(from + i * from_stride);
    for (int i = 0; i < 8; i += 2) {
        b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            V8 x = b[i + j], y = b[i + j + 2];
            a[i + 2 * j] = __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13);
            a[i + 2 * j + 1] = __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        *(V8 *)(to + i * to_stride) =
            __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *(V8 *)(to + (i + 4) * to_stride) =
            __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

#if LANES == 16

/* Of four vectors, the i-th has the i-th 128 bits of all of them afterwards. */
INLINE void transpose_quarters(V *a, V *b, V *c, V *d) {
#define EVEN(x, y) __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define ODD(x, y) __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
    V even_ab = EVEN(*a, *b), odd_ab = ODD(*a, *b), even_cd = EVEN(*c, *d), odd_cd = ODD(*c, *d);
    *a = EVEN(even_ab, even_cd);
    *b = EVEN(odd_ab, odd_cd);
    *c = ODD(even_ab, even_cd);
    *d = ODD(odd_ab, odd_cd);
#undef EVEN
#undef ODD
}

INLINE void transpose_16x16(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
    V a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = load(from + i * from_stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12,
                                       28, 13, 29);
        b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11,
                                           27, 14, 30, 15, 31);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            V x = b[i + j], y = b[i + j + 2];
            a[i + 2 * j] = __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25,
                                                   12, 13, 28, 29);
            a[i + 2 * j + 1] = __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26,
                                                       27, 14, 15, 30, 31);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        transpose_quarters(&a[i], &a[i + 4], &a[i + 8], &a[i + 12]);
#pragma GCC unroll 4
        for (int j = 0; j < 16; j += 4) store(to + (i + j) * to_stride, a[i + j]);
    }
}

#endif

#else

INLINE void transpose_8x8(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) to[j * to_stride + i] = from[i * from_stride + j];
}

#endif

/* The columns from `first` on of some rows, by blocks of `size`; returns where it stopped. */
INLINE int64_t transpose_rows(const int size, const float *from, int64_t from_stride, int64_t first,
                              int64_t columns, float *to, int64_t to_stride) {
    for (; first + size <= columns; first += size) {
#if LANES == 16 && defined(HAS_SHUFFLE)
        if (size == 16) {
            transpose_16x16(from + first, from_stride, to + first * to_stride, to_stride);
            continue;
        }
#endif
        transpose_8x8(from + first, from_stride, to + first * to_stride, to_stride);
    }
    return first;
}

/* to[column][row] = from[row][column] */
static void transpose(const float *from, int64_t from_stride, int64_t rows, int64_t columns,
                      float *to, int64_t to_stride) {
    for (int64_t row = 0, count, first; row < rows; row += count) {
        const float *start = from + row * from_stride;
        first = 0;
        count = 8;
#if LANES == 16 && defined(HAS_SHUFFLE)
        if (rows - row >= 16) {
            count = 16;
            first = transpose_rows(16, start, from_stride, 0, columns, to + row, to_stride);
        }
#endif
        if (rows - row < 8) count = rows - row;
        for (int64_t half = 0, done; half < count; half += 8) {
            const float *rows_of_8 = start + half * from_stride;
            int64_t left = count - half < 8 ? count - half : 8;
            done = first;
            if (left == 8)
                done = transpose_rows(8, rows_of_8, from_stride, first, columns, to + row + half,
                                      to_stride);
            for (int64_t i = 0; i < left; i++)
                for (int64_t j = done; j < columns; j++)
                    to[j * to_stride + row + half + i] = rows_of_8[i * from_stride + j];
        }
    }
}
