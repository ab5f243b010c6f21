// The backward kernel for heads of 96.

#include "backward_walks.cuh"

namespace onepeace_fast {

template LaunchWalks launch_walks<float16, 96, 96, false>;
template LaunchWalks launch_walks<bfloat16, 96, 96, false>;

}  // namespace onepeace_fast
