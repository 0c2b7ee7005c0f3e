// Paged attention on the CPU: blocks are read where they lie, and scores never leave the registers.
//
// An item is a tile of rows (queries times the heads that share a KV head), that KV head, and a range of keys. It takes
// 64 keys at a time, multiplies, keeps a running softmax (Milakov and Gimelshein, 2018), and adds up the weighted values.
// Scores are in base 2. Where there are many rows, keys and values are first laid out for the matrix product of simd.h
// (keys transposed, values in pairs); for the few rows of a decode that would cost more than it saves.
//
// A decode whose keys are shared out, or a prefix that many decodes share, gives several partial results for one row;
// `merge` joins them. A row meets the same operations in the same order whatever its tile, so without partial results
// it does not depend, in any bit, on the rest of the call.
#include "native_item.h"

namespace millrace {
namespace {

/// Joins the partial results of one row.
template <typename T>
void merge(const Call<T>& c, Partials& partials, long token, long head) {
    float peak = NOTHING, total = 0;
    const long index = token * c.num_heads + head;
    for (int i = 0; i < partials.num_slots; i++) peak = std::max(peak, partials.at(index, i)[0]);
    std::vector<float> factors(partials.num_slots);
    for (int i = 0; i < partials.num_slots; i++) {
        const float* partial = partials.at(index, i);
        factors[i] = std::exp2(partial[0] - peak);
        total += factors[i] * partial[1];
    }
    const auto sums = [&](int d) {
        Vec sum = zero();
        for (int i = 0; i < partials.num_slots; i++)
            sum = multiply_add(splat(factors[i]), load(partials.at(index, i) + 2 + d), sum);
        return sum;
    };
    Attention<T>::write(c, token, head, sums, total);
}

/// What is to be done, what takes long first; and the slots of partial results of each decode.
struct Plan {
    std::vector<Item> items;
    int num_slots = 1;
};

template <typename T>
class Planner {
  public:
    explicit Planner(const Call<T>& call) : c(call), goal(call.splits ? ITEMS_PER_THREAD * call.num_threads : 0) {}

    Plan plan() {
        for (int seq = c.num_decodes; seq < c.num_seqs; seq++)
            for (int token = c.starts[seq]; c.seq_lens[seq] && token < c.starts[seq + 1]; token += tile())
                add(seq, token, std::min(tile(), c.starts[seq + 1] - token), 0, c.seq_lens[seq], -1);
        const int shared_keys = c.shared ? *c.shared * c.block_size : 0;
        int first = 0;  // the first decode that is not padding
        while (shared_keys && first < c.num_decodes && c.seq_lens[first] == 0) first++;
        const int shared_slots = shared_keys && first < c.num_decodes ? share(first, shared_keys) : 0;
        int own_keys = 0;
        for (int seq = 0; seq < c.num_decodes; seq++) own_keys = std::max(own_keys, c.seq_lens[seq] - shared_keys);
        const int own_slots = num_splits(c.num_decodes, own_keys);
        result.num_slots = shared_slots + own_slots;
        for (int seq = 0; seq < c.num_decodes; seq++)
            for (int i = 0; c.seq_lens[seq] && i < own_slots; i++) {
                const int begin = shared_keys + i * part(own_keys, own_slots);
                const int end = i + 1 == own_slots ? c.seq_lens[seq] : begin + part(own_keys, own_slots);
                add(seq, c.starts[seq], 1, begin, end, result.num_slots > 1 ? shared_slots + i : -1);
            }
        return std::move(result);
    }

  private:
    const Call<T>& c;
    const int goal;
    Plan result;

    int tile() const { return std::max(1, MAX_ROWS / c.group()); }
    static int part(int keys, int slots) { return round_up(ceil_div(keys, slots), KEYS); }

    int num_splits(int num_tiles, int num_keys) const {
        const int num_items = std::max(1, num_tiles * c.num_kv_heads * ceil_div(c.group(), MAX_ROWS));
        const int wanted = std::min(ceil_div(goal, num_items), num_keys / MIN_SPLIT);
        return std::max(1, wanted);
    }

    /// Plans the keys that all decodes share; returns the slots that this takes.
    int share(int first, int num_keys) {
        const int slots = num_splits(ceil_div(c.num_decodes - first, tile()), num_keys);
        for (int token = first; token < c.num_decodes; token += tile())
            for (int i = 0; i < slots; i++) {
                const int begin = i * part(num_keys, slots), end = std::min(num_keys, begin + part(num_keys, slots));
                add(first, token, std::min(tile(), c.num_decodes - token), begin, end, i);
            }
        return slots;
    }

    /// Adds an item for each KV head, of those keys that the window of its first query or its last query sees.
    void add(int seq, int token, int num_queries, int begin, int end, int slot) {
        const int last = c.seq_lens[seq] - (c.starts[seq + 1] - (token + num_queries));
        end = std::min(end, last);
        if (c.window) begin = std::max(begin, last - num_queries + 1 - c.window);
        for (int kv_head = 0; kv_head < c.num_kv_heads; kv_head++)
            for (int head = 0; head < c.group(); head += MAX_ROWS) {
                const int num_heads = std::min(MAX_ROWS, c.group() - head);
                result.items.push_back({seq, token, num_queries, kv_head, kv_head * c.group() + head, num_heads, begin,
                                        std::max(begin, end), slot});
            }
    }
};

template <typename T>
void attend(Call<T> c) {
    if (c.num_seqs < 0) c.num_seqs = c.num_decodes = int(c.num_rows);
    Plan plan = Planner<T>(c).plan();
    static thread_local Partials kept;
    Partials& partials = kept;  // the name of a thread's own variable would mean another one in another thread
    if (plan.num_slots > 1) partials.fit(plan.num_slots, c.padded_dim(), long(c.num_decodes) * c.num_heads);
    // Of neighbours, each can have the next one's keys brought; but nobody should be left with much at the end.
    const int num_items = int(plan.items.size());
    const int chunk = std::clamp(num_items / (8 * c.num_threads), 1, 16);
    const int num_merges = plan.num_slots > 1 ? c.num_decodes * c.num_heads : 0;
#pragma omp parallel num_threads(num_items > 1 ? c.num_threads : 1)
    {
        static thread_local Scratch scratch;
        Attention<T> attention(c, scratch, partials);
#pragma omp for schedule(dynamic, 1)
        for (int first = 0; first < num_items; first += chunk)
            for (int i = first, end = std::min(first + chunk, num_items); i < end; i++)
                attention.run(plan.items[i], i + 1 < end ? &plan.items[i + 1] : nullptr);
#pragma omp for schedule(static)
        for (int i = 0; i < num_merges; i++)
            if (c.seq_lens[i / c.num_heads]) merge(c, partials, i / c.num_heads, i % c.num_heads);
#pragma omp for schedule(static)
        for (int seq = 0; seq < c.num_seqs; seq++)
            if (c.seq_lens[seq] == 0)
                std::memset(c.out + long(c.starts[seq]) * c.num_heads * c.head_dim, 0,
                            sizeof(T) * (c.starts[seq + 1] - c.starts[seq]) * c.num_heads * c.head_dim);
    }
}

}  // namespace
}  // namespace millrace

extern "C" void paged_attention_bf16(const void* call) {
    millrace::attend(*static_cast<const millrace::Call<millrace::Bf16>*>(call));
}
extern "C" void paged_attention_f32(const void* call) {
    millrace::attend(*static_cast<const millrace::Call<float>*>(call));
}
