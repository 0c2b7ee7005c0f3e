// Vectors of 8 numbers, one register of AVX2: loads that widen to float32, and stores that round.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "header.h"

namespace millrace::avx2 {

constexpr int LANES = 8;

using Floats = __m256;
using Integers = __m256i;

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline Floats load(const Bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
/// The bits of a bfloat16 in the upper half of each lane; the lower half is of no use. Ties go to even, and NaN stays NaN.
inline Integers round_to_bf16(Floats x) {
    const Integers bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
    const Integers odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const Integers rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const Integers quiet = _mm256_or_si256(bits, _mm256_set1_epi32(64 << 16));
    const Integers is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, quiet, is_nan);
}
inline void store(Bf16* p, Floats x) {
    const Integers result = _mm256_srli_epi32(round_to_bf16(x), 16);
    const Integers pairs = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(pairs));
}

/// The first `count` numbers, and zeros.
template <typename T>
inline Floats load(const T* p, int count) {
    if (count >= LANES) return load(p);
    T numbers[LANES] = {};
    std::memcpy(numbers, p, count * sizeof(T));
    return load(numbers);
}

template <typename T>
inline void store(T* p, Floats x, int count) {
    if (count >= LANES) return store(p, x);
    T numbers[LANES];
    store(numbers, x);
    std::memcpy(p, numbers, count * sizeof(T));
}

inline float sum_lanes(Floats x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

}  // namespace millrace::avx2
