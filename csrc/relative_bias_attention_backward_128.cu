// The backward kernel for heads of 128.

#include "backward_walks.cuh"

namespace onepeace_fast {

template LaunchWalks launch_walks<float16, 128, 128, false>;
template LaunchWalks launch_walks<bfloat16, 128, 128, false>;

}  // namespace onepeace_fast
