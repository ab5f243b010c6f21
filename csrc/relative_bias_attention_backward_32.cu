// The backward pass for heads of 32.

#include "backward_kernel.cuh"
#include "backward_launch.cuh"

namespace onepeace_fast {

template const char* launch_walks<float16, 32, false>(
    const RelativeBiasAttention&, const RelativeBiasAttentionGradients&, const BackwardWorkspace&, const LaunchPlan&,
    void*);
template const char* launch_backward<float16, 32>(
    const RelativeBiasAttention&, const RelativeBiasAttentionGradients&, const BackwardPlan&, void*);
template const char* launch_walks<bfloat16, 32, false>(
    const RelativeBiasAttention&, const RelativeBiasAttentionGradients&, const BackwardWorkspace&, const LaunchPlan&,
    void*);
template const char* launch_backward<bfloat16, 32>(
    const RelativeBiasAttention&, const RelativeBiasAttentionGradients&, const BackwardPlan&, void*);

}  // namespace onepeace_fast
