// Norm, rotation and the write to the KV cache: one pass, a head at a time.
#include "../_cpu/simd.h"

namespace millrace {
namespace {

constexpr int MAX_HEAD_DIM = 1024;

/// The arguments, as in op.py. Strides are in numbers: of a token, of a head; of a block, a head and a slot.
template <typename T>
struct Call : Header {
    T* query;
    const T *key, *value;
    T *k_cache, *v_cache;
    const int64_t *slots, *positions;
    const float* table;
    const T *q_weight, *k_weight;  // null for no norm
    long query_strides[2], key_strides[2], value_strides[2], k_strides[3], v_strides[3];
    int num_heads, num_kv_heads, block_size, head_dim, rot_dim;
    float eps;
};

/// Writes head `x`, normed and rotated by `row` (cosines, then sines), at `to`; the two may be the same.
template <typename T>
void norm_and_rotate(const T* x, T* to, const T* weight, const float* row, int size, int rot_dim, float eps) {
    float wide[MAX_HEAD_DIM];
    Vec squares = zero();
    for (int i = 0; i < size; i += LANES) {
        const int left = size - i;
        const Vec number = load(x + i, left);
        squares = multiply_add(number, number, squares);
        store(wide + i, weight ? times(number, load(weight + i, left)) : number, left);
    }
    const Vec scale = splat(weight ? 1.0f / std::sqrt(sum_of_lanes(squares) / size + eps) : 1.0f);
    const int half = rot_dim / 2;
    for (int i = 0; i < half; i += LANES) {
        const int left = half - i;
        const Vec a = times(scale, load(wide + i, left)), b = times(scale, load(wide + half + i, left));
        const Vec cos = load(row + i, left), sin = load(row + half + i, left);
        store(to + i, multiply_subtract(a, cos, times(b, sin)), left);
        store(to + half + i, multiply_add(b, cos, times(a, sin)), left);
    }
    for (int i = rot_dim; i < size; i += LANES) {
        const int left = size - i;
        store(to + i, times(scale, load(wide + i, left)), left);
    }
}

template <typename T>
void do_token(const Call<T>& c, long token) {
    const float* row = c.table + c.positions[token] * c.rot_dim;
    for (int head = 0; head < c.num_heads; head++) {
        T* x = c.query + token * c.query_strides[0] + head * c.query_strides[1];
        norm_and_rotate(x, x, c.q_weight, row, c.head_dim, c.rot_dim, c.eps);
    }
    const long slot = c.slots[token];
    if (slot < 0) return;
    const long block = slot / c.block_size, offset = slot % c.block_size;
    for (int head = 0; head < c.num_kv_heads; head++) {
        const T* key = c.key + token * c.key_strides[0] + head * c.key_strides[1];
        T* to = c.k_cache + block * c.k_strides[0] + head * c.k_strides[1] + offset * c.k_strides[2];
        norm_and_rotate(key, to, c.k_weight, row, c.head_dim, c.rot_dim, c.eps);
        const T* value = c.value + token * c.value_strides[0] + head * c.value_strides[1];
        std::memcpy(c.v_cache + block * c.v_strides[0] + head * c.v_strides[1] + offset * c.v_strides[2], value,
                    sizeof(T) * c.head_dim);
    }
}

template <typename T>
void run(const Call<T>& c) {
    const long num_numbers = c.num_rows * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim;
#pragma omp parallel for num_threads(c.team(num_numbers)) schedule(static)
    for (long token = 0; token < c.num_rows; token++) do_token(c, token);
}

}  // namespace
}  // namespace millrace

extern "C" void rope_and_store_bf16(const void* call) {
    millrace::run(*static_cast<const millrace::Call<millrace::Bf16>*>(call));
}
extern "C" void rope_and_store_f32(const void* call) {
    millrace::run(*static_cast<const millrace::Call<float>*>(call));
}
