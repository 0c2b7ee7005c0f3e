// One item of paged attention: a tile of rows and a range of keys (native.cpp says how the work is cut).
#pragma once

#include "native_call.h"

namespace millrace {
namespace {

template <typename T>
class Attention {
  public:
    Attention(const Call<T>& call, Scratch& scratch, Partials& partials) : c(call), s(scratch), partials(partials) {
        s.fit(c);
    }

    /// Computes an item; `next` is the one after it, or null.
    void run(const Item& item, const Item* next) {
        num_rows = item.num_queries * item.num_heads;
        const bool fits = c.head_dim % (2 * LANES) == 0 && c.block_size % LANES == 0;
        is_direct = c.splits && num_rows <= STEP_ROWS && fits;
        load_queries(item);
        for (int base = item.begin / KEYS * KEYS; base < item.end; base += KEYS) {
            const int low = std::max(item.begin - base, 0), high = std::min(item.end - base, KEYS);
            if (is_direct) {
                if (base + KEYS < item.end) upcoming.begin(c, item, base + KEYS);
                else if (next) upcoming.begin(c, *next, next->begin / KEYS * KEYS);
                run_directly(item, base, low, high);
            } else {
                run_laid_out(item, base, low, high);
            }
        }
        if (is_direct) Unit<T>::put_in_order(s.sums.data(), num_rows * c.padded_dim());
        finish(item);
    }

  private:
    using Number = typename Unit<T>::Number;

    const Call<T>& c;
    Scratch& s;
    Partials& partials;
    int num_rows = 0;
    bool is_direct = false;
    Upcoming<T> upcoming;
    const float* slope_of_row[MAX_ROWS];
    const T *key_rows[KEYS], *value_rows[KEYS];  // of a tile

    /// Copies the rows, filled up with zeros, and starts their softmax.
    void load_queries(const Item& item) {
        const int units = c.padded_units();
        std::memset(s.queries.data(), 0, sizeof(uint32_t) * num_rows * units);
        std::memset(s.sums.data(), 0, sizeof(float) * num_rows * c.padded_dim());
        for (int r = 0; r < num_rows; r++) {
            const int token = item.first_token + r / item.num_heads, head = item.first_head + r % item.num_heads;
            const T* row = c.query + token * c.query_token_stride + head * c.query_head_stride;
            copy_row(reinterpret_cast<Number*>(s.queries.data() + r * units), row, c.head_dim);
            // The last query of a sequence is its last token; in a shared prefix each query is one.
            const bool is_shared = token >= c.starts[item.seq + 1];
            const int seq = is_shared ? token : item.seq;
            s.positions[r] = c.seq_lens[seq] - (c.starts[seq + 1] - token);
            const bool has_sink = c.sinks && item.slot <= 0;
            s.peaks[r] = has_sink ? c.sinks[head] * LOG2_E : NOTHING;
            store(s.totals[r], has_sink ? only(first_lanes(1), splat(1.0f)) : zero());
            slope_of_row[r] = c.slopes ? c.slopes + head : nullptr;
        }
    }

    /// The keys of a tile lie in runs, one for each block: calls use(key, number of keys, where the first one lies).
    template <typename Use>
    void for_each_run(const Item& item, int base, Use use) const {
        const int* table = c.tables + item.seq * c.table_stride;
        int key = std::max(base, item.begin);
        const int end = std::min(base + KEYS, item.end);
        while (key < end) {
            const int index = key / c.block_size, slot = key % c.block_size;
            const int num_keys = std::min(c.block_size - slot, end - key);
            use(key - base, num_keys, table[index] * c.block_stride + (long(item.kv_head) * c.block_size + slot) * c.head_dim);
            key += num_keys;
        }
    }

    // Few rows: keys and values are taken as they lie, 16 keys at a time, which are neighbours in a block.

    void run_directly(const Item& item, int base, int low, int high) {
        long offsets[KEY_VECS];  // of the first of 16 keys
        for (int k = low / LANES * LANES; k < high; k += LANES) {
            const long block = c.tables[item.seq * c.table_stride + (base + k) / c.block_size];
            const long slot = long(item.kv_head) * c.block_size + (base + k) % c.block_size;
            offsets[k / LANES] = block * c.block_stride + slot * c.head_dim;
        }
        switch (c.padded_units() / LANES) {
            case 1: score_directly<1>(offsets, base, low, high); break;
            case 2: score_directly<2>(offsets, base, low, high); break;
            case 4: score_directly<4>(offsets, base, low, high); break;
            default: score_directly<0>(offsets, base, low, high);
        }
        switch (num_rows) {
            case 1: add_directly<1>(offsets, low, high); break;
            case 2: add_directly<2>(offsets, low, high); break;
            case 3: add_directly<3>(offsets, low, high); break;
            case 4: add_directly<4>(offsets, low, high); break;
            case 5: add_directly<5>(offsets, low, high); break;
            default: add_directly<6>(offsets, low, high);
        }
    }

    /// UNIT_VECS: vectors of a head, or 0 if that is only known now.
    template <int UNIT_VECS>
    void score_directly(const long* offsets, int base, int low, int high) {
        const int units = c.padded_units(), lines = ceil_div(upcoming.num_lines(), 2 * num_rows * KEY_VECS);
        for (int r = 0; r < num_rows; r++) {
            Vec scores[KEY_VECS];
            for (int g = 0; g < KEY_VECS; g++) {
                upcoming.bring(lines);
                const bool is_seen = g * LANES < high && (g + 1) * LANES > low;
                scores[g] = is_seen ? score_16<UNIT_VECS>(s.queries.data() + r * units, c.k_cache + offsets[g]) : zero();
            }
            soften<KEY_VECS>(scores, r, base, low, high);
        }
    }

    template <int UNIT_VECS>
    Vec score_16(const uint32_t* query, const T* keys) const {
        const int units = UNIT_VECS ? UNIT_VECS * LANES : c.padded_units();
        Vec products[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            products[i] = zero();
#pragma GCC unroll 4
            for (int u = 0; u < units; u += LANES)
                products[i] = Unit<T>::multiply_add(
                    products[i], load_units(query + u), Unit<T>::load(keys + (i * units + u) * Unit<T>::SIZE));
        }
        return sum_lanes(products);
    }

    /// Adds the weighted values of a tile, 32 numbers of a row at a time.
    template <int ROWS>
    void add_directly(const long* offsets, int low, int high) {
        constexpr int SIZE = Unit<T>::SIZE, STRIDE = KEYS / SIZE;
        const int width = c.padded_dim();
        const int lines = ceil_div(upcoming.num_lines() * SIZE * 2 * LANES, width * (high - low));
        const T* nobody = reinterpret_cast<const T*>(s.zeros.data());
        for (int d = 0; d < width; d += 2 * LANES) {
            Vec sum[ROWS][2];
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < 2; v++)
                    sum[r][v] = times(load(s.sums.data() + r * width + d + v * LANES), splat(s.shrink[r]));
            for (int key = low / SIZE * SIZE; key < high; key += SIZE) {
                upcoming.bring(lines);
                const T* first = c.v_cache + offsets[key / LANES] + key % LANES * width;
                // Of a pair, one may lie outside what is seen: it may hold anything.
                const T* const rows[2] = {key < low ? nobody : first, key + SIZE > high ? nobody : first + width};
                Units values[2];
                Unit<T>::across_quickly(values, rows, d);
                for (int r = 0; r < ROWS; r++) {
                    const Units weight = splat_unit(s.weights[r * STRIDE + key / SIZE]);
                    for (int v = 0; v < 2; v++) sum[r][v] = Unit<T>::multiply_add(sum[r][v], weight, values[v]);
                }
            }
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < 2; v++) store(s.sums.data() + r * width + d + v * LANES, sum[r][v]);
        }
    }

    // Many rows.

    void run_laid_out(const Item& item, int base, int low, int high) {
        find_rows(item, base);
        for (int k = 0; k < high; k += LANES) lay_out_keys(key_rows + k, s.keys.data() + k);
        const int width = c.padded_dim();
        for (int k = 0; k < high; k += Unit<T>::SIZE)
            lay_out_values(value_rows + k, s.values.data() + k / Unit<T>::SIZE * width);
        for (int r = 0; r < num_rows; r += STEP_ROWS) {
            const int rows = std::min(STEP_ROWS, num_rows - r);
            // Of the last tiles of a prompt, the first queries see a part or nothing.
            const int newest = *std::max_element(s.positions + r, s.positions + r + rows);
            const int last = std::min(high, newest - base + 1);
            if (last <= 0) continue;
            switch (rows) {
                case 1: add_rows<1>(r, base, low, last); break;
                case 2: add_rows<2>(r, base, low, last); break;
                case 3: add_rows<3>(r, base, low, last); break;
                case 4: add_rows<4>(r, base, low, last); break;
                case 5: add_rows<5>(r, base, low, last); break;
                default: add_rows<6>(r, base, low, last);
            }
        }
    }

    void find_rows(const Item& item, int base) {
        const T* nobody = reinterpret_cast<const T*>(s.zeros.data());
        std::fill_n(key_rows, KEYS, nobody);
        std::fill_n(value_rows, KEYS, nobody);
        for_each_run(item, base, [&](int first, int num_keys, long offset) {
            for (int k = 0; k < num_keys; k++, offset += c.head_dim) {
                key_rows[first + k] = c.k_cache + offset;
                value_rows[first + k] = c.v_cache + offset;
            }
        });
    }

    /// Lays out 16 keys as 16 columns of `[unit of head_dim][64 keys]`.
    void lay_out_keys(const T* const* rows, uint32_t* to) {
        constexpr int SIZE = Unit<T>::SIZE;
        for (int unit = 0; unit < c.num_units(); unit += LANES) {
            Units square[LANES];
            const int left = c.head_dim - unit * SIZE;  // numbers
            for (int i = 0; i < LANES; i++) square[i] = Unit<T>::load(rows[i] + unit * SIZE, left);
            transpose(square);
            for (int i = 0; i < LANES; i++) store_units(to + (unit + i) * KEYS, square[i]);
        }
    }

    /// Lays out the values of a unit of keys as a row of units.
    void lay_out_values(const T* const* rows, uint32_t* to) {
        for (int d = 0; d < c.head_dim; d += LANES) store_units(to + d, Unit<T>::across(rows, d, c.head_dim - d));
    }

    /// Adds the keys of a tile that lie before `last` to the running softmax of some rows.
    template <int ROWS>
    void add_rows(int first, int base, int low, int last) {
        switch (ceil_div(last, LANES)) {
            case 1: score_rows<ROWS, 1>(first, base, low, last); break;
            case 2: score_rows<ROWS, 2>(first, base, low, last); break;
            case 3: score_rows<ROWS, 3>(first, base, low, last); break;
            default: score_rows<ROWS, 4>(first, base, low, last);
        }
        const int num_key_units = ceil_div(last, Unit<T>::SIZE);
        int d = 0;
        for (; d + 4 * LANES <= c.padded_dim(); d += 4 * LANES) add_to_tile<ROWS, 4>(first, d, num_key_units);
        for (; d < c.padded_dim(); d += LANES) add_to_tile<ROWS, 1>(first, d, num_key_units);
    }

    template <int ROWS, int VECS>
    void score_rows(int first, int base, int low, int high) {
        Vec sum[ROWS][VECS];
        for (auto& row : sum)
            for (auto& vec : row) vec = zero();
        const int units = c.padded_units();
        multiply_tile<T, ROWS, VECS>(sum, s.queries.data() + first * units, units, s.keys.data(), KEYS, c.num_units());
        for (int r = 0; r < ROWS; r++) soften<VECS>(sum[r], first + r, base, low, high);
    }

    /// Turns the products of a row with 64 keys into weights.
    template <int VECS>
    void soften(Vec (&x)[VECS], int r, int base, int low, int high) {
        const int here = s.positions[r] - base;
        high = std::min(high, here + 1);
        if (c.window) low = std::max(low, here + 1 - c.window);
        constexpr uint64_t ALL = ~0ull >> (64 - VECS * LANES);
        const uint64_t seen = high <= low ? 0 : (~0ull >> (64 - high)) & (~0ull << low);
        const bool bends = c.softcap || slope_of_row[r];
        if (bends) bend(x, slope_of_row[r], here);
        const float factor = bends ? 1.0f : c.scale * LOG2_E;  // what makes products exponents of 2; positive
        if (seen == ALL) weigh<VECS, true>(x, r, ALL, factor);
        else weigh<VECS, false>(x, r, seen, factor);
    }

    template <int VECS, bool SEES_ALL>
    void weigh(const Vec (&x)[VECS], int r, uint64_t seen, float factor) {
        Vec top = splat(-INFINITY);
        for (int v = 0; v < VECS; v++)
            top = SEES_ALL ? larger(top, x[v]) : larger(mask_of_bits(seen >> (v * LANES)), top, x[v]);
        const float peak = std::max(s.peaks[r], largest_lane(top) * factor);
        const float shrink = first_lane(exp2(larger(splat(-150.0f), splat(s.peaks[r] - peak))));
        Vec total = times(load(s.totals[r]), splat(shrink));
        Number* weights = reinterpret_cast<Number*>(s.weights.data()) + r * KEYS;
        for (int v = 0; v < VECS; v++) {
            // Lower than -150 is 0 as well; in this order of the two, NaN stays.
            const Vec below = larger(splat(-150.0f), multiply_subtract(x[v], splat(factor), splat(peak)));
            Vec weight = exp2<sizeof(T) == 4>(below);
            if (!SEES_ALL) weight = only(mask_of_bits(seen >> (v * LANES)), weight);
            total = add(total, weight);
            store(weights + v * LANES, weight);
        }
        store(s.totals[r], total);
        s.shrink[r] = shrink;
        s.peaks[r] = peak;
    }

    /// softcap * tanh(scale * x / softcap) + slope * (key - query), in base 2.
    template <int VECS>
    void bend(Vec (&x)[VECS], const float* slope, int here) {
        for (int v = 0; v < VECS; v++) {
            x[v] = times(x[v], splat(c.scale));
            if (c.softcap) {  // tanh(|y|) = (1 - exp(-2 |y|)) / (1 + exp(-2 |y|))
                const Vec size = magnitude(x[v]);
                const Vec fold = exp2(larger(splat(-150.0f), times(size, splat(-2 * LOG2_E / c.softcap))));
                const Vec bounded = divide(subtract(splat(1.0f), fold), add(splat(1.0f), fold));
                x[v] = with_sign_of(times(bounded, splat(c.softcap)), x[v]);
            }
            if (slope) {
                const Vec distance = to_floats(add(lane_numbers(), splat(v * LANES - here)));
                x[v] = multiply_add(splat(*slope), distance, x[v]);
            }
            x[v] = times(x[v], splat(LOG2_E));
        }
    }

    template <int ROWS, int VECS>
    void add_to_tile(int first, int d, int num_key_units) {
        const int width = c.padded_dim();
        constexpr int STRIDE = KEYS / Unit<T>::SIZE;
        float* sums = s.sums.data() + first * width + d;
        Vec sum[ROWS][VECS];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECS; v++)
                sum[r][v] = times(load(sums + r * width + v * LANES), splat(s.shrink[first + r]));
        multiply_tile<T, ROWS, VECS>(
            sum, s.weights.data() + first * STRIDE, STRIDE, s.values.data() + d, width, num_key_units);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECS; v++) store(sums + r * width + v * LANES, sum[r][v]);
    }

    void finish(const Item& item) {
        const int width = c.padded_dim();
        for (int r = 0; r < num_rows; r++) {
            const long token = item.first_token + r / item.num_heads, head = item.first_head + r % item.num_heads;
            const float* sums = s.sums.data() + r * width;
            const float total = sum_of_lanes(load(s.totals[r]));
            if (item.slot < 0) {
                write(c, token, head, [&](int d) { return load(sums + d); }, total);
                continue;
            }
            float* partial = partials.at(token * c.num_heads + head, item.slot);
            partial[0] = s.peaks[r];
            partial[1] = total;
            std::memcpy(partial + 2, sums, sizeof(float) * width);
        }
    }

  public:
    /// Writes sums(d) / total to a row of the result.
    template <typename Sums>
    static void write(const Call<T>& c, long token, long head, Sums sums, float total) {
        T* out = c.out + (token * c.num_heads + head) * c.head_dim;
        for (int d = 0; d < c.head_dim; d += LANES)
            store(out + d, divide(sums(d), splat(total)), c.head_dim - d);
    }
};

}  // namespace
}  // namespace millrace
