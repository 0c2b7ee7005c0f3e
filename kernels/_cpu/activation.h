// The activations of feed-forward networks, on 16 floats. What is not `exact` is as precise as bfloat16 can tell.
#pragma once
#include "simd.h"

namespace millrace {

/// In the order of ACTIVATIONS in packed_linear/op.py.
enum Activation { NONE, GELU, GELU_TANH, RELU, SILU };

/// The sum of c[i] * x^i.
template <int N>
inline Vec polynomial(const float (&c)[N], Vec x) {
    Vec sum = splat(c[N - 1]);
#pragma GCC unroll 16
    for (int i = N - 2; i >= 0; i--) sum = multiply_add(sum, x, splat(c[i]));
    return sum;
}

/// x * normal_cdf(x), as max(x, 0) - a * normal_cdf(-a) with a = |x|. The second factor is a polynomial in a, fitted so
/// that the result is within 2e-7, or 2e-5 if it is not `exact`; beyond the end of the fit it is as good as 0.
template <bool exact>
inline Vec gelu(Vec x) {
    constexpr float FINE[] = {
        2.97976948e-03f,  -2.50075149e-02f, 9.45580144e-02f,  -2.06834748e-01f, 2.71902917e-01f, -1.76800014e-01f,
        -5.16529778e-02f, 2.16281997e-01f,  -1.61338196e-01f, -2.85417558e-02f, 1.27740398e-01f, -5.90441558e-02f,
        -3.46137936e-02f, 3.79480272e-02f,  -1.83740482e-03f, -8.00266115e-03f, 2.26211116e-03f,
    };
    constexpr float ROUGH[] = {
        1.22210354e-02f, -7.13475325e-02f, 1.80937290e-01f,  -2.46404696e-01f, 1.56274624e-01f,
        3.71331777e-02f, -1.28492096e-01f, 4.98550472e-02f,  2.89507569e-02f,  -1.91274212e-02f,
    };
    constexpr float END = exact ? 5.5f : 4.5f;
    const Vec size = smaller(magnitude(x), splat(END));
    const Vec place = multiply_subtract(size, splat(2 / END), splat(1.0f));  // -1 to 1, where powers do not grow
    const Vec below = exact ? polynomial(FINE, place) : polynomial(ROUGH, place);
    return negative_multiply_add(size, below, larger(zero(), x));
}

/// x / (1 + exp(-2y)) with y = sqrt(2 / pi) * (x + 0.044715 x^3), which is x/2 * (1 + tanh(y)).
template <bool exact>
inline Vec gelu_tanh(Vec x) {
    constexpr float FACTOR = -2 * 0.7978845608f * LOG2_E;
    const Vec square = times(x, x);
    const Vec power = times(x, multiply_add(square, splat(0.044715f * FACTOR), splat(FACTOR)));
    return divide(x, add(splat(1.0f), exp2<exact>(power)));
}

template <bool exact>
inline Vec silu_as(Vec x) {
    return divide(x, add(splat(1.0f), exp2<exact>(times(x, splat(-LOG2_E)))));
}

/// Applies an activation to some vectors in place.
template <bool exact>
inline void activate(Vec* x, int count, int activation) {
    switch (activation) {
        case GELU: for (int i = 0; i < count; i++) x[i] = gelu<exact>(x[i]); break;
        case GELU_TANH: for (int i = 0; i < count; i++) x[i] = gelu_tanh<exact>(x[i]); break;
        case RELU: for (int i = 0; i < count; i++) x[i] = larger(zero(), x[i]); break;
        case SILU: for (int i = 0; i < count; i++) x[i] = silu_as<exact>(x[i]); break;
    }
}

}  // namespace millrace
