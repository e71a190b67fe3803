/* All kernels for one instruction set: LANES floats in a vector, exported names ending in ISA. */

#include <math.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "calls.h"

#define INLINE static inline __attribute__((always_inline))

#include "unroll.h"
#include "vector.h"
#include "transpose.h"
#include "dots.h"
#include "weighted_sums.h"
#include "rows.h"
#include "projection.h"
#include "projection_backward.h"
#include "local_attention.h"
#include "local_attention_backward.h"
#include "residual.h"
#include "stem.h"
#include "stem_backward.h"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

const Kernels JOIN(kernels, ISA) = {
    scratch_bytes,      forward_task,      backward_task,
    stem_scratch_bytes, stem_forward_task, stem_backward_task,
    residual_groups,    residual_scratch_bytes, residual_task,
};
