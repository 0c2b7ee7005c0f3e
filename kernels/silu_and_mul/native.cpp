// silu(gate) * up, where a row is the gate's numbers and then up's.
#include "../_cpu/simd.h"

namespace millrace {
namespace {

template <typename T>
struct Call : Header {
    const T* x;
    T* out;
    long x_stride;
    int size;
};

template <typename T>
void run(const Call<T>& c) {
#pragma omp parallel for num_threads(c.team(2 * c.num_rows * c.size)) schedule(static)
    for (long row = 0; row < c.num_rows; row++) {
        const T *gate = c.x + row * c.x_stride, *up = gate + c.size;
        T* out = c.out + row * c.size;
        for (int i = 0; i < c.size; i += LANES) {
            const int left = c.size - i;
            store(out + i, times(silu(load(gate + i, left)), load(up + i, left)), left);
        }
    }
}

}  // namespace
}  // namespace millrace

extern "C" void silu_and_mul_bf16(const void* call) {
    millrace::run(*static_cast<const millrace::Call<millrace::Bf16>*>(call));
}
extern "C" void silu_and_mul_f32(const void* call) {
    millrace::run(*static_cast<const millrace::Call<float>*>(call));
}
