/* What Python passes; library.py has the same structures. Strides count elements. */

#ifndef SASA_DET_CALLS_H
#define SASA_DET_CALLS_H

#include <stdbool.h>
#include <stdint.h>

enum { FLOAT32 = 0, BFLOAT16 = 1 };
enum { WIDEST = 16 }; /* floats in a vector, of any instruction set */

/* (N, C, H, W) */
typedef struct {
    void *data;
    int64_t stride_n, stride_c, stride_h, stride_w;
    int64_t dtype;
    int64_t ring; /* rows that are kept, row y where row y % ring is; 0 for all */
} Map;

typedef struct {
    int64_t batch, heads, head_dim, height, width, kernel_size;
    int64_t bands;                    /* tasks for each head of an image */
    Map query, key, value, output;
    const float *rel_rows, *rel_cols; /* (heads, kernel_size, head_dim / 2), or NULL */
    float *logsumexp;                 /* (batch, heads, height, width) */
    /* Where queries, keys and values are projected here, instead of their maps. */
    int64_t in_channels;              /* 0: they are given */
    Map input;                        /* floats, the channels of a position contiguous */
    const float *projection, *bias;   /* (3, heads, head_dim, in_channels), (3, heads, head_dim) or NULL */
    Map residual;                     /* floats, added to the output; without data there is none */
    /* (heads, head_dim): output and residual are multiplied by and added to these at last; or NULL. */
    const float *output_scale, *output_shift;
    /* For the backward: float32 gradients; those of the embeddings as partial sums,
       (batch, bands, 2, heads, kernel_size, head_dim / 2). */
    Map grad_output, grad_query, grad_key, grad_value;
    float *grad_embeddings;
    /* Instead of those of queries, keys and values, where they are projected here; NULL for what is not
       asked for. */
    Map grad_input;                   /* floats in channels_last, channels padded to WIDEST */
    float *grad_projection, *grad_bias; /* (batch, bands) times the shapes above: partial sums */
    int32_t *heads_done;              /* (batch, height), zeros at first: see projection_backward.h */
} AttentionCall;

/* The stem's attention, pooled. All floats; the weights are folded: see stem.h. */
typedef struct {
    int64_t batch, in_channels, height, width, heads, head_dim, block_size;
    int64_t bands;                    /* tasks for each image */
    Map image, maximum;               /* (N, C_in, H, W), (N, C, blocks down, blocks across) */
    const float *content;             /* (heads, C_in of the query, C_in of the key) */
    const float *rel_rows, *rel_cols; /* (heads, 2 * block_size - 1, C_in) */
    const float *value_weights;       /* (heads, positions, head_dim, C_in) */
    float *sums;                      /* (batch, bands, 2, C): outputs, and their squares */
    /* For the backward; grad_weights are partial sums, (batch, bands, the sizes of content, rel_rows,
       rel_cols and value_weights one after another). */
    Map grad_maximum;
    const float *grad_sum, *grad_square_sum;
    float *grad_weights;
} StemCall;

/* output = relu(residual + weight . input + bias), position by position. All floats; the channels of a
   position are contiguous, and so are the positions. */
typedef struct {
    int64_t positions, in_channels, out_channels;
    int64_t bands;                    /* of positions: tasks for each group of output channels */
    const float *input, *residual;    /* (positions, in_channels), (positions, out_channels) */
    const float *weight, *bias;       /* (out_channels, in_channels), (out_channels) or NULL */
    float *output;                    /* (positions, out_channels) */
} ResidualCall;

/* The kernels for one instruction set. A task gets scratch memory of its own, aligned to 64 bytes. */
typedef struct {
    int64_t (*scratch_bytes)(const AttentionCall *call, bool backward);
    void (*forward_task)(const void *call, int64_t index, char *scratch);
    void (*backward_task)(const void *call, int64_t index, char *scratch);
    int64_t (*stem_scratch_bytes)(const StemCall *call, bool backward);
    void (*stem_forward_task)(const void *call, int64_t index, char *scratch);
    void (*stem_backward_task)(const void *call, int64_t index, char *scratch);
    int64_t (*residual_groups)(const ResidualCall *call);
    int64_t (*residual_scratch_bytes)(const ResidualCall *call);
    void (*residual_task)(const void *call, int64_t index, char *scratch);
} Kernels;

extern const Kernels kernels_avx512, kernels_avx2, kernels_baseline;

#endif
