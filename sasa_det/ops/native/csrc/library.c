/* The functions that Python calls, by ctypes: a plain C interface, which no upgrade of torch or of
   Python breaks. */

#include <stdlib.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "calls.h"

#define EXPORT __attribute__((visibility("default")))

enum { BASELINE = 0, AVX2 = 1, AVX512 = 2 };

/* The best instruction set that this processor has. */
EXPORT int64_t sasa_det_instruction_set(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return BASELINE;
}

/* By which Python knows that it has the library that it was written for. */
EXPORT int64_t sasa_det_size_of_attention_call(void) { return sizeof(AttentionCall); }
EXPORT int64_t sasa_det_size_of_stem_call(void) { return sizeof(StemCall); }
EXPORT int64_t sasa_det_size_of_residual_call(void) { return sizeof(ResidualCall); }

/* Has the system map `bytes` that nobody has written to yet, each thread a share of its own. Left to the
   kernels, threads that write to the same page at the same time have it mapped twice. */
EXPORT void sasa_det_map_pages(void *start, int64_t bytes, int64_t threads) {
    const int64_t page = 4096;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < bytes; i += page) *((volatile char *)start + i) = 0;
    (void)threads;
}

static const Kernels *kernels_for(int64_t instruction_set) {
#if defined(__x86_64__)
    if (instruction_set == AVX512) return &kernels_avx512;
    if (instruction_set == AVX2) return &kernels_avx2;
#endif
    (void)instruction_set;
    return &kernels_baseline;
}

/* Makes this thread take numbers below 1e-38 for zeros, and returns its former state. The gradients of
   weights that the softmax all but excludes are such numbers, and Intel's processors are a hundred
   times slower with them. */
static unsigned flush_denormals(void) {
#if defined(__x86_64__)
    const unsigned state = _mm_getcsr(), flush_to_zero = 0x8000, denormals_are_zeros = 0x0040;
    _mm_setcsr(state | flush_to_zero | denormals_are_zeros);
    return state;
#else
    return 0;
#endif
}

static void restore(unsigned state) {
#if defined(__x86_64__)
    _mm_setcsr(state);
#else
    (void)state;
#endif
}

typedef void Task(const void *call, int64_t index, char *scratch);

/* Runs `tasks` tasks, which begin in this order: one may wait for those before it. Returns 0, or 1 where
   memory ran out. */
static int64_t run(Task *task, const void *call, int64_t tasks, int64_t bytes, int64_t threads) {
    int64_t failed = 0;
    if (threads > tasks) threads = tasks;
    if (threads < 1) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        char *scratch = aligned_alloc(64, (bytes + 63) / 64 * 64);
        const unsigned state = flush_denormals();
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(monotonic : dynamic, 1) /* not stolen from the end */
        for (int64_t index = 0; index < tasks; index++)
            if (!failed) task(call, index, scratch);
        restore(state);
        free(scratch);
    }
    return failed;
}

EXPORT int64_t sasa_det_attention_forward(const AttentionCall *call, int64_t instruction_set,
                                          int64_t threads) {
    const Kernels *kernels = kernels_for(instruction_set);
    return run(kernels->forward_task, call, call->batch * call->heads * call->bands,
               kernels->scratch_bytes(call, false), threads);
}

EXPORT int64_t sasa_det_attention_backward(const AttentionCall *call, int64_t instruction_set,
                                           int64_t threads) {
    const Kernels *kernels = kernels_for(instruction_set);
    return run(kernels->backward_task, call, call->batch * call->heads * call->bands,
               kernels->scratch_bytes(call, true), threads);
}

EXPORT int64_t sasa_det_stem_forward(const StemCall *call, int64_t instruction_set,
                                     int64_t threads) {
    const Kernels *kernels = kernels_for(instruction_set);
    return run(kernels->stem_forward_task, call, call->batch * call->bands,
               kernels->stem_scratch_bytes(call, false), threads);
}

EXPORT int64_t sasa_det_stem_backward(const StemCall *call, int64_t instruction_set,
                                      int64_t threads) {
    const Kernels *kernels = kernels_for(instruction_set);
    return run(kernels->stem_backward_task, call, call->batch * call->bands,
               kernels->stem_scratch_bytes(call, true), threads);
}

EXPORT int64_t sasa_det_residual(const ResidualCall *given, int64_t instruction_set,
                                 int64_t threads) {
    const Kernels *kernels = kernels_for(instruction_set);
    ResidualCall call = *given;
    const int64_t groups = kernels->residual_groups(&call), most = (call.positions + 255) / 256;
    /* Some tasks a thread, but none so short that packing its weights would count. */
    call.bands = (4 * threads + groups - 1) / groups;
    if (call.bands > most) call.bands = most;
    return run(kernels->residual_task, &call, groups * call.bands,
               kernels->residual_scratch_bytes(&call), threads);
}
