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
    __m512i where = _mm512_setzero_si512();
    __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    Mask is_nan = 0;
    for (int i = 0; i < size; i += LANES, index = _mm512_add_epi32(index, _mm512_set1_epi32(LANES))) {
        const Mask inside = first_lanes(size - i);
        const Vec number = _mm512_mask_loadu_ps(splat(-INFINITY), inside, x + i);
        is_nan |= _mm512_cmp_ps_mask(number, number, _CMP_UNORD_Q);
        const Mask larger = _mm512_cmp_ps_mask(number, top, _CMP_GT_OQ);
        top = _mm512_mask_mov_ps(top, larger, number);
        where = _mm512_mask_mov_epi32(where, larger, index);
    }
    const float largest = _mm512_reduce_max_ps(top);
    if (is_nan || !std::isfinite(largest)) return -1;
    return _mm512_mask_reduce_min_epi32(_mm512_cmp_ps_mask(top, splat(largest), _CMP_EQ_OQ), where);
}

void run(const Call& c) {
#pragma omp parallel for num_threads(c.team(c.num_rows * c.size)) schedule(static)
    for (long row = 0; row < c.num_rows; row++) c.ids[row] = place_of_largest(c.x + row * c.x_stride, c.size);
}

}  // namespace
}  // namespace millrace

extern "C" void greedy(const void* call) { millrace::run(*static_cast<const millrace::Call*>(call)); }
