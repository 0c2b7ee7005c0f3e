// The walk of a matrix product over a packed weight: which thread multiplies which rows by which panel, in which order.
//
// A weight is packed in panels of 64 columns. A panel is what one pass over the units yields: 64 outputs of up to 6
// rows, in 24 registers. Panels are read one after the other, as they lie in memory, and a row adds up its products in
// the order of the units, whatever the other rows are: results do not depend on the batch.
//
// A product brings `num_rows`, `num_columns`, `num_units`, the memory of a panel (`panel(i)`) and its innermost part,
// `tile<ROWS>(row, panel, ahead)`.
#pragma once
#include "simd.h"

namespace millrace {

constexpr int PANEL = 64;
constexpr int VECS = PANEL / LANES;
constexpr int MAX_ROWS = 6;
constexpr int BLOCK_ROWS = 96;  // rows that stay in the L2 cache while panels pass
constexpr int MIN_TILES_AHEAD = 6;  // with fewer, memory is busy anyway (measured)

/// What a tile brings to the cache: a part of the next panel.
struct Ahead {
    const char* start = nullptr;
    int step = 0;
};

template <typename Product>
void rows_by_panel(const Product& p, int row, int num_rows, int panel, Ahead ahead) {
    switch (num_rows) {
        case 1: return p.template tile<1>(row, panel, ahead);
        case 2: return p.template tile<2>(row, panel, ahead);
        case 3: return p.template tile<3>(row, panel, ahead);
        case 4: return p.template tile<4>(row, panel, ahead);
        case 5: return p.template tile<5>(row, panel, ahead);
        default: return p.template tile<6>(row, panel, ahead);
    }
}

/// Multiplies rows `first` to `last - 1` by one panel, in tiles of nearly equal height; `next` is the panel after it.
template <typename Product>
void block_by_panel(const Product& p, int first, int last, int panel, int next) {
    const int num_tiles = ceil_div(last - first, MAX_ROWS);
    const char* ahead = reinterpret_cast<const char*>(p.panel(next));
    const int step = next == panel || num_tiles < MIN_TILES_AHEAD ? 0 : ceil_div(PANEL * sizeof(uint32_t), num_tiles);
    for (int row = first, i = 0; row < last; i++) {
        const int num_rows = ceil_div(last - row, num_tiles - i);
        rows_by_panel(p, row, num_rows, panel, {ahead + i * long(step) * p.num_units, step});
        row += num_rows;
    }
}

/// Cuts the rows in blocks that stay in the L2 cache, and shares out the panels of each block. All threads of a parallel
/// region call it.
template <typename Product>
void multiply_panels(const Product& p, int num_threads) {
    const int num_rows = int(p.num_rows), num_panels = ceil_div(p.num_columns, PANEL);
    const int num_blocks = ceil_div(num_rows, BLOCK_ROWS), height = ceil_div(num_rows, std::max(1, num_blocks));
    // Panels in a row, each of which brings the next one. Not too many even where there are blocks enough: another process
    // may take a thread's core for a while, and then the others wait for it until it has done what it took.
    const int run = std::max(1, num_panels / (num_blocks >= 4 * num_threads ? 4 : 4 * num_threads));
#pragma omp for collapse(2) schedule(dynamic, 1) nowait
    for (int block = 0; block < num_blocks; block++)
        for (int panel = 0; panel < num_panels; panel += run)
            for (int i = panel, end = std::min(panel + run, num_panels); i < end; i++)
                block_by_panel(p, block * height, std::min((block + 1) * height, num_rows), i,
                               std::min(i + 1, num_panels - 1));
}

}  // namespace millrace
