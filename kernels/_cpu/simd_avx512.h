// Vectors of 16 floats in one register of AVX-512, whose lanes are chosen by masks of 16 bits. Products of bfloat16 go over
// pairs, which one instruction multiplies and adds up (vdpbf16ps).
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "header.h"

namespace millrace {

using Vec = __m512;
using Integers = __m512i;  // of 32 bits
using Units = __m512i;     // simd.h says what a unit is
using Mask = __mmask16;

constexpr int LANES = 16;

/// Lanes 0 to n - 1; all of them if n is 16 or more.
inline Mask first_lanes(int n) { return n >= LANES ? Mask(0xFFFF) : Mask((1u << n) - 1); }

inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec zero() { return _mm512_setzero_ps(); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const Bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline void store(Bf16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }

// The same for the last `left` numbers of a row, or 16 if there are more; other lanes are zero, and are not stored. Only
// the end of a row takes a mask: what was stored under one is slow to load again.
inline Vec load(const float* p, int left) {
    return left >= LANES ? load(p) : _mm512_maskz_loadu_ps(first_lanes(left), p);
}
inline Vec load(const Bf16* p, int left) {
    if (left >= LANES) return load(p);
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(left), p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
inline void store(float* p, Vec x, int left) {
    if (left >= LANES) store(p, x);
    else _mm512_mask_storeu_ps(p, first_lanes(left), x);
}
inline void store(Bf16* p, Vec x, int left) {
    if (left >= LANES) store(p, x);
    else _mm256_mask_storeu_epi16(p, first_lanes(left), (__m256i)_mm512_cvtneps_pbh(x));
}

/// What a number is after it has been stored in type T and read again.
template <typename T>
inline Vec rounded(Vec x);
template <>
inline Vec rounded<float>(Vec x) { return x; }
template <>
inline Vec rounded<Bf16>(Vec x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

// ---- Arithmetic ----

inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec subtract(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec times(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec divide(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec multiply_subtract(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
inline Vec negative_multiply_add(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
inline Vec magnitude(Vec x) { return _mm512_abs_ps(x); }
inline Vec with_sign_of(Vec size, Vec x) { return _mm512_or_ps(size, _mm512_and_ps(x, splat(-0.0f))); }
inline Vec nearest_integer(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/// The larger of each two, or the smaller; of a NaN and a number, b.
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }

/// x * 2^n, for a whole n. What is too large becomes infinite, and too small 0.
inline Vec times_power_of_2(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
/// The same for 1/2 < x < 2 and -150 <= n <= 0.
inline Vec times_negative_power_of_2(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }

inline float first_lane(Vec x) { return _mm512_cvtss_f32(x); }
inline float sum_of_lanes(Vec x) { return _mm512_reduce_add_ps(x); }
inline float largest_lane(Vec x) { return _mm512_reduce_max_ps(x); }

// ---- Lanes by masks ----

/// The lanes whose bits are set, of 16 bits.
inline Mask mask_of_bits(uint64_t bits) { return Mask(bits); }
inline bool any(Mask mask) { return mask; }
inline Mask either(Mask a, Mask b) { return a | b; }
inline Mask is_nan(Vec x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
inline Mask is_larger(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask is_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }

inline Vec only(Mask mask, Vec x) { return _mm512_maskz_mov_ps(mask, x); }
inline Vec select(Mask mask, Vec x, Vec otherwise) { return _mm512_mask_mov_ps(otherwise, mask, x); }
inline Vec larger(Mask mask, Vec a, Vec b) { return _mm512_mask_max_ps(a, mask, a, b); }  // a elsewhere

/// The numbers that lie before `left`, and elsewhere the lanes of another vector.
inline Vec load_or(Vec otherwise, const float* p, int left) {
    return _mm512_mask_loadu_ps(otherwise, first_lanes(left), p);
}

// ---- Integers ----

inline Integers splat(int x) { return _mm512_set1_epi32(x); }
inline Integers lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline Integers add(Integers a, Integers b) { return _mm512_add_epi32(a, b); }
inline Integers select(Mask mask, Integers x, Integers otherwise) {
    return _mm512_mask_mov_epi32(otherwise, mask, x);
}
inline int smallest_lane(Mask mask, Integers x) { return _mm512_mask_reduce_min_epi32(mask, x); }
inline Vec to_floats(Integers x) { return _mm512_cvtepi32_ps(x); }

// ---- Matrix products ----

inline Units units_of(Vec x) { return _mm512_castps_si512(x); }
inline Vec floats_of(Units x) { return _mm512_castsi512_ps(x); }
inline Units load_units(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline Units splat_unit(uint32_t x) { return _mm512_set1_epi32(x); }
inline void store_units(uint32_t* p, Units x) { _mm512_storeu_si512(p, x); }

template <typename T>
struct Unit;

/// A unit of two bfloat16.
template <>
struct Unit<Bf16> {
    using Number = Bf16;
    static constexpr int SIZE = 2;

    static Vec multiply_add(Vec sum, Units a, Units b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
    static Units load(const Bf16* p) { return _mm512_loadu_si512(p); }
    static Units load(const Bf16* p, int left) {
        return left >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << left) - 1, p);
    }
    static Units across(const Bf16* const* rows, int place, int left) {
        const Units even = units_of(millrace::load(rows[0] + place, left));  // widened: the upper half of 32 bits
        const Units odd = units_of(millrace::load(rows[1] + place, left));
        return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
    }
    /// In turns 4 of the first vector and 4 of the second, which spares two permutations a row.
    static void across_quickly(Units (&out)[2], const Bf16* const* rows, int place) {
        const Units even = _mm512_loadu_si512(rows[0] + place), odd = _mm512_loadu_si512(rows[1] + place);
        out[0] = _mm512_unpacklo_epi16(even, odd);
        out[1] = _mm512_unpackhi_epi16(even, odd);
    }
    static void put_in_order(float* sums, int count) {
        const Integers first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const Integers second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        for (int i = 0; i < count; i += 2 * LANES) {
            const Vec low = millrace::load(sums + i), high = millrace::load(sums + i + LANES);
            store(sums + i, _mm512_permutex2var_ps(low, first, high));
            store(sums + i + LANES, _mm512_permutex2var_ps(low, second, high));
        }
    }
};

/// The heart of every matrix product: sum[r][v] += a[r] . b[v] over `num_units` units of ROWS rows and VECS vectors.
///
/// a: row r begins at a + r * a_stride, in units. b: `[num_units, b_stride]` units, of which VECS * 16 are used.
/// ahead: memory of which `ahead_step` bytes a unit are brought to the L2 cache on the way, for whoever comes next.
template <typename T, int ROWS, int VECS>
inline void multiply_tile(
    Vec (&sum)[ROWS][VECS], const uint32_t* a, long a_stride, const uint32_t* b, long b_stride, int num_units,
    const char* ahead = nullptr, int ahead_step = 0
) {
    for (int u = 0; u < num_units; u++, b += b_stride, ahead += ahead_step) {
        if (ahead_step) _mm_prefetch(ahead, _MM_HINT_T1);
        __m512i column[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) column[v] = _mm512_loadu_si512(b + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const __m512i x = _mm512_set1_epi32(a[r * a_stride + u]);
#pragma GCC unroll 4
            for (int v = 0; v < VECS; v++) sum[r][v] = Unit<T>::multiply_add(sum[r][v], x, column[v]);
        }
    }
}

/// Transposes 16 vectors of 16 units: unit j of row i goes to unit i of row j.
inline void transpose(__m512i (&rows)[LANES]) {
    __m512i t[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        rows[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        rows[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        rows[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        rows[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xDD);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
        rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
    }
}

/// Adds up the lanes of 16 vectors: lane i of the result is the sum of x[i].
__attribute__((always_inline)) inline Vec sum_lanes(Vec (&x)[LANES]) {
    Vec t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        t[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    // In each 128 bits now: a, b, a, b. Then a, b, c, d.
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512d low = _mm512_castps_pd(t[2 * i]), high = _mm512_castps_pd(t[2 * i + 1]);
        t[i] = _mm512_add_ps(
            _mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    }
    // Of four such vectors, the four parts of 128 bits: added up crosswise.
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        t[i] = _mm512_add_ps(_mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0xDD));
    return _mm512_add_ps(_mm512_shuffle_f32x4(t[0], t[1], 0x88), _mm512_shuffle_f32x4(t[0], t[1], 0xDD));
}

}  // namespace millrace
