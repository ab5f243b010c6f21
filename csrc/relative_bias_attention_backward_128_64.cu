// The backward kernel for keys of 128 and values of 64.

#include "backward_walks.cuh"

namespace onepeace_fast {

template LaunchWalks launch_walks<float16, 128, 64, false>;
template LaunchWalks launch_walks<bfloat16, 128, 64, false>;

}  // namespace onepeace_fast
