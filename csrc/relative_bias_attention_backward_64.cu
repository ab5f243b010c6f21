// The backward pass for heads of 64.

#include "backward_kernel.cuh"
#include "backward_launch.cuh"

namespace onepeace_fast {

template const char* launch_walks<float16, 64, false>(
    const RelativeBiasAttention&, const RelativeBiasAttentionGradients&, const BackwardWorkspace&, const LaunchPlan&,
    void*);
template const char* launch_backward<float16, 64>(
    const RelativeBiasAttention&, const RelativeBiasAttentionGradients&, const BackwardPlan&, void*);
template const char* launch_walks<bfloat16, 64, false>(
    const RelativeBiasAttention&, const RelativeBiasAttentionGradients&, const BackwardWorkspace&, const LaunchPlan&,
    void*);
template const char* launch_backward<bfloat16, 64>(
    const RelativeBiasAttention&, const RelativeBiasAttentionGradients&, const BackwardPlan&, void*);

}  // namespace onepeace_fast
