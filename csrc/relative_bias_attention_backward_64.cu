// The backward pass for heads of 64.

#include "backward_kernel.cuh"

namespace onepeace_fast {

template const char* launch_backward<float16, 64>(
    const RelativeBiasAttention&, const RelativeBiasAttentionGradients&, void*);
template const char* launch_backward<bfloat16, 64>(
    const RelativeBiasAttention&, const RelativeBiasAttentionGradients&, void*);

}  // namespace onepeace_fast
