// The backward kernel for heads of 128 in the compact shape.

#include "backward_walks.cuh"

namespace onepeace_fast {

template LaunchWalks launch_walks<float16, 128, 128, true>;
template LaunchWalks launch_walks<bfloat16, 128, 128, true>;

}  // namespace onepeace_fast
