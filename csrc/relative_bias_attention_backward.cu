// The entries of the backward pass.

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <algorithm>

#include "backward_launch.cuh"
#include "backward_workspace.cuh"
#include "launch.cuh"
#include "relative_bias_attention.h"

namespace onepeace_fast {
namespace {

BackwardPlan plan_on_device(const RelativeBiasAttention& arguments) {
    return choose_backward_plan(
        arguments.head_dim, arguments.value_dim, count_entries(arguments), shared_limit(arguments.device));
}

template <typename T>
const char* launch_type(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients, void* stream) {
    const BackwardPlan plan = plan_on_device(arguments);
    return with_head_sizes(arguments.head_dim, arguments.value_dim, [&](auto head_dim, auto value_dim) {
        return launch_backward<T, head_dim.value, value_dim.value>(arguments, gradients, plan, stream);
    });
}

// Samples of one modality and of one length.
RelativeBiasAttention like_samples(
    int samples, int length, int heads, int head_dim, int value_dim, int bias_entries) {
    RelativeBiasAttention arguments{};
    arguments.samples = samples;
    arguments.modalities = arguments.queries.modalities = arguments.bias_vectors = 1;
    arguments.heads = heads;
    arguments.head_dim = head_dim;
    arguments.value_dim = value_dim;
    arguments.queries.rows = samples * length;
    arguments.queries.max_length = length;
    arguments.keys = arguments.queries;
    arguments.bias[0].entries = bias_entries;
    return arguments;
}

}  // namespace

BackwardPlan relative_bias_attention_backward_plan(
    int32_t head_dim, int32_t value_dim, int64_t bias_entries, int64_t shared_limit) {
    return choose_backward_plan(head_dim, value_dim, bias_entries, shared_limit);
}

int64_t relative_bias_attention_shared_limit(int32_t device) { return shared_limit(device); }

int64_t relative_bias_attention_shared_bytes(
    int32_t head_dim, int32_t value_dim, int32_t bias_vectors, int64_t bias_entries, int64_t shared_limit) {
    const ForwardPlan forward = relative_bias_attention_forward_plan(
        head_dim, value_dim, bias_entries - static_cast<int64_t>(CLS_ENTRIES) * bias_vectors, shared_limit);
    const BackwardPlan backward = choose_backward_plan(head_dim, value_dim, bias_entries, shared_limit);
    return std::max(forward.launch.shared_bytes, backward.launch.shared_bytes);
}

int64_t relative_bias_attention_backward_workspace(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients) {
    return check_arguments(arguments) ? 0 : plan_workspace(arguments, gradients, plan_on_device(arguments)).bytes;
}

BackwardShares relative_bias_attention_backward_shares(
    int32_t samples, int32_t length, int32_t heads, int32_t head_dim, int32_t value_dim, int32_t bias_entries,
    int32_t multiprocessors, int64_t shared_limit) {
    const RelativeBiasAttention arguments = like_samples(samples, length, heads, head_dim, value_dim, bias_entries);
    const BackwardPlan plan = choose_backward_plan(head_dim, value_dim, bias_entries, shared_limit);
    return share_work(arguments, multiprocessors, plan);
}

int64_t relative_bias_attention_backward_bytes(
    int32_t samples, int32_t length, int32_t heads, int32_t head_dim, int32_t value_dim, int32_t bias_entries,
    int32_t multiprocessors, int64_t shared_limit) {
    const RelativeBiasAttention arguments = like_samples(samples, length, heads, head_dim, value_dim, bias_entries);
    RelativeBiasAttentionGradients gradients{};
    gradients.multiprocessors = multiprocessors;
    gradients.bias[0] = &gradients;  // no null: it learns
    const BackwardPlan plan = choose_backward_plan(head_dim, value_dim, bias_entries, shared_limit);
    return with_head_sizes(head_dim, value_dim, [&](auto head_size, auto value_size) {
        constexpr int HEAD_DIM = head_size.value, VALUE_DIM = value_size.value;
        return plan.is_compact ? count_bytes<BackwardLaunch<HEAD_DIM, VALUE_DIM, true>>(arguments, gradients, plan)
                               : count_bytes<BackwardLaunch<HEAD_DIM, VALUE_DIM, false>>(arguments, gradients, plan);
    });
}

const char* relative_bias_attention_backward(
    const RelativeBiasAttention& arguments, const RelativeBiasAttentionGradients& gradients, void* stream) {
    if (const char* problem = check_arguments(arguments)) return problem;
    const char* problem = check_rows("grad", gradients.grad, {gradients.row_stride, gradients.head_stride});
    const GradientRows* rows[] = {&gradients.q, &gradients.k, &gradients.v};
    for (int i = 0; i < 3 && !problem; ++i) {
        const char* names[] = {"gradient of q", "gradient of k", "gradient of v"};
        problem = check_rows(names[i], rows[i]->data, {rows[i]->row_stride});
    }
    if (!problem) problem = check_address("workspace", gradients.workspace);
    if (problem) return problem;
    return arguments.type == FLOAT16 ? launch_type<float16>(arguments, gradients, stream)
                                     : launch_type<bfloat16>(arguments, gradients, stream);
}

}  // namespace onepeace_fast
