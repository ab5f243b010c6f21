// The backward kernel for heads of 96 in the compact shape.

#include "backward_walks.cuh"

namespace onepeace_fast {

template LaunchWalks launch_walks<float16, 96, 96, true>;
template LaunchWalks launch_walks<bfloat16, 96, 96, true>;

}  // namespace onepeace_fast
