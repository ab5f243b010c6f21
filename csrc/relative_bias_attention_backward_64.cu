// The backward kernel for heads of 64.

#include "backward_kernel.cuh"

namespace onepeace_fast {

template const char* launch_walks<float16, 64, false>(
    const RelativeBiasAttention&, const RelativeBiasAttentionGradients&, const BackwardWorkspace&, const LaunchPlan&,
    void*);
template const char* launch_walks<bfloat16, 64, false>(
    const RelativeBiasAttention&, const RelativeBiasAttentionGradients&, const BackwardWorkspace&, const LaunchPlan&,
    void*);

}  // namespace onepeace_fast
