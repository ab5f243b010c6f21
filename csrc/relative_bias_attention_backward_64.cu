// The backward kernel for heads of 64.

#include "backward_walks.cuh"

namespace onepeace_fast {

template LaunchWalks launch_walks<float16, 64, 64, false>;
template LaunchWalks launch_walks<bfloat16, 64, 64, false>;

}  // namespace onepeace_fast
