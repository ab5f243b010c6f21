// Attention over packed segments with a relative position bias in code form: the interface of the CUDA kernels.
//
// Plain structs of raw device pointers, strides in elements and a stream: no torch, no Python, so that one binary
// serves every torch. onepeace_fast/ops/relative_bias_attention.py has the mathematics; ONE-PEACE, arXiv 2305.11172.

#pragma once

#include <cstdint>

#pragma GCC visibility push(default)

namespace onepeace_fast {

constexpr int MAX_MODALITIES = 16;
constexpr int CLS_ENTRIES = 3;  // the last entries of a vector: CLS as query, CLS as key, both

enum ElementType : int32_t { FLOAT16 = 0, BFLOAT16 = 1, FLOAT32 = 2 };

// One modality's bias, [heads, entries]: entry code_i - code_j + code_offset for query i and key j, CLS entries last.
struct BiasVector {
    const void* data;  // [heads, entries]
    int64_t head_stride;
    int64_t entry_stride;
    int32_t entries;  // CLS_ENTRIES included
    int32_t code_offset;
    ElementType type;
};

// Queries, keys or values, [rows, heads, head_dim or value_dim], 16-byte aligned, the last dimension dense.
struct HeadRows {
    const void* data;
    int64_t row_stride;  // in elements, multiples of 8
    int64_t head_stride;
};

// Packed rows. A segment's CLS rows, any number of them, are its last rows. Rows from
// cu_seqlens[modalities - 1, samples] on are inert: they are not read, and their results are zero.
struct PackedRows {
    int32_t rows;        // capacity, inert rows included
    int32_t modalities;
    int32_t max_length;  // longest sample, all modalities together; 0 where the host does not know it
    const int32_t* cu_seqlens;  // [modalities, samples + 1], dense
    const int32_t* code;        // [rows]
    const uint8_t* is_cls;      // [rows], 0 or 1
    const int32_t* order;       // [rows], or null: a query sees its sample's keys of its own order and of lower ones
};

struct RelativeBiasAttention {
    int32_t device;
    int32_t samples;
    int32_t modalities;  // of queries or of keys, whichever have more
    int32_t heads;
    int32_t head_dim;    // of queries and keys: 32, 64, 96 or 128
    int32_t value_dim;   // of values: the same, or 64 beside 128
    float scale;         // of q . k
    ElementType type;    // of q, k, v and out: FLOAT16 or BFLOAT16
    HeadRows q;
    HeadRows k;
    HeadRows v;
    PackedRows queries;
    PackedRows keys;     // the queries again, or other rows of the same samples; both have an order, or none
    int32_t bias_vectors;       // 0, one for each modality, or one for the pairs of all tokens
    BiasVector bias[MAX_MODALITIES];
    const void* head_scale;  // [heads], dense, or null
    ElementType head_scale_type;
};

// Threads of a thread block, how many thread blocks a multiprocessor shall hold at once, and the shared memory of each.
struct LaunchPlan {
    int32_t threads;
    int32_t thread_blocks_at_once;
    int32_t shared_bytes;
};

// How the forward kernel, and that of the backward pass's row sums, is launched: in which of its shapes, and whether
// its vectors are read in windows.
struct ForwardPlan {
    LaunchPlan launch;
    int32_t is_compact;
    int32_t is_large;
    int32_t bias_capacity;  // entries that shared memory holds
    int32_t query_blocks;   // row blocks of queries that a thread block takes at once
};

// For the head sizes, the entries of all vectors together without those of CLS, and the bytes of shared memory that a
// thread block may have. Where nothing fits, the plan has more of them.
extern "C" ForwardPlan relative_bias_attention_forward_plan(
    int32_t head_dim, int32_t value_dim, int64_t bias_entries, int64_t shared_limit);

// Writes out and log_sum_exp, inert rows too. Returns null, or one line, which stays until this thread's next one: an
// argument that is refused, in which case nothing is launched, or CUDA's error. The pointers must stay valid until the
// stream has passed the launch; nothing is allocated, nothing synchronises.
const char* relative_bias_attention_forward(
    const RelativeBiasAttention& arguments,
    void* out,           // [rows, heads, value_dim], dense, 16-byte aligned
    float* log_sum_exp,  // [rows, heads], dense
    void* stream);

// Gradients of queries, keys or values, [rows, heads, head_dim or value_dim], 16-byte aligned, the last two dimensions
// dense.
struct GradientRows {
    void* data;
    int64_t row_stride;  // in elements, a multiple of 8
};

// What the backward pass reads beside the arguments, and what it writes.
struct RelativeBiasAttentionGradients {
    int32_t multiprocessors;  // of the device: few samples and heads have their keys split among them
    const void* grad;         // of out, in its type [rows, heads, value_dim], 16-byte aligned, the last dimension dense
    int64_t row_stride;       // strides of grad in elements, multiples of 8
    int64_t head_stride;
    const float* log_sum_exp;  // [rows, heads], of the forward pass
    GradientRows q;            // out: inert rows too
    GradientRows k;
    GradientRows v;
    void* bias[MAX_MODALITIES];  // out: each vector's, dense [heads, entries] in its type, or null where it is frozen
    void* head_scale;            // out: [heads] in its type, or null
    void* workspace;             // 16-byte aligned, of as many bytes as the function below says
};

// Bytes of workspace: linear in rows where a sample's keys do not fit one thread block or are split, and the partial
// sums of what all samples share. Pointers are only compared with null.
extern "C" int64_t relative_bias_attention_backward_workspace(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients);

// How the backward kernel is launched: in which of its shapes, and whether its vectors and their sums stand in device
// memory.
struct BackwardPlan {
    LaunchPlan launch;
    int32_t is_compact;
    int32_t is_large;
    int32_t walk_key_blocks;  // key blocks, of 16 keys, that a thread block walks at once
    int32_t differences;      // block differences whose sums shared memory holds
};

// For the head sizes, the entries of all vectors together with those of CLS, and the bytes of shared memory that a
// thread block may have. Where nothing fits, the plan has more of them.
extern "C" BackwardPlan relative_bias_attention_backward_plan(
    int32_t head_dim, int32_t value_dim, int64_t bias_entries, int64_t shared_limit);

// How the backward kernel's work is shared: thread blocks of a head, each for a group of samples and a part of their
// keys.
struct BackwardShares {
    int32_t groups;
    int32_t parts;
};

// For samples of one modality and of one length.
extern "C" BackwardShares relative_bias_attention_backward_shares(
    int32_t samples, int32_t length, int32_t heads, int32_t head_dim, int32_t value_dim, int32_t bias_entries,
    int32_t multiprocessors, int64_t shared_limit);

// Bytes of shared memory that a thread block may have on a device.
int64_t relative_bias_attention_shared_limit(int32_t device);

// Bytes of shared memory that the thread blocks of both passes take, at most, where they may have `shared_limit`; more
// than that where the kernels cannot run. For the head sizes, the vectors and all their entries together.
extern "C" int64_t relative_bias_attention_shared_bytes(
    int32_t head_dim, int32_t value_dim, int32_t bias_vectors, int64_t bias_entries, int64_t shared_limit);

// Bytes that the backward pass reads and writes outside thread blocks, caches included, for samples of one modality and
// of one length in a 16-bit type, with a vector that learns.
extern "C" int64_t relative_bias_attention_backward_bytes(
    int32_t samples, int32_t length, int32_t heads, int32_t head_dim, int32_t value_dim, int32_t bias_entries,
    int32_t multiprocessors, int64_t shared_limit);

// Writes the gradients; the same input gives the same bits. A head with a gradient that is not finite gets NaN in all
// entries of its vectors; so do the rows of a sample with more keys than a max_length that is given. Returns as the
// forward pass does.
const char* relative_bias_attention_backward(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients, void* stream);

}  // namespace onepeace_fast

#pragma GCC visibility pop
