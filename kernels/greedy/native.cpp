// The first place of the largest number of each row; -1 where that is not finite, or a number is NaN.
#include <cmath>

#include "../_cpu/simd.h"

namespace millrace {
namespace {

struct Call : Header {
    const float* x;
    int64_t* ids;
    long x_stride;
    int size;
};

int64_t place_of_largest(const float* x, int size) {
    Vec top = splat(-INFINITY);
    Integers where = splat(0), index = lane_numbers();
    Mask has_nan = first_lanes(0);
    for (int i = 0; i < size; i += LANES, index = add(index, splat(LANES))) {
        const Vec number = load_or(splat(-INFINITY), x + i, size - i);
        has_nan = either(has_nan, is_nan(number));
        const Mask is_new = is_larger(number, top);
        top = select(is_new, number, top);
        where = select(is_new, index, where);
    }
    const float largest = largest_lane(top);
    if (any(has_nan) || !std::isfinite(largest)) return -1;
    return smallest_lane(is_equal(top, splat(largest)), where);
}

void run(const Call& c) {
#pragma omp parallel for num_threads(c.team(c.num_rows * c.size)) schedule(static)
    for (long row = 0; row < c.num_rows; row++) c.ids[row] = place_of_largest(c.x + row * c.x_stride, c.size);
}

}  // namespace
}  // namespace millrace

extern "C" void greedy(const void* call) { millrace::run(*static_cast<const millrace::Call*>(call)); }
