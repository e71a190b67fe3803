/* Loops whose counts have to be known to the compiler, so that sums live in registers and shifts and
   addresses are immediate. Included once for each instruction set, by kernels.h. */

#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_BY_4 _Pragma("GCC unroll 4")

#if LANES == 16
#define POSITIONS 8 /* whose channels are summed up at once, with 32 registers */
#else
#define POSITIONS 4
#endif

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* How many of `left` to compute at once, if there may be `most`: about the same each time. */
INLINE int chunk_of(int64_t left, int most) {
    if (left <= most) return (int)left;
    return left < 2 * most ? (int)((left + 1) / 2) : most;
}

/* Call BODY(count) with a constant. */
#define UP_TO_7(count)                                                                             \
    switch (count) {                                                                               \
    case 1: BODY(1); break;                                                                        \
    case 2: BODY(2); break;                                                                        \
    case 3: BODY(3); break;                                                                        \
    case 4: BODY(4); break;                                                                        \
    case 5: BODY(5); break;                                                                        \
    case 6: BODY(6); break;                                                                        \
    default: BODY(7); break;                                                                       \
    }
#define UP_TO_13(count)                                                                            \
    switch (count) {                                                                               \
    case 8: BODY(8); break;                                                                        \
    case 9: BODY(9); break;                                                                        \
    case 10: BODY(10); break;                                                                      \
    case 11: BODY(11); break;                                                                      \
    case 12: BODY(12); break;                                                                      \
    case 13: BODY(13); break;                                                                      \
    default: UP_TO_7(count)                                                                        \
    }
