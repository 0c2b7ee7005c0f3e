// Rows of a table of integers in groups, by id. The table is packed for products (packed_group_linear/layout.py), where
// the codes of a row lie in every 16th pair of 16-bit lanes.
#include "../_cpu/simd.h"

namespace millrace {
namespace {

constexpr int PANEL = 32, PANEL_LANES = 8;  // outputs of a panel, and of one of its vectors
constexpr int MAX_BLOCK = 128;

enum ScaleType : int { FLOAT32, BFLOAT16, FLOAT16 };

struct Call : Header {
    const int64_t* ids;
    const uint16_t* codes;
    const void* scales;
    const uint8_t* zeros;  // null: 2^(bits - 1)
    void* out;
    int num_blocks, block, bits, scale_type;

    float scale(long i) const {
        if (scale_type == FLOAT32) return static_cast<const float*>(scales)[i];
        const uint16_t half = static_cast<const uint16_t*>(scales)[i];
        return scale_type == FLOAT16 ? _cvtsh_ss(half) : widen(Bf16{half});
    }
};

/// Dequantises a block of a row, of which the table has row `id`.
void dequantise_block(const Call& call, int64_t id, int b, float* to) {
    const int fields = 16 / call.bits, halves = call.bits / 4;
    const int output = int(id % PANEL), vector = output / PANEL_LANES, shift = vector % fields * call.bits;
    const long index = id / PANEL * call.num_blocks + b;
    const float scale = call.scale(index * PANEL + output);
    const int zero = call.zeros ? call.zeros[index * PANEL + output] : 1 << (call.bits - 1);
    const int step = halves * PANEL_LANES * 2;  // from one pair of inputs to the next one
    const uint16_t* codes = call.codes + index * (call.block / 2) * step;
    codes += (vector / fields * PANEL_LANES + output % PANEL_LANES) * 2;
    for (int i = 0; i < call.block; i++) {
        const int code = codes[i / 2 * step + i % 2] >> shift & ((1 << call.bits) - 1);
        to[i] = float(code - zero) * scale;
    }
}

template <typename T>
void run(const Call& call) {
    const long size = long(call.num_blocks) * call.block;
#pragma omp parallel for num_threads(call.team(call.num_rows * size)) schedule(static)
    for (long row = 0; row < call.num_rows; row++)
        for (int b = 0; b < call.num_blocks; b++) {
            float block[MAX_BLOCK];
            dequantise_block(call, call.ids[row], b, block);
            T* out = static_cast<T*>(call.out) + row * size + long(b) * call.block;
            for (int i = 0; i < call.block; i += LANES) store(out + i, load(block + i));
        }
}

}  // namespace
}  // namespace millrace

extern "C" void packed_group_embedding_bf16(const void* call) {
    millrace::run<millrace::Bf16>(*static_cast<const millrace::Call*>(call));
}
extern "C" void packed_group_embedding_f32(const void* call) {
    millrace::run<float>(*static_cast<const millrace::Call*>(call));
}
