// gelu(gate) * up, where a row is the gate's numbers and then up's.
#include "../_cpu/activation.h"

namespace millrace {
namespace {

template <typename T>
struct Call : Header {
    const T* x;
    T* out;
    long x_stride;
    int size, is_tanh;
};

template <typename T, Vec gelu(Vec)>
void run(const Call<T>& c) {
#pragma omp parallel for num_threads(c.team(2 * c.num_rows * c.size)) schedule(static)
    for (long row = 0; row < c.num_rows; row++) {
        const T *gate = c.x + row * c.x_stride, *up = gate + c.size;
        T* out = c.out + row * c.size;
        for (int i = 0; i < c.size; i += LANES) {
            const int left = c.size - i;
            store(out + i, times(gelu(load(gate + i, left)), load(up + i, left)), left);
        }
    }
}

template <typename T, bool exact>
void run(const void* call) {
    const Call<T>& c = *static_cast<const Call<T>*>(call);
    if (c.is_tanh) run<T, gelu_tanh<exact>>(c);
    else run<T, gelu<exact>>(c);
}

}  // namespace
}  // namespace millrace

extern "C" void gelu_and_mul_bf16(const void* call) { millrace::run<millrace::Bf16, false>(call); }
extern "C" void gelu_and_mul_f32(const void* call) { millrace::run<float, true>(call); }
