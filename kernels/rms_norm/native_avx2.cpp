// RMSNorm after the residual addition, with AVX2: the same as native.cpp, in vectors of 8 numbers.
#include <cmath>

#include "../_cpu/avx2.h"

namespace millrace {
namespace {

template <typename T>
void norm_row(const T* x, const T* residual, const T* weight, T* out, T* new_residual, int size, float eps) {
    Floats squares = _mm256_setzero_ps();
    for (int i = 0; i < size; i += LANES) {
        const int left = size - i;
        Floats sum = load(x + i, left);
        if (residual) {
            store(new_residual + i, _mm256_add_ps(sum, load(residual + i, left)), left);
            sum = load(new_residual + i, left);  // rounded to T
        }
        squares = _mm256_fmadd_ps(sum, sum, squares);
    }
    const Floats scale = _mm256_set1_ps(1.0f / std::sqrt(sum_lanes(squares) / size + eps));
    const T* summed = residual ? new_residual : x;
    for (int i = 0; i < size; i += LANES) {
        const int left = size - i;
        const Floats scaled = _mm256_mul_ps(load(summed + i, left), scale);
        store(out + i, _mm256_mul_ps(scaled, load(weight + i, left)), left);
    }
}

template <typename T>
struct Call : Header {
    const T *x, *residual, *weight;  // residual: null for none
    T *out, *new_residual;
    long x_stride, residual_stride;
    int size;
    float eps;
};

template <typename T>
void run(const Call<T>& c) {
#pragma omp parallel for num_threads(c.team(c.num_rows * c.size)) schedule(static)
    for (long row = 0; row < c.num_rows; row++)
        norm_row(c.x + row * c.x_stride, c.residual ? c.residual + row * c.residual_stride : nullptr, c.weight,
                 c.out + row * c.size, c.new_residual + row * c.size, c.size, c.eps);
}

}  // namespace
}  // namespace millrace

extern "C" void rms_norm_bf16(const void* call) {
    millrace::run(*static_cast<const millrace::Call<millrace::Bf16>*>(call));
}
extern "C" void rms_norm_f32(const void* call) {
    millrace::run(*static_cast<const millrace::Call<float>*>(call));
}
