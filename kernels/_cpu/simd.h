// What the CPU kernels share: vectors of 16 floats (AVX-512), and the two number types that they read and write.
//
// Arithmetic is in float32. A `Bf16` is widened when it is loaded and rounded, ties to even, when it is stored. Products
// of matrices go over 32-bit units: a unit is one float32, or a pair of bfloat16 that one instruction multiplies and
// adds up (vdpbf16ps), so that one template serves both types.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "header.h"

namespace millrace {

using Vec = __m512;
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

/// 2^x: 2^n by the exponent, times the Taylor series of what remains, |r| <= 1/2. To 2e-7 of its value; to 4e-5, which
/// bfloat16 cannot tell from it, if it is not `exact`.
template <bool exact = true>
inline Vec exp2(Vec x) {
    const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vec r = _mm512_sub_ps(x, n);
    Vec series = splat(9.6181291e-3f);  // ln(2)^i / i!
    if (exact) {
        series = splat(1.5403530e-4f);
        series = _mm512_fmadd_ps(series, r, splat(1.3333558e-3f));
        series = _mm512_fmadd_ps(series, r, splat(9.6181291e-3f));
    }
    series = _mm512_fmadd_ps(series, r, splat(5.5504109e-2f));
    series = _mm512_fmadd_ps(series, r, splat(2.4022651e-1f));
    series = _mm512_fmadd_ps(series, r, splat(6.9314718e-1f));
    series = _mm512_fmadd_ps(series, r, splat(1.0f));
    return _mm512_scalef_ps(series, n);
}

constexpr float LOG2_E = 1.4426950408889634f;

/// x / (1 + exp(-x)).
inline Vec silu(Vec x) {
    const Vec decay = exp2(_mm512_mul_ps(x, splat(-LOG2_E)));
    return _mm512_div_ps(x, _mm512_add_ps(splat(1.0f), decay));
}

/// How a type fills the 32-bit units of a matrix product.
template <typename T>
struct Unit;
template <>
struct Unit<float> {
    static constexpr int SIZE = 1;  // numbers in a unit
    static Vec multiply_add(Vec sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
};
template <>
struct Unit<Bf16> {
    static constexpr int SIZE = 2;
    static Vec multiply_add(Vec sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
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
