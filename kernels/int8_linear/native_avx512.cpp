// y = q(x) W^T * scales + b, where q(x) and W are 8-bit integers. W was packed once: `[panel][1 + unit][64 columns]`,
// units of 32 bits along in_features, here four integers; the first of a panel is what its sums start from (layout.py).
//
// First all rows of x are quantised, to a scratch that all threads read; then panels pass (panels.h). Sums are exact.
#include "../_cpu/panels.h"

namespace millrace {
namespace {

constexpr int UNIT = 4;  // integers in a unit
constexpr float INT8_MAX_FLOAT = 127.0f, SMALLEST = 1e-30f;
constexpr int OFFSET = 128;  // makes bytes unsigned; the sums start from what it adds to them

struct Call : Header {
    const void* x;
    const uint32_t* packed;
    const float* weight_scale;
    const void* bias;  // null for none
    uint32_t* quantised;  // [num_rows, num_units + 1]: a row's units, then its scale
    void* out;
    long x_stride;  // in numbers
    int num_units, num_columns, out_is_float;

    long row_units() const { return num_units + 1; }
    const uint32_t* row(int i) const { return quantised + i * row_units(); }
    float row_scale(int i) const {
        float scale;
        std::memcpy(&scale, row(i) + num_units, sizeof scale);
        return scale;
    }
    const uint32_t* panel(int i) const { return packed + i * row_units() * PANEL; }
};

/// The largest |x| of a row. Compared as integers, which puts NaN above infinity, so that none is lost.
template <typename T>
float largest_of(const T* x, int size) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < size; i += LANES) {
        const __m512i bits = _mm512_castps_si512(load(x + i, size - i));
        largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, magnitude));
    }
    const int bits = _mm512_reduce_max_epi32(largest);
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

/// Rounds a row to integers of -127 to 127, ties to even, and stores them with 128 added; then the row's scale.
template <typename T>
void quantise(const T* x, int size, uint32_t* row) {
    const float largest = largest_of(x, size), scale = largest * (1 / INT8_MAX_FLOAT);
    const Vec inverse = splat(largest > SMALLEST ? INT8_MAX_FLOAT / largest : 0.0f);
    uint8_t* bytes = reinterpret_cast<uint8_t*>(row);
    for (int i = 0; i < size; i += LANES) {
        const __m512i numbers = _mm512_cvtps_epi32(_mm512_mul_ps(load(x + i, size - i), inverse));
        const __m128i packed = _mm512_cvtepi32_epi8(_mm512_add_epi32(numbers, _mm512_set1_epi32(OFFSET)));
        if (size - i >= LANES) _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + i), packed);
        else _mm_mask_storeu_epi8(bytes + i, first_lanes(size - i), packed);
    }
    std::memcpy(bytes + size, &scale, sizeof scale);
}

/// out[r][v] = start[v] + a[r] . b[v] over the units of ROWS rows and a panel; its first unit holds the starts.
///
/// It is `multiply_tile` of simd.h in integers. The sums are variables of its own, each named by a constant: only then
/// does the compiler (gcc 12) keep them in registers for the whole loop, which is twice as fast.
template <int ROWS>
inline void add_products(
    __m512i (&out)[ROWS][VECS], const Call& p, const uint32_t* a, const uint32_t* b, Ahead ahead
) {
    const long a_stride = p.row_units();
    const int num_units = p.num_units, step = ahead.step;
    const char* start = ahead.start;
    __m512i sum[ROWS][VECS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) sum[r][v] = _mm512_loadu_si512(b + v * LANES);
    for (int u = 0; u < num_units; u++, start += step) {
        b += PANEL;
        if (step) _mm_prefetch(start, _MM_HINT_T1);
        __m512i column[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) column[v] = _mm512_loadu_si512(b + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const __m512i x = _mm512_set1_epi32(a[r * a_stride + u]);
#pragma GCC unroll 4
            for (int v = 0; v < VECS; v++) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], x, column[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) out[r][v] = sum[r][v];
}

template <typename T, typename Out>
struct Product : Call {
    template <int ROWS>
    void tile(int row, int panel_index, Ahead ahead) const {
        __m512i sum[ROWS][VECS];
        add_products(sum, *this, this->row(row), panel(panel_index), ahead);
        const int first = panel_index * PANEL;
        for (int v = 0; v < VECS && first + v * LANES < num_columns; v++) {
            const int column = first + v * LANES, left = num_columns - column;
            const Vec scale = load(weight_scale + column, left);
            const Vec start = bias ? load(static_cast<const T*>(bias) + column, left) : zero();
            for (int r = 0; r < ROWS; r++) {
                const Vec scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][v]), splat(row_scale(row + r)));
                Out* to = static_cast<Out*>(out) + long(row + r) * num_columns + column;
                store(to, _mm512_fmadd_ps(scaled, scale, start), left);
            }
        }
    }
};

template <typename T, typename Out>
void multiply(const Call& call) {
    const Product<T, Out> product{call};
    const int num_threads = call.team(long(call.num_columns) * call.num_units);
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static)
        for (int row = 0; row < int(call.num_rows); row++)
            quantise(static_cast<const T*>(call.x) + row * call.x_stride, call.num_units * UNIT,
                     call.quantised + row * call.row_units());
        multiply_panels(product, num_threads);
    }
}

}  // namespace
}  // namespace millrace

extern "C" void int8_linear_bf16(const void* arguments) {
    using namespace millrace;
    const Call& call = *static_cast<const Call*>(arguments);
    if (call.out_is_float) multiply<Bf16, float>(call);
    else multiply<Bf16, Bf16>(call);
}

extern "C" void int8_linear_f32(const void* arguments) {
    millrace::multiply<float, float>(*static_cast<const millrace::Call*>(arguments));
}
