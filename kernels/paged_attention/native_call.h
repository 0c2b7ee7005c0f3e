// What a call of paged attention is, and what its items share.
#pragma once

#include <vector>

#include "../_cpu/simd.h"

namespace millrace {
namespace {

constexpr int KEYS = 64;  // of a tile
constexpr int KEY_VECS = KEYS / LANES;
constexpr int MAX_ROWS = 96;      // of an item: what is laid out for them stays in the L2 cache
constexpr int STEP_ROWS = 6;      // rows whose scores are in registers at once; so few take keys as they lie
constexpr int MIN_SPLIT = 4 * KEYS;  // fewest keys that are worth a partial result
constexpr int ITEMS_PER_THREAD = 4;
constexpr float NOTHING = -1e30f;  // the maximum of no scores; finite, so that a difference of two is not NaN

/// The arguments, as in op.py. Strides are in numbers.
template <typename T>
struct Call : Header {
    const T *query, *k_cache, *v_cache;
    const int *tables, *seq_lens, *starts;
    const float *sinks, *slopes;  // null for none
    const int* shared;            // null if no prefix is shared
    T* out;
    long query_token_stride, query_head_stride, block_stride, table_stride;
    int num_seqs, num_decodes;  // -1: as many as there are rows
    int num_heads, num_kv_heads, block_size, head_dim, window;
    float scale, softcap;
    int splits;  // whether keys may be shared out: results then depend, in their last bits, on the call

    int group() const { return num_heads / num_kv_heads; }
    int num_units() const { return ceil_div(head_dim, Unit<T>::SIZE); }
    int padded_units() const { return round_up(num_units(), LANES); }
    int padded_dim() const { return round_up(head_dim, LANES); }
};

struct Item {
    int seq;                       // whose block table is read
    int first_token, num_queries;  // rows of the query
    int kv_head, first_head, num_heads;
    int begin, end;  // keys
    int slot;        // of the partial result, or -1 if the result is whole
};

/// One partial result per (row, head, slot): sum of weighted values, maximum, sum of weights.
struct Partials {
    int num_slots = 0, stride = 0;
    std::vector<float> data;

    void fit(int slots, int width, long num_rows) {
        num_slots = slots;
        stride = width + LANES;
        if (long(data.size()) < num_rows * num_slots * stride) data.resize(num_rows * num_slots * stride);
    }
    float* at(long row_and_head, int slot) { return data.data() + (row_and_head * num_slots + slot) * stride; }
};

/// What a thread needs for an item, kept from call to call.
struct Scratch {
    std::vector<uint32_t> queries, keys, values, weights;
    std::vector<float> sums, zeros;  // zeros: a row that is nobody's
    float peaks[MAX_ROWS], shrink[MAX_ROWS];
    float totals[MAX_ROWS][LANES];  // each the sum of 16 numbers
    int positions[MAX_ROWS];

    template <typename T>
    void fit(const Call<T>& c) {
        grow(queries, MAX_ROWS * c.padded_units());
        grow(keys, c.padded_units() * KEYS);
        grow(values, KEYS / Unit<T>::SIZE * c.padded_dim());
        grow(weights, MAX_ROWS * KEYS / Unit<T>::SIZE);
        grow(sums, MAX_ROWS * c.padded_dim());
        grow(zeros, c.padded_dim());
    }
    template <typename V>
    static void grow(V& vector, size_t size) {
        if (vector.size() < size) vector.resize(size);
    }
};

/// Keys and values that are brought to the cache while others are computed, a few lines at a time: a processor waits for
/// some two dozen lines at once, and more would hold up the computation.
template <typename T>
class Upcoming {
  public:
    /// Starts with the tile of an item that begins at `base`.
    void begin(const Call<T>& c, const Item& item, int base) {
        num_runs = run = 0;
        run_bytes = long(sizeof(T)) * LANES * c.head_dim;
        for (int key = std::max(base, item.begin) / LANES * LANES; key < std::min(base + KEYS, item.end); key += LANES) {
            const long block = c.tables[item.seq * c.table_stride + key / c.block_size];
            const long slot = long(item.kv_head) * c.block_size + key % c.block_size;
            for (const T* cache : {c.k_cache, c.v_cache})
                runs[num_runs++] = reinterpret_cast<const char*>(cache + block * c.block_stride + slot * c.head_dim);
        }
        place = 0;
    }

    /// Lines that are left.
    int num_lines() const { return int((num_runs - run) * run_bytes - place) / 64; }

    void bring(int num_lines) {
        for (; num_lines > 0 && run < num_runs; num_lines--) {
            _mm_prefetch(runs[run] + place, _MM_HINT_T1);
            if ((place += 64) >= run_bytes) place = 0, run++;
        }
    }

  private:
    const char* runs[2 * KEY_VECS];
    int num_runs = 0, run = 0;
    long run_bytes = 0, place = 0;
};

}  // namespace
}  // namespace millrace
