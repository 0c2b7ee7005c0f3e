// What the CPU kernels share: vectors of 16 floats, and the two number types that they read and write.
//
// A source says what it does to 16 floats, and each instruction set does it in its own way: one register of AVX-512, or
// two of AVX2 (simd_avx512.h, simd_avx2.h). pyproject.toml compiles the sources for both.
//
// Arithmetic is in float32. A `Bf16` is widened when it is loaded and rounded, ties to even, when it is stored. Products
// of matrices go over 32-bit units: a unit is one float32, or with AVX-512 a pair of bfloat16, so that one template
// serves both types.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "header.h"
#ifdef __AVX512F__
#include "simd_avx512.h"
#else
#include "simd_avx2.h"
#endif

namespace millrace {

/// 2^r for |r| <= 1/2, by its Taylor series. To 2e-7 of its value; to 4e-5, which bfloat16 cannot tell from it, if it is
/// not `exact`.
template <bool exact>
inline Vec exp2_series(Vec r) {
    Vec series = splat(9.6181291e-3f);  // ln(2)^i / i!
    if (exact) {
        series = splat(1.5403530e-4f);
        series = multiply_add(series, r, splat(1.3333558e-3f));
        series = multiply_add(series, r, splat(9.6181291e-3f));
    }
    series = multiply_add(series, r, splat(5.5504109e-2f));
    series = multiply_add(series, r, splat(2.4022651e-1f));
    series = multiply_add(series, r, splat(6.9314718e-1f));
    return multiply_add(series, r, splat(1.0f));
}

/// 2^x: 2^n by the exponent, times the series of what remains.
template <bool exact = true>
inline Vec exp2(Vec x) {
    const Vec n = nearest_integer(x);
    return times_power_of_2(exp2_series<exact>(subtract(x, n)), n);
}

/// The same for -150 <= x <= 0, with fewer instructions where there is no AVX-512; 0 for -150.
template <bool exact = true>
inline Vec exp2_of_negative(Vec x) {
    const Vec n = nearest_integer(x);
    return times_negative_power_of_2(exp2_series<exact>(subtract(x, n)), n);
}

constexpr float LOG2_E = 1.4426950408889634f;

/// x / (1 + exp(-x)).
inline Vec silu(Vec x) {
    const Vec decay = exp2(times(x, splat(-LOG2_E)));
    return divide(x, add(splat(1.0f), decay));
}

/// How a type fills the 32-bit units of a matrix product: one number to a unit, widened to float32.
template <typename T>
struct Unit {
    using Number = float;
    static constexpr int SIZE = 1;  // numbers in a unit

    static Vec multiply_add(Vec sum, Units a, Units b) {
        return millrace::multiply_add(floats_of(a), floats_of(b), sum);
    }
    /// 16 units of a row, of which `left` numbers exist; others are zero.
    static Units load(const T* p) { return units_of(millrace::load(p)); }
    static Units load(const T* p, int left) { return units_of(millrace::load(p, left)); }

    /// 16 units, each of SIZE rows: the numbers from `place` on.
    static Units across(const T* const* rows, int place, int left) { return load(rows[0] + place, left); }

    /// 32 such units, in an order that `put_in_order` undoes for the sums of their products.
    static void across_quickly(Units (&out)[2], const T* const* rows, int place) {
        for (int v = 0; v < 2; v++) out[v] = load(rows[0] + place + v * LANES);
    }
    static void put_in_order(float*, int) {}
};

/// Copies numbers of a row to its units.
template <typename T>
inline void copy_row(T* to, const T* from, int count) { std::memcpy(to, from, sizeof(T) * count); }
inline void copy_row(float* to, const Bf16* from, int count) {
    for (int i = 0; i < count; i += LANES) store(to + i, load(from + i, count - i), count - i);
}

}  // namespace millrace
