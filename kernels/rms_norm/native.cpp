// RMSNorm after the residual addition: a row is read once, and read again from the L1 cache.
#include "../_cpu/simd.h"

namespace millrace {
namespace {

template <typename T>
void norm_row(const T* x, const T* residual, const T* weight, T* out, T* new_residual, int size, float eps) {
    Vec squares = zero();
    for (int i = 0; i < size; i += LANES) {
        const int left = size - i;
        Vec sum = load(x + i, left);
        if (residual) {
            sum = rounded<T>(add(sum, load(residual + i, left)));
            store(new_residual + i, sum, left);
        }
        squares = multiply_add(sum, sum, squares);
    }
    const float scale = 1.0f / std::sqrt(sum_of_lanes(squares) / size + eps);
    const T* summed = residual ? new_residual : x;
    for (int i = 0; i < size; i += LANES) {
        const int left = size - i;
        const Vec scaled = times(load(summed + i, left), splat(scale));
        store(out + i, times(scaled, load(weight + i, left)), left);
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
