// y = activation(x W^T + b) with W packed once: `[panel][unit][64 columns]`, units of 32 bits along in_features (simd.h, panels.h).
#include <type_traits>

#include "../_cpu/activation.h"
#include "../_cpu/panels.h"

namespace millrace {
namespace {

struct Call : Header {
    const uint32_t *x, *packed;
    const void* bias;  // null for none
    void* out;
    long x_stride, out_stride;  // in units, in numbers
    int num_units, num_columns, out_is_float, activation;
};

template <typename T, typename Out>
struct Product : Call {
    const uint32_t* panel(int i) const { return packed + long(i) * num_units * PANEL; }

    template <int ROWS>
    void tile(int row, int panel_index, Ahead ahead) const {
        Vec sum[ROWS][VECS];
        const int first = panel_index * PANEL, width = std::min(PANEL, num_columns - first);
        for (int v = 0; v < VECS; v++) {
            const T* biases = static_cast<const T*>(bias);
            const Vec start = bias ? load(biases + first + v * LANES, std::max(0, width - v * LANES)) : zero();
            for (int r = 0; r < ROWS; r++) sum[r][v] = start;
        }
        multiply_tile<T, ROWS, VECS>(sum, x + row * x_stride, x_stride, panel(panel_index), PANEL, num_units,
                                     ahead.start, ahead.step);
        activate<std::is_same<Out, float>::value>(sum[0], ROWS * VECS, activation);
        for (int r = 0; r < ROWS; r++) {
            Out* to = static_cast<Out*>(out) + (row + r) * out_stride + first;
            for (int v = 0; v < VECS && v * LANES < width; v++) store(to + v * LANES, sum[r][v], width - v * LANES);
        }
    }
};

template <typename T, typename Out>
void multiply(const Call& call) {
    const Product<T, Out> product{call};
    const int num_threads = call.team(long(call.num_columns) * call.num_units);
#pragma omp parallel num_threads(num_threads)
    multiply_panels(product, num_threads);
}

}  // namespace
}  // namespace millrace

extern "C" void packed_linear_bf16(const void* arguments) {
    using namespace millrace;
    const Call& call = *static_cast<const Call*>(arguments);
    if (call.out_is_float) multiply<Bf16, float>(call);
    else multiply<Bf16, Bf16>(call);
}

extern "C" void packed_linear_f32(const void* arguments) {
    millrace::multiply<float, float>(*static_cast<const millrace::Call*>(arguments));
}
