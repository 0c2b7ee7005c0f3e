// The largest number of each row, and the first place where it is.
#include "../_cpu/simd.h"

namespace millrace {
namespace {

struct Call : Header {
    const float* x;
    float* peaks;
    int64_t* ids;
    long x_stride;
    int size;
};

void find_peak(const float* x, int size, float& peak, int64_t& id) {
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
    peak = is_nan ? NAN : _mm512_reduce_max_ps(top);
    const Mask ties = _mm512_cmp_ps_mask(top, splat(peak), _CMP_EQ_OQ);
    id = ties ? _mm512_mask_reduce_min_epi32(ties, where) : 0;
}

void run(const Call& c) {
#pragma omp parallel for num_threads(c.team(c.num_rows * c.size)) schedule(static)
    for (long row = 0; row < c.num_rows; row++) find_peak(c.x + row * c.x_stride, c.size, c.peaks[row], c.ids[row]);
}

}  // namespace
}  // namespace millrace

extern "C" void find_peaks(const void* call) { millrace::run(*static_cast<const millrace::Call*>(call)); }
