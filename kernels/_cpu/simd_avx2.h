// Vectors of 16 floats in two registers of AVX2, whose lanes are chosen by masks of the same form. A unit of a matrix
// product is one float32, for bfloat16 too: these CPUs have no instruction for pairs of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "avx2.h"

namespace millrace {

constexpr int LANES = 16;

struct Vec {
    __m256 low, high;
};
struct Integers {  // of 32 bits
    __m256i low, high;
};
struct Mask {  // All bits of a chosen lane are set.
    __m256 low, high;
};
using Units = Vec;  // simd.h says what a unit is

inline Vec splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }

inline Integers splat(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Integers lane_numbers() {
    return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}
inline Integers add(Integers a, Integers b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
inline Vec to_floats(Integers x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }

template <typename T>
inline Vec load(const T* p) { return {avx2::load(p), avx2::load(p + avx2::LANES)}; }
template <typename T>
inline void store(T* p, Vec x) {
    avx2::store(p, x.low);
    avx2::store(p + avx2::LANES, x.high);
}

// The same for the last `left` numbers of a row, or 16 if there are more; other lanes are zero, and are not stored.
template <typename T>
inline Vec load(const T* p, int left) {
    if (left >= LANES) return load(p);
    const bool is_long = left > avx2::LANES;
    return {avx2::load(p, left), is_long ? avx2::load(p + avx2::LANES, left - avx2::LANES) : _mm256_setzero_ps()};
}
template <typename T>
inline void store(T* p, Vec x, int left) {
    if (left >= LANES) return store(p, x);
    avx2::store(p, x.low, left);
    if (left > avx2::LANES) avx2::store(p + avx2::LANES, x.high, left - avx2::LANES);
}

/// What a number is after it has been stored in type T and read again.
template <typename T>
inline Vec rounded(Vec x);
template <>
inline Vec rounded<float>(Vec x) { return x; }
template <>
inline Vec rounded<Bf16>(Vec x) {
    const __m256i upper = _mm256_set1_epi32(int(0xFFFF0000));
    return {_mm256_castsi256_ps(_mm256_and_si256(avx2::round_to_bf16(x.low), upper)),
            _mm256_castsi256_ps(_mm256_and_si256(avx2::round_to_bf16(x.high), upper))};
}

// ---- Arithmetic ----

inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Vec subtract(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Vec times(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Vec divide(Vec a, Vec b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Vec multiply_subtract(Vec a, Vec b, Vec c) {
    return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
/// c - a * b
inline Vec negative_multiply_add(Vec a, Vec b, Vec c) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Vec magnitude(Vec x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
inline Vec with_sign_of(Vec size, Vec x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(size.low, _mm256_and_ps(x.low, sign)), _mm256_or_ps(size.high, _mm256_and_ps(x.high, sign))};
}
inline Vec nearest_integer(Vec x) {
    constexpr int MODE = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, MODE), _mm256_round_ps(x.high, MODE)};
}

/// The larger of each two, or the smaller; of a NaN and a number, b.
inline Vec larger(Vec a, Vec b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Vec smaller(Vec a, Vec b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }

/// x * 2^n, for a whole n. What is too large becomes infinite, and too small 0: for infinite n also if x is NaN.
inline __m256 times_power_of_2(__m256 x, __m256 n) {
    const __m256 least = _mm256_set1_ps(-252.0f), most = _mm256_set1_ps(254.0f);
    // In two steps, because the exponent of one factor does not reach so far.
    const __m256i whole = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(n, least), most));
    const __m256i half = _mm256_srai_epi32(whole, 1);
    for (const __m256i part : {half, _mm256_sub_epi32(whole, half)}) {
        const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(part, _mm256_set1_epi32(127)), 23);
        x = _mm256_mul_ps(x, _mm256_castsi256_ps(bits));
    }
    x = _mm256_andnot_ps(_mm256_cmp_ps(n, least, _CMP_LT_OQ), x);
    return _mm256_blendv_ps(x, _mm256_set1_ps(INFINITY), _mm256_cmp_ps(n, most, _CMP_GT_OQ));
}
inline Vec times_power_of_2(Vec x, Vec n) {
    return {times_power_of_2(x.low, n.low), times_power_of_2(x.high, n.high)};
}

/// The same for 1/2 < x < 2 and -150 <= n <= 0, but 0 for n < -125: the exponent of x takes all others.
inline __m256 times_negative_power_of_2(__m256 x, __m256 n) {
    const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23));
    return _mm256_andnot_ps(_mm256_cmp_ps(n, _mm256_set1_ps(-125.0f), _CMP_LT_OQ), _mm256_castsi256_ps(bits));
}
inline Vec times_negative_power_of_2(Vec x, Vec n) {
    return {times_negative_power_of_2(x.low, n.low), times_negative_power_of_2(x.high, n.high)};
}

inline float first_lane(Vec x) { return _mm256_cvtss_f32(x.low); }
inline float sum_of_lanes(Vec x) { return avx2::sum_lanes(_mm256_add_ps(x.low, x.high)); }
inline float largest_lane(Vec x) {
    const __m256 both = _mm256_max_ps(x.low, x.high);
    __m128 largest = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    largest = _mm_max_ps(largest, _mm_movehl_ps(largest, largest));
    return _mm_cvtss_f32(_mm_max_ss(largest, _mm_movehdup_ps(largest)));
}

// ---- Lanes by masks ----

/// Lanes 0 to n - 1.
inline Mask first_lanes(int n) {
    const Integers lane = lane_numbers(), end = splat(n);
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(end.low, lane.low)),
            _mm256_castsi256_ps(_mm256_cmpgt_epi32(end.high, lane.high))};
}
/// The lanes whose bits are set, of 16 bits.
inline Mask mask_of_bits(uint64_t bits) {
    const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), high = _mm256_slli_epi32(low, 8);
    const __m256i all = _mm256_set1_epi32(int(bits));
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, low), low)),
            _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, high), high))};
}
inline bool any(Mask mask) { return _mm256_movemask_ps(_mm256_or_ps(mask.low, mask.high)); }
inline Mask either(Mask a, Mask b) { return {_mm256_or_ps(a.low, b.low), _mm256_or_ps(a.high, b.high)}; }
inline Mask is_nan(Vec x) {
    return {_mm256_cmp_ps(x.low, x.low, _CMP_UNORD_Q), _mm256_cmp_ps(x.high, x.high, _CMP_UNORD_Q)};
}
inline Mask is_larger(Vec a, Vec b) {
    return {_mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ)};
}
inline Mask is_equal(Vec a, Vec b) {
    return {_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ)};
}

inline Vec only(Mask mask, Vec x) { return {_mm256_and_ps(mask.low, x.low), _mm256_and_ps(mask.high, x.high)}; }
inline Vec select(Mask mask, Vec x, Vec otherwise) {
    return {_mm256_blendv_ps(otherwise.low, x.low, mask.low), _mm256_blendv_ps(otherwise.high, x.high, mask.high)};
}
inline Vec larger(Mask mask, Vec a, Vec b) { return select(mask, larger(a, b), a); }  // a elsewhere

/// The numbers that lie before `left`, and elsewhere the lanes of another vector.
inline Vec load_or(Vec otherwise, const float* p, int left) {
    return left >= LANES ? load(p) : select(first_lanes(left), load(p, left), otherwise);
}

inline Integers select(Mask mask, Integers x, Integers otherwise) {
    return {_mm256_blendv_epi8(otherwise.low, x.low, _mm256_castps_si256(mask.low)),
            _mm256_blendv_epi8(otherwise.high, x.high, _mm256_castps_si256(mask.high))};
}
inline int smallest_lane(Mask mask, Integers x) {
    int numbers[LANES];
    x = select(mask, x, splat(INT32_MAX));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(numbers), x.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(numbers + avx2::LANES), x.high);
    return *std::min_element(numbers, numbers + LANES);
}

// ---- Matrix products ----

inline Units units_of(Vec x) { return x; }
inline Vec floats_of(Units x) { return x; }
inline Units load_units(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }
inline Units splat_unit(uint32_t x) {
    const __m256 all = _mm256_castsi256_ps(_mm256_set1_epi32(int(x)));
    return {all, all};
}
inline void store_units(uint32_t* p, Units x) { store(reinterpret_cast<float*>(p), x); }

/// The heart of every matrix product: sum[r][v] += a[r] . b[v] over `num_units` units of ROWS rows and VECS vectors.
///
/// a: row r begins at a + r * a_stride, in units. b: `[num_units, b_stride]` units, of which VECS * 16 are used.
/// One vector after the other: the 12 sums of 6 rows are what the registers hold.
template <typename T, int ROWS, int VECS>
inline void multiply_tile(
    Vec (&sums)[ROWS][VECS], const uint32_t* a, long a_stride, const uint32_t* b, long b_stride, int num_units
) {
    for (int v = 0; v < VECS; v++) {
        Vec sum[ROWS];
        for (int r = 0; r < ROWS; r++) sum[r] = sums[r][v];
        for (int u = 0; u < num_units; u++) {
            const Vec column = load_units(b + u * b_stride + v * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) sum[r] = multiply_add(splat_unit(a[r * a_stride + u]), column, sum[r]);
        }
        for (int r = 0; r < ROWS; r++) sums[r][v] = sum[r];
    }
}

/// Transposes 8 vectors of 8 floats.
inline void transpose(__m256 (&rows)[8]) {
    __m256 t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        rows[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        rows[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        rows[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        rows[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31);
    }
    std::copy(t, t + 8, rows);
}

/// Transposes 16 vectors of 16 units: unit j of row i goes to unit i of row j.
inline void transpose(Units (&rows)[LANES]) {
    __m256 corner[2][2][avx2::LANES];  // by the half of the rows, and of the units
    for (int half = 0; half < 2; half++) {
        for (int i = 0; i < avx2::LANES; i++) {
            corner[half][0][i] = rows[half * avx2::LANES + i].low;
            corner[half][1][i] = rows[half * avx2::LANES + i].high;
        }
        for (auto& square : corner[half]) transpose(square);
    }
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < avx2::LANES; i++)
            rows[half * avx2::LANES + i] = {corner[0][half][i], corner[1][half][i]};
}

/// Adds up the lanes of 8 vectors: lane i of the result is the sum of x[i].
__attribute__((always_inline)) inline __m256 sum_lanes_of_8(const Vec* x) {
    __m256 t[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        t[i] = _mm256_hadd_ps(_mm256_add_ps(x[2 * i].low, x[2 * i].high),
                              _mm256_add_ps(x[2 * i + 1].low, x[2 * i + 1].high));
    const __m256 first = _mm256_hadd_ps(t[0], t[1]), second = _mm256_hadd_ps(t[2], t[3]);
    return _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31));
}

/// Adds up the lanes of 16 vectors: lane i of the result is the sum of x[i].
__attribute__((always_inline)) inline Vec sum_lanes(Vec (&x)[LANES]) {
    return {sum_lanes_of_8(x), sum_lanes_of_8(x + avx2::LANES)};
}

}  // namespace millrace
