// y = q(x) W^T * scales + b, where q(x) and W are 8-bit integers. W was packed once: `[panel][1 + unit][64 columns]`,
// units of 32 bits along in_features, here four integers; the first of a panel is what its sums start from (layout.py).
//
// First all rows of x are quantised, to a scratch that all threads read; then it is as in packed_linear: a panel is what
// one pass over the units yields, 64 outputs of up to 6 rows, in 24 registers. Sums are exact, so results do not depend
// on the batch.
#include "../_cpu/simd.h"

namespace millrace {

namespace {

constexpr int UNIT = 4;  // integers in a unit
constexpr int PANEL = 64;
constexpr int VECS = PANEL / LANES;
constexpr int MAX_ROWS = 6;
constexpr int BLOCK_ROWS = 96;  // rows that stay in the L2 cache while panels pass
constexpr int MIN_TILES_AHEAD = 6;  // with fewer, memory is busy anyway
constexpr float INT8_MAX_FLOAT = 127.0f, SMALLEST = 1e-30f;
constexpr int OFFSET = 128;  // makes bytes unsigned; the sums start from what it adds to them

struct Product : Header {
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

/// What a tile brings to the cache: a part of the next panel.
struct Ahead {
    const char* start = nullptr;
    int step = 0;
};

/// out[r][v] = start[v] + a[r] . b[v] over the units of ROWS rows and a panel; its first unit holds the starts.
///
/// It is `multiply_tile` of simd.h in integers. The sums are variables of its own, each named by a constant: only then
/// does the compiler (gcc 12) keep them in registers for the whole loop, which is twice as fast.
template <int ROWS>
inline void add_products(
    __m512i (&out)[ROWS][VECS], const Product& p, const uint32_t* a, const uint32_t* b, Ahead ahead
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

template <typename T, typename Out, int ROWS>
void tile(const Product& p, int row, int panel, Ahead ahead) {
    __m512i sum[ROWS][VECS];
    add_products(sum, p, p.row(row), p.panel(panel), ahead);
    const int first = panel * PANEL;
    for (int v = 0; v < VECS && first + v * LANES < p.num_columns; v++) {
        const int column = first + v * LANES, left = p.num_columns - column;
        const Vec weight_scale = load(p.weight_scale + column, left);
        const Vec bias = p.bias ? load(static_cast<const T*>(p.bias) + column, left) : zero();
        for (int r = 0; r < ROWS; r++) {
            const Vec scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][v]), splat(p.row_scale(row + r)));
            Out* out = static_cast<Out*>(p.out) + long(row + r) * p.num_columns + column;
            store(out, _mm512_fmadd_ps(scaled, weight_scale, bias), left);
        }
    }
}

template <typename T, typename Out>
void rows_by_panel(const Product& p, int row, int num_rows, int panel, Ahead ahead) {
    switch (num_rows) {
        case 1: return tile<T, Out, 1>(p, row, panel, ahead);
        case 2: return tile<T, Out, 2>(p, row, panel, ahead);
        case 3: return tile<T, Out, 3>(p, row, panel, ahead);
        case 4: return tile<T, Out, 4>(p, row, panel, ahead);
        case 5: return tile<T, Out, 5>(p, row, panel, ahead);
        default: return tile<T, Out, 6>(p, row, panel, ahead);
    }
}

/// Multiplies rows `first` to `last - 1` by one panel, in tiles of nearly equal height; `next` is the panel after it.
template <typename T, typename Out>
void block_by_panel(const Product& p, int first, int last, int panel, int next) {
    const int num_tiles = ceil_div(last - first, MAX_ROWS);
    const char* ahead = reinterpret_cast<const char*>(p.panel(next));
    const int step = next == panel || num_tiles < MIN_TILES_AHEAD ? 0 : ceil_div(PANEL * sizeof(uint32_t), num_tiles);
    for (int row = first, i = 0; row < last; i++) {
        const int num_rows = ceil_div(last - row, num_tiles - i);
        rows_by_panel<T, Out>(p, row, num_rows, panel, {ahead + i * long(step) * p.num_units, step});
        row += num_rows;
    }
}

/// Quantises the rows; then cuts them in blocks that stay in the L2 cache, and shares out the panels of each block.
template <typename T, typename Out>
void multiply(const Product& p) {
    const int num_rows = int(p.num_rows), num_threads = p.team(long(p.num_columns) * p.num_units);
    const int num_panels = ceil_div(p.num_columns, PANEL), num_blocks = ceil_div(num_rows, BLOCK_ROWS);
    const int height = ceil_div(num_rows, std::max(1, num_blocks));
    const int run = num_blocks >= 4 * num_threads ? num_panels : std::max(1, num_panels / (4 * num_threads));
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static)
        for (int row = 0; row < num_rows; row++)
            quantise(static_cast<const T*>(p.x) + row * p.x_stride, p.num_units * UNIT,
                     p.quantised + row * p.row_units());
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (int block = 0; block < num_blocks; block++)
            for (int panel = 0; panel < num_panels; panel += run)
                for (int i = panel, end = std::min(panel + run, num_panels); i < end; i++)
                    block_by_panel<T, Out>(p, block * height, std::min((block + 1) * height, num_rows), i,
                                           std::min(i + 1, num_panels - 1));
    }
}

}  // namespace
}  // namespace millrace

extern "C" void int8_linear_bf16(const void* call) {
    using namespace millrace;
    const Product& product = *static_cast<const Product*>(call);
    if (product.out_is_float) multiply<Bf16, float>(product);
    else multiply<Bf16, Bf16>(product);
}

extern "C" void int8_linear_f32(const void* call) {
    millrace::multiply<float, float>(*static_cast<const millrace::Product*>(call));
}
