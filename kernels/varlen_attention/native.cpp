// Attention of encoders on the CPU: keys and values are laid out once for all queries of a text and KV head.
//
// An item is a KV head and some queries of a text. Of its keys it takes CHUNK at a time, lays them out for the matrix
// product of simd.h (keys transposed in panels, values in units), and goes over its queries in steps of up to six. The
// scores of a step and a whole chunk lie in the L1 cache, so the maximum is known before the first power is computed,
// and the sums of weighted values stay in registers for the whole chunk. A text of up to CHUNK tokens needs no more; a
// longer one keeps a running softmax (Milakov and Gimelshein, 2018) from chunk to chunk. Scores are in base 2.
//
// Chunks begin at multiples of CHUNK of the text, and a row meets the same operations whatever the other rows of its
// step are, so no bit of it depends on the other texts of the call or on the number of threads.
#include <numeric>
#include <vector>

#include "../_cpu/simd.h"

namespace millrace {
namespace {

constexpr int PANEL = 64;  // keys whose products with a step are in registers at once
constexpr int PANEL_VECS = PANEL / LANES;
constexpr int CHUNK = 4 * PANEL;
constexpr int STEP = 6;                            // rows
constexpr int MIN_ROWS = 8 * STEP, MAX_ROWS = 128 * STEP;  // of an item, if it is not a whole text
constexpr int ITEMS_PER_THREAD = 8;
constexpr float NOTHING = -1e30f;  // the maximum of no scores; finite, so that a difference of two is not NaN

/// The arguments, as in op.py. Strides are in numbers.
template <typename T>
struct Call : Header {
    const T *query, *key, *value;
    const int* starts;
    const float* bias;  // null for none
    T* out;
    long query_token_stride, query_head_stride;
    long key_token_stride, key_head_stride;
    long value_token_stride, value_head_stride;
    int num_seqs, num_heads, num_kv_heads, head_dim, window, max_distance;
    float scale, softcap;

    int group() const { return num_heads / num_kv_heads; }
    int num_units() const { return ceil_div(head_dim, Unit<T>::SIZE); }
    int padded_units() const { return round_up(num_units(), LANES); }
    int padded_dim() const { return round_up(head_dim, LANES); }

    const T* row_of_query(long token, long head) const {
        return query + token * query_token_stride + head * query_head_stride;
    }
};

struct Item {
    int start, length;  // of the text
    int kv_head, first, end;  // the queries, counted from the start of the text
};

/// What a thread needs for an item, kept from call to call.
struct Scratch {
    std::vector<uint32_t> queries, keys, values, weights;
    std::vector<float> scores, sums, peaks, totals, biases, zeros;  // zeros: a row that is nobody's

    template <typename V>
    static void grow(V& vector, size_t size) {
        if (vector.size() < size) vector.resize(size);
    }
    template <typename T>
    void fit(const Call<T>& c) {
        constexpr int SIZE = Unit<T>::SIZE;
        grow(queries, STEP * c.padded_units());
        grow(keys, c.padded_units() * CHUNK);
        grow(values, CHUNK / SIZE * c.padded_dim());
        grow(weights, STEP * CHUNK / SIZE);
        grow(scores, STEP * CHUNK);
        grow(zeros, c.padded_dim());
    }
};

template <typename T>
class Attention {
  public:
    Attention(const Call<T>& call, Scratch& scratch)
        : c(call), s(scratch), edits(c.softcap || c.bias || !(c.scale > 0)), units(c.padded_units()),
          width(c.padded_dim()) {
        s.fit(c);
    }

    void run(const Item& item) {
        it = item;
        const int reach = c.window ? std::min(c.window, it.length) : it.length;
        const int seen_first = std::max(0, it.first - reach + 1), seen_end = std::min(it.length, it.end - 1 + reach);
        const int num_rows = (it.end - it.first) * c.group();
        if (c.bias) lay_out_biases();
        Scratch::grow(s.peaks, num_rows);
        Scratch::grow(s.totals, num_rows);
        Scratch::grow(s.sums, seen_end - seen_first > CHUNK || c.window ? size_t(num_rows) * width : 0);
        for (base = seen_first / CHUNK * CHUNK; base < seen_end; base += CHUNK) {
            const int first = std::max(0, (seen_first - base) / PANEL * PANEL);
            lay_out(first, std::min(CHUNK, seen_end - base));
            for (int head = 0; head < c.group(); head++)
                for (int query = it.first; query < it.end; query += STEP)
                    attend(head, query, std::min(STEP, it.end - query), reach);
        }
    }

  private:
    using Number = typename Unit<T>::Number;
    static constexpr int SIZE = Unit<T>::SIZE, WEIGHTS_STRIDE = CHUNK / SIZE;

    const Call<T>& c;
    Scratch& s;
    const bool edits;  // whether scores are more than products times a positive factor
    const int units, width;
    Item it{};
    int base = 0;  // the first key of the chunk

    /// Some queries of one head, with the keys of the chunk that one of them sees.
    struct Step {
        int head, query, row;    // of the first row; `row` counts the rows of the item
        int low, high;           // keys, counted from the start of the chunk
        bool is_first, is_last;  // whether there are no keys before these, or after them
    };

    int bias_stride() const { return 2 * it.length + PANEL; }

    /// Of each head the bias of key j and query i at `length - 1 + j - i`, in base 2.
    void lay_out_biases() {
        const int size = bias_stride(), num_columns = 2 * c.max_distance + 1;
        Scratch::grow(s.biases, size_t(size) * c.group());
        for (int head = 0; head < c.group(); head++) {
            const float* from = c.bias + long(it.kv_head * c.group() + head) * num_columns;
            float* to = s.biases.data() + long(head) * size;
            for (int i = 0; i < size; i++)
                to[i] = LOG2_E * from[std::clamp(i - it.length + 1, -c.max_distance, c.max_distance) + c.max_distance];
        }
    }

    /// Lays out keys `first` to `end - 1` of the chunk, filled up with zeros.
    void lay_out(int first, int end) {
        const T* nobody = reinterpret_cast<const T*>(s.zeros.data());
        const long token = it.start + base;
        const T* keys = c.key + token * c.key_token_stride + it.kv_head * c.key_head_stride;
        const T* values = c.value + token * c.value_token_stride + it.kv_head * c.value_head_stride;
        const T* rows[LANES];
        for (int key = first; key < end; key += LANES) {
            for (int i = 0; i < LANES; i++) {
                rows[i] = key + i < end ? keys + (key + i) * c.key_token_stride : nobody;
                bring(values + std::min(key + i, end - 1) * c.value_token_stride);  // for the next loop
            }
            lay_out_keys(rows, s.keys.data() + long(key / PANEL) * PANEL * units + key % PANEL);
        }
        for (int key = first; key < end; key += SIZE) {
            for (int i = 0; i < SIZE; i++) rows[i] = key + i < end ? values + (key + i) * c.value_token_stride : nobody;
            uint32_t* to = s.values.data() + long(key / SIZE) * width;
            for (int d = 0; d < c.head_dim; d += LANES) store_units(to + d, Unit<T>::across(rows, d, c.head_dim - d));
        }
    }

    /// Brings a row to the cache: the rows of a head lie too far apart for the processor to foresee them.
    void bring(const T* row) const {
        const char* from = reinterpret_cast<const char*>(row);
        for (int place = 0; place < c.head_dim * int(sizeof(T)); place += 64) _mm_prefetch(from + place, _MM_HINT_T0);
    }

    /// Lays out 16 keys as 16 columns of `[unit of head_dim][PANEL keys]`.
    void lay_out_keys(const T* const* rows, uint32_t* to) {
        for (int unit = 0; unit < c.num_units(); unit += LANES) {
            Units square[LANES];
            const int left = c.head_dim - unit * SIZE;  // numbers
            for (int i = 0; i < LANES; i++) square[i] = Unit<T>::load(rows[i] + unit * SIZE, left);
            transpose(square);
            for (int i = 0; i < LANES; i++) store_units(to + (unit + i) * PANEL, square[i]);
        }
    }

    void attend(int head, int query, int num_rows, int reach) {
        const int seen_first = std::max(0, query - reach + 1);
        const int seen_end = std::min(it.length, query + num_rows - 1 + reach);
        Step step{head, query, head * (it.end - it.first) + query - it.first, 0, 0, seen_first >= base, false};
        step.low = std::max(0, seen_first - base);
        step.high = std::min(CHUNK, seen_end - base);
        step.is_last = seen_end <= base + CHUNK;
        if (step.low >= step.high) return;
        load_queries(step, num_rows);
        switch (num_rows) {
            case 1: return attend_rows<1>(step);
            case 2: return attend_rows<2>(step);
            case 3: return attend_rows<3>(step);
            case 4: return attend_rows<4>(step);
            case 5: return attend_rows<5>(step);
            default: return attend_rows<6>(step);
        }
    }

    void load_queries(const Step& step, int num_rows) {
        const int head = it.kv_head * c.group() + step.head;
        for (int r = 0; r < num_rows; r++) {
            Number* to = reinterpret_cast<Number*>(s.queries.data() + r * units);
            copy_row(to, c.row_of_query(it.start + step.query + r, head), c.head_dim);
            if (SIZE > 1 && c.head_dim % SIZE) to[c.head_dim] = Number{};  // the other half of the last pair
        }
    }

    template <int ROWS>
    void attend_rows(const Step& step) {
        Vec top[ROWS];
        for (Vec& row : top) row = splat(-INFINITY);
        for (int key = step.low / PANEL * PANEL; key < step.high; key += PANEL) {
            switch (std::min(PANEL_VECS, ceil_div(step.high - key, LANES))) {
                case 1: score<ROWS, 1>(step, key, top); break;
                case 2: score<ROWS, 2>(step, key, top); break;
                case 3: score<ROWS, 3>(step, key, top); break;
                default: score<ROWS, 4>(step, key, top);
            }
        }
        Vec shrink[ROWS], share[ROWS];
        weigh(step, top, shrink, share);
        int d = 0;
        for (; d + 4 * LANES <= width; d += 4 * LANES) add_values<ROWS, 4>(step, d, shrink, share);
        if (d + 2 * LANES <= width) add_values<ROWS, 2>(step, d, shrink, share), d += 2 * LANES;
        if (d < width) add_values<ROWS, 1>(step, d, shrink, share);
    }

    /// Computes the scores of the rows with a panel of keys, and the largest of each row.
    template <int ROWS, int VECS>
    void score(const Step& step, int key, Vec (&top)[ROWS]) {
        Vec x[ROWS][VECS];
        for (auto& row : x)
            for (Vec& vec : row) vec = zero();
        const uint32_t* panel = s.keys.data() + long(key) * units;
        multiply_tile<T, ROWS, VECS>(x, s.queries.data(), units, panel, PANEL, c.num_units());
        for (int r = 0; r < ROWS; r++) {
            if (edits) edit(x[r], step, r, key);
            hide(x[r], step.query + r, key);
            for (int v = 0; v < VECS; v++) {
                top[r] = larger(top[r], x[r][v]);
                store(s.scores.data() + r * CHUNK + key + v * LANES, x[r][v]);
            }
        }
    }

    /// softcap * tanh(scale * x / softcap) + bias, in base 2.
    template <int VECS>
    void edit(Vec (&x)[VECS], const Step& step, int r, int key) {
        const int place = it.length - 1 + base + key - step.query - r;
        const float* bias = s.biases.data() + long(step.head) * bias_stride() + place;
        for (int v = 0; v < VECS; v++) {
            x[v] = times(x[v], splat(c.scale * LOG2_E));
            if (c.softcap) {  // tanh(|y|) = (1 - exp(-2 |y|)) / (1 + exp(-2 |y|))
                const Vec fold = exp2(larger(splat(-150.0f), times(magnitude(x[v]), splat(-2 / c.softcap))));
                const Vec bounded = divide(subtract(splat(1.0f), fold), add(splat(1.0f), fold));
                x[v] = with_sign_of(times(bounded, splat(c.softcap * LOG2_E)), x[v]);
            }
            if (c.bias) x[v] = add(x[v], load(bias + v * LANES));
        }
    }

    /// Makes the scores of keys that a query does not see minus infinity.
    template <int VECS>
    void hide(Vec (&x)[VECS], int query, int key) {
        constexpr uint64_t ALL = ~0ull >> (64 - VECS * LANES);
        const int here = query - base - key;  // counted from the first key of the panel
        int low = 0, high = std::min(VECS * LANES, it.length - base - key);
        if (c.window) {
            low = std::clamp(here - c.window + 1, 0, high);
            high = std::clamp(here + std::min(c.window, it.length), low, high);
        }
        const uint64_t seen = high <= low ? 0 : (~0ull >> (64 - high)) & (~0ull << low);
        if (seen == ALL) return;
        for (int v = 0; v < VECS; v++) x[v] = select(mask_of_bits(seen >> (v * LANES)), x[v], splat(-INFINITY));
    }

    /// Turns the scores of the rows into weights. All rows take each part of it together, since the parts wait long for
    /// their results. `shrink` is the factor of what was summed before, `share` the inverse of the sum of all weights.
    template <int ROWS>
    void weigh(const Step& step, const Vec (&top)[ROWS], Vec (&shrink)[ROWS], Vec (&share)[ROWS]) {
        const float factor = edits ? 1.0f : c.scale * LOG2_E;  // what makes scores exponents of 2
        float peak[ROWS];
        for (int r = 0; r < ROWS; r++) peak[r] = std::max(NOTHING, largest_lane(top[r]) * factor);
        if (!step.is_first) {
            for (int r = 0; r < ROWS; r++) {
                const float old = s.peaks[step.row + r];
                peak[r] = std::max(peak[r], old);
                shrink[r] = exp2_of_negative(splat(std::max(-150.0f, old - peak[r])));
            }
        }
        Vec total[ROWS];
        for (int r = 0; r < ROWS; r++) total[r] = weigh_row(step, r, factor, peak[r]);
        for (int r = 0; r < ROWS; r++) {
            float sum = sum_of_lanes(total[r]);
            if (!step.is_first) sum += s.totals[step.row + r] * first_lane(shrink[r]);
            s.peaks[step.row + r] = peak[r];
            s.totals[step.row + r] = sum;
            share[r] = splat(1 / sum);
        }
    }

    /// Returns the weights' sums, lane by lane.
    Vec weigh_row(const Step& step, int r, float factor, float peak) {
        const float* scores = s.scores.data() + r * CHUNK;
        Number* weights = reinterpret_cast<Number*>(s.weights.data()) + r * CHUNK;
        Vec total = zero();
        for (int key = step.low / PANEL * PANEL; key < step.high; key += LANES) {
            // Lower than -150 is 0 as well; in this order of the two, NaN stays.
            const Vec x = larger(splat(-150.0f), multiply_subtract(load(scores + key), splat(factor), splat(peak)));
            const Vec weight = exp2_of_negative<sizeof(T) == 4>(x);
            total = add(total, weight);
            store(weights + key, weight);
        }
        return total;
    }

    /// Adds the weighted values, and writes the result if these are the last ones.
    template <int ROWS, int VECS>
    void add_values(const Step& step, int d, const Vec (&shrink)[ROWS], const Vec (&share)[ROWS]) {
        float* sums = s.sums.data() + long(step.row) * width + d;
        Vec sum[ROWS][VECS];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECS; v++)
                sum[r][v] = step.is_first ? zero() : times(load(sums + r * width + v * LANES), shrink[r]);
        const int first = step.low / PANEL * PANEL / SIZE, end = ceil_div(step.high, SIZE);
        const uint32_t* values = s.values.data() + long(first) * width + d;
        multiply_tile<T, ROWS, VECS>(sum, s.weights.data() + first, WEIGHTS_STRIDE, values, width, end - first);
        for (int r = 0; r < ROWS; r++) {
            const long token = it.start + step.query + r, head = it.kv_head * c.group() + step.head;
            T* out = c.out + (token * c.num_heads + head) * c.head_dim + d;
            for (int v = 0; v < VECS; v++) {
                if (step.is_last) store(out + v * LANES, times(sum[r][v], share[r]), c.head_dim - d - v * LANES);
                else store(sums + r * width + v * LANES, sum[r][v]);
            }
        }
    }
};

/// Cuts the texts into items of nearly equal work, the longest texts first.
template <typename T>
std::vector<Item> plan(const Call<T>& c) {
    std::vector<int> texts(c.num_seqs);
    std::iota(texts.begin(), texts.end(), 0);
    const auto length = [&](int text) { return c.starts[text + 1] - c.starts[text]; };
    std::stable_sort(texts.begin(), texts.end(), [&](int a, int b) { return length(a) > length(b); });
    double work = 0;
    for (int text : texts) work += double(length(text)) * length(text) * c.num_kv_heads;
    const double share = c.num_threads > 1 ? work / (ITEMS_PER_THREAD * c.num_threads) : work;
    std::vector<Item> items;
    for (int text : texts) {
        const int n = length(text);
        if (n <= 0) break;
        const int wanted = int(std::min(share / n, double(MAX_ROWS / c.group())));
        const int num_parts = ceil_div(n, std::max(wanted, MIN_ROWS)), rows = round_up(ceil_div(n, num_parts), STEP);
        for (int kv_head = 0; kv_head < c.num_kv_heads; kv_head++)
            for (int first = 0; first < n; first += rows)
                items.push_back({c.starts[text], n, kv_head, first, std::min(first + rows, n)});
    }
    return items;
}

template <typename T>
void attend(const Call<T>& c) {
    const std::vector<Item> items = plan(c);
    const long num_items = long(items.size());
    const int chunk = int(std::clamp(num_items / (16 * c.num_threads), 1L, 16L));
#pragma omp parallel num_threads(num_items > 1 ? c.team(c.num_rows * c.num_heads * c.head_dim) : 1)
    {
        static thread_local Scratch scratch;
        Attention<T> attention(c, scratch);
#pragma omp for schedule(dynamic, chunk)
        for (long i = 0; i < num_items; i++) attention.run(items[i]);
    }
}

}  // namespace
}  // namespace millrace

extern "C" void varlen_attention_bf16(const void* call) {
    millrace::attend(*static_cast<const millrace::Call<millrace::Bf16>*>(call));
}
extern "C" void varlen_attention_f32(const void* call) {
    millrace::attend(*static_cast<const millrace::Call<float>*>(call));
}
