// y = x W^T + b, where W are unsigned integers of 4 or 8 bits with a scale and a zero point for each block of 16 to 128
// inputs. W was packed once (layout.py): panels of 32 outputs, each read from its beginning to its end.
//
// First the rows of x are rounded to 16-bit integers, block by block, to a scratch that all threads read. Rows of
// float32 become two such rows: what the first leaves of a number is rounded to the second. An instruction then
// multiplies pairs of inputs by pairs of codes and adds each pair, for 8 outputs. The sum over a block is exact in 32
// bits. It is scaled, and added in float32 in the order of the blocks, whatever the other rows are: results do not
// depend on the batch.
#include <omp.h>

#include <algorithm>

#include "../_cpu/avx2.h"

namespace millrace {
namespace {

using namespace avx2;

constexpr int VECTORS = 4;       // of a panel
constexpr int PANEL = LANES * VECTORS;
constexpr int MAX_ROWS = 4;      // of a tile
constexpr int BLOCK_ROWS = 64;   // rows whose sums stay in the L1 cache while the blocks of a panel pass
constexpr int MAX_BLOCK = 128;
constexpr int AHEAD = 1024;      // bytes between what is multiplied and what is brought to the cache
constexpr float INT16_MAX_FLOAT = 32767.0f, SMALLEST = 1e-30f;

/// The rows of 16-bit integers that stand for a row: in float32 a second one rounds what the first one leaves.
template <typename T>
constexpr int PARTS = sizeof(T) == sizeof(float) ? 2 : 1;

enum ScaleType : int { FLOAT32, BFLOAT16, FLOAT16 };

struct Call : Header {
    const void* x;
    const uint8_t* codes;
    const void* scales;
    const uint8_t* zeros;  // null: 2^(bits - 1)
    const void* bias;      // null for none
    char* rounded;         // scratch of one `Row` after the other
    void* out;
    long x_stride;         // in numbers
    int num_columns, num_blocks, block, bits, scale_type, out_is_float;

    long row_bytes() const { return num_blocks * (block * sizeof(int16_t) + sizeof(float) + sizeof(int32_t)); }
    long block_bytes() const { return long(block) * PANEL * bits / 8; }
};

/// A row of x in 16-bit integers: x is about values * scales, and sums are those of the values of a block.
struct Row {
    int16_t* values;
    float* scales;
    int32_t* sums;

    Row(const Call& call, int row) {
        values = reinterpret_cast<int16_t*>(call.rounded + row * call.row_bytes());
        scales = reinterpret_cast<float*>(values + long(call.num_blocks) * call.block);
        sums = reinterpret_cast<int32_t*>(scales + call.num_blocks);
    }
};

// ---- Numbers of 8 lanes ----

inline Floats load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Integers load_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

inline int sum_lanes(Integers x) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}

inline int largest_lane(Integers x) {
    __m128i largest = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    largest = _mm_max_epi32(largest, _mm_shuffle_epi32(largest, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(largest, _mm_shuffle_epi32(largest, 0xB1)));
}

// ---- Rows of x ----

/// The largest |x| of a block. Compared as integers, which puts NaN above infinity, so that none is lost.
inline float largest_of(const float* x, int block) {
    Integers largest = _mm256_setzero_si256();
    for (int i = 0; i < block; i += LANES)
        largest = _mm256_max_epi32(
            largest, _mm256_and_si256(_mm256_castps_si256(load(x + i)), _mm256_set1_epi32(0x7FFFFFFF)));
    const int bits = largest_lane(largest);
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

/// Rounds a block to integers of -32767 to 32767, ties to even, and takes what they stand for off it.
inline void round_block(float* x, int block, int b, const Row& row) {
    const float largest = largest_of(x, block), scale = largest * (1 / INT16_MAX_FLOAT);
    const Floats inverse = _mm256_set1_ps(largest > SMALLEST ? INT16_MAX_FLOAT / largest : 0.0f);
    Integers sum = _mm256_setzero_si256();
    for (int i = 0; i < block; i += 2 * LANES) {
        Integers part[2];
        for (int half = 0; half < 2; half++) {
            float* p = x + i + half * LANES;
            part[half] = _mm256_cvtps_epi32(_mm256_mul_ps(load(p), inverse));
            store(p, _mm256_fnmadd_ps(_mm256_cvtepi32_ps(part[half]), _mm256_set1_ps(scale), load(p)));
        }
        sum = _mm256_add_epi32(sum, _mm256_add_epi32(part[0], part[1]));
        const Integers both = _mm256_permute4x64_epi64(_mm256_packs_epi32(part[0], part[1]), 0xD8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row.values + b * block + i), both);
    }
    row.scales[b] = scale;
    row.sums[b] = sum_lanes(sum);
}

/// Rounds the blocks of a row, and the remainders for each further part.
template <typename T>
void round_row(const Call& call, int index) {
    const T* x = static_cast<const T*>(call.x) + index * call.x_stride;
    for (int b = 0; b < call.num_blocks; b++, x += call.block) {
        float rest[MAX_BLOCK];
        for (int i = 0; i < call.block; i += LANES) store(rest + i, load(x + i));
        for (int part = 0; part < PARTS<T>; part++)
            round_block(rest, call.block, b, Row(call, index * PARTS<T> + part));
    }
}

// ---- Products ----

/// Takes the codes of the outputs of one vector, for a pair of inputs, from the codes of a panel: 16-bit lanes, the
/// bits of several vectors in each.
template <int BITS>
inline Integers codes_of(const uint8_t* pair, int vector) {
    constexpr int FIELDS = 16 / BITS;
    const int field = vector % FIELDS;
    const uint8_t* p = pair + vector / FIELDS * sizeof(Integers);
    const Integers shifted = _mm256_srli_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), field * BITS);
    return field == FIELDS - 1 ? shifted : _mm256_and_si256(shifted, _mm256_set1_epi16((1 << BITS) - 1));
}

/// out[r][v] = the sum over a block of x[r] times the codes of vector FIRST + v.
template <int BITS, int ROWS, int FIRST, int COUNT>
inline void multiply_block(
    Integers (&out)[ROWS][COUNT], const Call& call, const int16_t* x, long x_stride, const uint8_t* codes
) {
    Integers sum[ROWS][COUNT];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < COUNT; v++) sum[r][v] = _mm256_setzero_si256();
    for (int i = 0; i < call.block; i += 2, codes += PANEL * 2 * BITS / 8) {
        if (ROWS <= 2 || FIRST == 0) _mm_prefetch(reinterpret_cast<const char*>(codes + AHEAD), _MM_HINT_T0);
        Integers code[COUNT];
#pragma GCC unroll 4
        for (int v = 0; v < COUNT; v++) code[v] = codes_of<BITS>(codes, FIRST + v);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            int32_t pair;
            std::memcpy(&pair, x + r * x_stride + i, sizeof pair);
            const Integers pairs = _mm256_set1_epi32(pair);
#pragma GCC unroll 4
            for (int v = 0; v < COUNT; v++)
                sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(pairs, code[v]));
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < COUNT; v++) out[r][v] = sum[r][v];
}

/// A panel, and the rows that are multiplied by it.
struct Panel : Call {
    int index;

    Panel(const Call& call, int panel) : Call(call), index(panel) {}

    Floats scale(int b, int vector) const {
        const long i = (long(index) * num_blocks + b) * PANEL + vector * LANES;
        if (scale_type == FLOAT32) return load(static_cast<const float*>(scales) + i);
        if (scale_type == BFLOAT16) return load(static_cast<const Bf16*>(scales) + i);
        return load_half(static_cast<const uint16_t*>(scales) + i);
    }

    /// What the zero points of a block add to its products with inputs of a sum.
    Integers shift(int b, int vector, int32_t sum) const {
        if (!zeros) return _mm256_set1_epi32(sum * (1 << (bits - 1)));
        const long i = (long(index) * num_blocks + b) * PANEL + vector * LANES;
        return _mm256_mullo_epi32(load_bytes(zeros + i), _mm256_set1_epi32(sum));
    }

    /// sums[r] += the products of a block with ROWS rows and COUNT vectors of the panel.
    template <int BITS, int ROWS, int FIRST, int COUNT>
    void add_vectors(int row, int b, float (*sums)[PANEL]) const {
        const Row first(*this, row);
        const uint8_t* block_codes = codes + (long(index) * num_blocks + b) * block_bytes();
        Integers products[ROWS][COUNT];
        const long x_stride = row_bytes() / long(sizeof(int16_t));
        multiply_block<BITS, ROWS, FIRST, COUNT>(products, *this, first.values + b * block, x_stride, block_codes);
        for (int v = 0; v < COUNT; v++) {
            const Floats factor = scale(b, FIRST + v);
            for (int r = 0; r < ROWS; r++) {
                const Row x(*this, row + r);
                const Integers start = shift(b, FIRST + v, x.sums[b]);
                const Floats exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(products[r][v], start));
                float* to = sums[r] + (FIRST + v) * LANES;
                store(to, _mm256_fmadd_ps(exact, _mm256_mul_ps(factor, _mm256_set1_ps(x.scales[b])), load(to)));
            }
        }
    }

    template <int BITS, int ROWS>
    void add_rows(int row, int b, float (*sums)[PANEL]) const {
        if (ROWS <= 2) return add_vectors<BITS, ROWS, 0, VECTORS>(row, b, sums);
        add_vectors<BITS, ROWS, 0, VECTORS / 2>(row, b, sums);  // The registers hold the sums of half a panel.
        add_vectors<BITS, ROWS, VECTORS / 2, VECTORS / 2>(row, b, sums);
    }

    /// The same for up to MAX_ROWS rows.
    template <int BITS>
    void add_tile(int num_rows, int row, int b, float (*sums)[PANEL]) const {
        switch (num_rows) {
            case 1: return add_rows<BITS, 1>(row, b, sums);
            case 2: return add_rows<BITS, 2>(row, b, sums);
            case 3: return add_rows<BITS, 3>(row, b, sums);
            default: return add_rows<BITS, 4>(row, b, sums);
        }
    }

    /// Multiplies up to BLOCK_ROWS rows, in tiles of nearly equal height.
    template <int BITS>
    void multiply(int first, int num_rows, float (*sums)[PANEL]) const {
        std::fill(sums[0], sums[num_rows], 0.0f);
        const int num_tiles = ceil_div(num_rows, MAX_ROWS);
        for (int b = 0; b < num_blocks; b++)
            for (int row = 0, i = 0; i < num_tiles; i++) {
                const int height = ceil_div(num_rows - row, num_tiles - i);
                add_tile<BITS>(height, first + row, b, sums + row);
                row += height;
            }
    }

    /// Adds the parts of each row and the bias, and rounds.
    template <typename T, typename Out>
    void write(int first, int num_rows, float (*sums)[PANEL]) const {
        const int column = index * PANEL, width = std::min(PANEL, num_columns - column);
        float start[PANEL] = {};
        for (int c = 0; bias && c < width; c++) start[c] = widen(static_cast<const T*>(bias)[column + c]);
        for (int r = 0; r < num_rows; r++) {
            Out rounded[PANEL];
            for (int v = 0; v < PANEL; v += LANES) {
                Floats sum = load(start + v);
                for (int part = 0; part < PARTS<T>; part++)
                    sum = _mm256_add_ps(sum, load(sums[r * PARTS<T> + part] + v));
                store(rounded + v, sum);
            }
            std::copy(rounded, rounded + width, static_cast<Out*>(out) + (first + r) * long(num_columns) + column);
        }
    }
};

template <typename T>
void run(const Call& call) {
    const int num_rows = int(call.num_rows), num_panels = ceil_div(call.num_columns, PANEL);
    const int num_groups = ceil_div(num_rows * PARTS<T>, BLOCK_ROWS);
    const int height = ceil_div(num_rows, std::max(1, num_groups));
    const int num_threads = call.team(long(num_panels) * call.num_blocks * call.block_bytes());
    const int chunk = std::max(1, num_panels / (8 * num_threads));  // Panels in a row, which lie one after the other.
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static)
        for (int row = 0; row < num_rows; row++) round_row<T>(call, row);
        float sums[BLOCK_ROWS][PANEL];
#pragma omp for collapse(2) schedule(dynamic, chunk) nowait
        for (int group = 0; group < num_groups; group++)
            for (int index = 0; index < num_panels; index++) {
                const Panel panel(call, index);
                const int first = group * height, rows = std::min(height, num_rows - first);
                if (rows <= 0) continue;
                if (call.bits == 4) panel.multiply<4>(first * PARTS<T>, rows * PARTS<T>, sums);
                else panel.multiply<8>(first * PARTS<T>, rows * PARTS<T>, sums);
                if (call.out_is_float) panel.write<T, float>(first, rows, sums);
                else panel.write<T, Bf16>(first, rows, sums);
            }
    }
}

}  // namespace
}  // namespace millrace

extern "C" void packed_group_linear_bf16(const void* call) {
    millrace::run<millrace::Bf16>(*static_cast<const millrace::Call*>(call));
}
extern "C" void packed_group_linear_f32(const void* call) {
    millrace::run<float>(*static_cast<const millrace::Call*>(call));
}
