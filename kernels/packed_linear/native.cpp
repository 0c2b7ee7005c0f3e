// y = x W^T + b with W packed once: `[panel][unit][64 columns]`, units of 32 bits along in_features (simd.h).
//
// A panel is what one pass over the units yields: 64 outputs of up to 6 rows, in 24 registers. Panels are read one after
// the other, as they lie in memory, and a row adds up its products in the order of the units, whatever the other rows
// are: results do not depend on the batch.
#include "../_cpu/simd.h"

namespace millrace {
namespace {

constexpr int PANEL = 64;
constexpr int VECS = PANEL / LANES;
constexpr int MAX_ROWS = 6;
constexpr int BLOCK_ROWS = 96;  // rows that stay in the L2 cache while panels pass
constexpr int MIN_TILES_AHEAD = 6;  // with fewer, memory is busy anyway (measured)

struct Product : Header {
    const uint32_t *x, *packed;
    const void* bias;  // null for none
    void* out;
    long x_stride, out_stride;  // in units, in numbers
    int num_units, num_columns, out_is_float;
};

/// What a tile brings to the cache: a part of the next panel.
struct Ahead {
    const char* start = nullptr;
    int step = 0;
};

template <typename T, typename Out, int ROWS>
void tile(const Product& p, int row, int panel, Ahead ahead) {
    Vec sum[ROWS][VECS];
    const int first = panel * PANEL, width = std::min(PANEL, p.num_columns - first);
    for (int v = 0; v < VECS; v++) {
        const T* bias = static_cast<const T*>(p.bias);
        const Vec start = bias ? load(bias + first + v * LANES, std::max(0, width - v * LANES)) : zero();
        for (int r = 0; r < ROWS; r++) sum[r][v] = start;
    }
    const uint32_t* columns = p.packed + long(panel) * p.num_units * PANEL;
    multiply_tile<T, ROWS, VECS>(sum, p.x + row * p.x_stride, p.x_stride, columns, PANEL, p.num_units,
                                   ahead.start, ahead.step);
    for (int r = 0; r < ROWS; r++) {
        Out* out = static_cast<Out*>(p.out) + (row + r) * p.out_stride + first;
        for (int v = 0; v < VECS && v * LANES < width; v++) store(out + v * LANES, sum[r][v], width - v * LANES);
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
    const long panel_bytes = long(p.num_units) * PANEL * sizeof(uint32_t);
    const char* ahead = reinterpret_cast<const char*>(p.packed) + next * panel_bytes;
    const int step = next == panel || num_tiles < MIN_TILES_AHEAD ? 0 : ceil_div(PANEL * sizeof(uint32_t), num_tiles);
    for (int row = first, i = 0; row < last; i++) {
        const int num_rows = ceil_div(last - row, num_tiles - i);
        rows_by_panel<T, Out>(p, row, num_rows, panel, {ahead + i * long(step) * p.num_units, step});
        row += num_rows;
    }
}

/// Cuts the rows in blocks that stay in the L2 cache, and shares out the panels of each block.
template <typename T, typename Out>
void multiply(const Product& p) {
    const int num_rows = int(p.num_rows), num_threads = p.team(long(p.num_columns) * p.num_units);
    const int num_panels = ceil_div(p.num_columns, PANEL), num_blocks = ceil_div(num_rows, BLOCK_ROWS);
    const int height = ceil_div(num_rows, std::max(1, num_blocks));
    // Panels in a row, each of which brings the next one: all of them if there are blocks enough to share out.
    const int run = num_blocks >= 4 * num_threads ? num_panels : std::max(1, num_panels / (4 * num_threads));
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(num_threads)
    for (int block = 0; block < num_blocks; block++)
        for (int panel = 0; panel < num_panels; panel += run)
            for (int i = panel, end = std::min(panel + run, num_panels); i < end; i++)
                block_by_panel<T, Out>(p, block * height, std::min((block + 1) * height, num_rows), i,
                                       std::min(i + 1, num_panels - 1));
}

}  // namespace
}  // namespace millrace

extern "C" void packed_linear_bf16(const void* call) {
    using namespace millrace;
    const Product& product = *static_cast<const Product*>(call);
    if (product.out_is_float) multiply<Bf16, float>(product);
    else multiply<Bf16, Bf16>(product);
}

extern "C" void packed_linear_f32(const void* call) {
    millrace::multiply<float, float>(*static_cast<const millrace::Product*>(call));
}
