// silu(x G^T) * (x U^T), or x G^T and x U^T beside each other, with G and U packed in turns of 32 columns: a panel (panels.h) is 32 of G's and the same of U's.
#include "../_cpu/panels.h"

namespace millrace {
namespace {

constexpr int HALF = PANEL / 2, HALF_VECS = VECS / 2;

struct Call : Header {
    const uint32_t *x, *packed;
    void* out;
    long x_stride;  // in units
    int num_units, num_columns, activates;
};

template <typename T>
struct Product : Call {
    const uint32_t* panel(int i) const { return packed + long(i) * num_units * PANEL; }

    template <int ROWS>
    void tile(int row, int panel_index, Ahead ahead) const {
        Vec sum[ROWS][VECS];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECS; v++) sum[r][v] = zero();
        multiply_tile<T, ROWS, VECS>(sum, x + row * x_stride, x_stride, panel(panel_index), PANEL, num_units,
                                     ahead.start, ahead.step);
        for (int r = 0; r < ROWS; r++) {
            T* to = static_cast<T*>(out) + long(row + r) * (activates ? num_columns / 2 : num_columns) + panel_index * HALF;
            for (int v = 0; v < HALF_VECS; v++) {
                const Vec gate = sum[r][v], up = sum[r][HALF_VECS + v];
                if (activates) {
                    store(to + v * LANES, _mm512_mul_ps(silu(gate), up), LANES);
                } else {
                    store(to + v * LANES, gate, LANES);
                    store(to + num_columns / 2 + v * LANES, up, LANES);
                }
            }
        }
    }
};

template <typename T>
void multiply(const void* call) {
    const Product<T> product{*static_cast<const Call*>(call)};
    const int num_threads = product.team(long(product.num_columns) * product.num_units);
#pragma omp parallel num_threads(num_threads)
    multiply_panels(product, num_threads);
}

}  // namespace
}  // namespace millrace

extern "C" void packed_gated_linear_bf16(const void* call) { millrace::multiply<millrace::Bf16>(call); }
extern "C" void packed_gated_linear_f32(const void* call) { millrace::multiply<float>(call); }
