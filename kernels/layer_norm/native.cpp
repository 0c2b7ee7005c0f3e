// LayerNorm after the residual addition: a row is read once, and then twice more from the L1 cache.
#include "../_cpu/simd.h"

namespace millrace {
namespace {

template <typename T>
struct Call : Header {
    const T *x, *residual, *weight, *bias;  // null for none: residual, weight, bias
    T *out, *new_residual;
    long x_stride, residual_stride;
    int size;
    float eps;
};

template <typename T>
float mean(const T* x, const T* residual, T* new_residual, int size) {
    Vec total = zero();
    for (int i = 0; i < size; i += LANES) {
        const int left = size - i;
        Vec sum = load(x + i, left);
        if (residual) {
            sum = rounded<T>(add(sum, load(residual + i, left)));
            store(new_residual + i, sum, left);
        }
        total = add(total, sum);
    }
    return sum_of_lanes(total) / size;
}

template <typename T>
float variance(const T* x, float mean, int size) {
    Vec squares = zero();
    for (int i = 0; i < size; i += LANES) {
        const int left = size - i;
        Vec centred = subtract(load(x + i, left), splat(mean));
        if (left < LANES) centred = only(first_lanes(left), centred);
        squares = multiply_add(centred, centred, squares);
    }
    return sum_of_lanes(squares) / size;
}

template <typename T>
void norm_row(const Call<T>& c, long row) {
    const T* x = c.x + row * c.x_stride;
    T *out = c.out + row * c.size, *new_residual = c.new_residual + row * c.size;
    const float centre = mean(x, c.residual ? c.residual + row * c.residual_stride : nullptr, new_residual, c.size);
    const T* summed = c.residual ? new_residual : x;
    const Vec scale = splat(1.0f / std::sqrt(variance(summed, centre, c.size) + c.eps));
    for (int i = 0; i < c.size; i += LANES) {
        const int left = c.size - i;
        Vec normed = times(subtract(load(summed + i, left), splat(centre)), scale);
        if (c.weight) normed = times(normed, load(c.weight + i, left));
        if (c.bias) normed = add(normed, load(c.bias + i, left));
        store(out + i, normed, left);
    }
}

template <typename T>
void run(const Call<T>& c) {
#pragma omp parallel for num_threads(c.team(c.num_rows * c.size)) schedule(static)
    for (long row = 0; row < c.num_rows; row++) norm_row(c, row);
}

}  // namespace
}  // namespace millrace

extern "C" void layer_norm_bf16(const void* call) {
    millrace::run(*static_cast<const millrace::Call<millrace::Bf16>*>(call));
}
extern "C" void layer_norm_f32(const void* call) {
    millrace::run(*static_cast<const millrace::Call<float>*>(call));
}
