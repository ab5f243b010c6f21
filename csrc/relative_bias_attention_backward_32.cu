// The backward kernel for heads of 32.

#include "backward_walks.cuh"

namespace onepeace_fast {

template LaunchWalks launch_walks<float16, 32, 32, false>;
template LaunchWalks launch_walks<bfloat16, 32, 32, false>;

}  // namespace onepeace_fast
