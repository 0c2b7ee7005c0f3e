// The products of many adapters: x A^T for the rows of each slot into `hidden`, and then that times B onto `out`.
//
// Every sum goes over its addends in order, whatever the other rows are.
#include "../_cpu/simd.h"

namespace millrace {
namespace {

constexpr int BLOCK_COLUMNS = 256;  // of `out`, in one piece of work

template <typename T>
struct Call : Header {
    void* out;
    const T *x, *a, *b;
    const int *ranks, *tokens, *starts, *ends;
    float* hidden;  // [routed rows, num_parts, max_rank]
    long out_stride, x_stride;
    int num_slots, num_parts, max_rank, in_features, out_features, is_wide;  // is_wide: `out` is in float32
};

/// Gives the pieces of work to the threads in turns.
struct Turns {
    int thread, num_threads, next = 0;
    bool is_mine() { return next++ % num_threads == thread; }
};

/// hidden[t][r] = x[t] . A[r] for ROWS rows of x and RANKS rows of A.
template <typename T, int ROWS, int RANKS>
void shrink_tile(const T* const* x, const T* a, float* const* hidden, int size) {
    Vec sum[ROWS][RANKS];
    for (auto& row : sum)
        for (Vec& one : row) one = zero();
    const auto add_products = [&](int i, int left) {
        Vec of_a[RANKS];
        for (int r = 0; r < RANKS; r++) of_a[r] = load(a + long(r) * size + i, left);
        for (int t = 0; t < ROWS; t++) {
            const Vec of_x = load(x[t] + i, left);
            for (int r = 0; r < RANKS; r++) sum[t][r] = multiply_add(of_x, of_a[r], sum[t][r]);
        }
    };
    int i = 0;
    for (; i + LANES <= size; i += LANES) add_products(i, LANES);  // The end is known, so no load asks for it.
    if (i < size) add_products(i, size - i);
    for (int t = 0; t < ROWS; t++)
        for (int r = 0; r < RANKS; r++) hidden[t][r] = sum_of_lanes(sum[t][r]);
}

template <typename T, int ROWS>
void shrink_rows(const T* const* x, const T* a, float* const* hidden, int rank, int size) {
    int r = 0;
    float* to[ROWS];
    for (; r + 2 <= rank; r += 2) {
        for (int t = 0; t < ROWS; t++) to[t] = hidden[t] + r;
        shrink_tile<T, ROWS, 2>(x, a + long(r) * size, to, size);
    }
    for (int t = 0; t < ROWS; t++) to[t] = hidden[t] + r;
    if (r < rank) shrink_tile<T, ROWS, 1>(x, a + long(r) * size, to, size);
}

/// out[t][first:end] += hidden[t] B[:, first:end] for ROWS rows.
template <typename T, typename Out, int ROWS>
void expand_rows(Out* const* out, const T* b, const float* const* hidden, int rank, int first, int end, int width) {
    const auto add_products = [&](int i, int left) {
        Vec sum[ROWS];
        for (Vec& one : sum) one = zero();
        for (int r = 0; r < rank; r++) {
            const Vec of_b = load(b + long(r) * width + i, left);
            for (int t = 0; t < ROWS; t++) sum[t] = multiply_add(splat(hidden[t][r]), of_b, sum[t]);
        }
        for (int t = 0; t < ROWS; t++) store(out[t] + i, add(load(out[t] + i, left), sum[t]), left);
    };
    int i = first;
    for (; i + LANES <= end; i += LANES) add_products(i, LANES);
    if (i < end) add_products(i, end - i);
}

template <typename T, typename Out>
struct Work : Call<T> {
    using C = Call<T>;

    float* hidden_of(int row, int part) const {
        return C::hidden + (long(row) * C::num_parts + part) * C::max_rank;
    }
    template <int ROWS>
    void shrink(int slot, int part, int row, int rank) const {
        const T* x[ROWS];
        float* hidden[ROWS];
        for (int t = 0; t < ROWS; t++) {
            x[t] = C::x + C::tokens[row + t] * C::x_stride;
            hidden[t] = hidden_of(row + t, part);
        }
        const T* a = C::a + (long(slot) * C::num_parts + part) * C::max_rank * C::in_features;
        shrink_rows<T, ROWS>(x, a, hidden, rank, C::in_features);
    }
    template <int ROWS>
    void expand(int slot, int part, int row, int rank, int first, int end) const {
        Out* out[ROWS];
        const float* hidden[ROWS];
        for (int t = 0; t < ROWS; t++) {
            out[t] = static_cast<Out*>(C::out) + C::tokens[row + t] * C::out_stride;
            hidden[t] = hidden_of(row + t, part);
        }
        const T* b = C::b + long(slot) * C::max_rank * C::out_features;
        expand_rows<T, Out, ROWS>(out, b, hidden, rank, first, end, C::out_features);
    }

    /// Calls `work(slot, part, rank)` for every part of a slot that has rows and a rank.
    template <typename Function>
    void for_each_part(Function work) const {
        for (int slot = 0; slot < C::num_slots; slot++) {
            if (C::starts[slot] == C::starts[slot + 1]) continue;
            for (int part = 0; part < C::num_parts; part++)
                if (const int rank = C::ranks[slot * C::num_parts + part]) work(slot, part, rank);
        }
    }
    void shrink_all(Turns turns) const {
        for_each_part([&](int slot, int part, int rank) {
            for (int row = C::starts[slot], end = C::starts[slot + 1]; row < end; row += 3) {
                if (!turns.is_mine()) continue;
                const int left = end - row;
                left >= 3 ? shrink<3>(slot, part, row, rank)
                          : left == 2 ? shrink<2>(slot, part, row, rank) : shrink<1>(slot, part, row, rank);
            }
        });
    }
    void expand_all(Turns turns) const {
        for_each_part([&](int slot, int part, int rank) {
            const int first_of_part = part ? C::ends[part - 1] : 0, end_of_part = C::ends[part];
            for (int first = first_of_part; first < end_of_part; first += BLOCK_COLUMNS) {
                if (!turns.is_mine()) continue;
                const int end = std::min(first + BLOCK_COLUMNS, end_of_part), last_row = C::starts[slot + 1];
                int row = C::starts[slot];
                for (; row + 4 <= last_row; row += 4) expand<4>(slot, part, row, rank, first, end);
                for (; row + 2 <= last_row; row += 2) expand<2>(slot, part, row, rank, first, end);
                for (; row < last_row; row++) expand<1>(slot, part, row, rank, first, end);
            }
        });
    }
};

template <typename T, typename Out>
void run(const Call<T>& c) {
    const Work<T, Out> work{c};
    const long num_routed = c.starts[c.num_slots];
    if (!num_routed) return;
    const int num_threads = c.team(num_routed * c.max_rank * (c.in_features + c.out_features));
#pragma omp parallel num_threads(num_threads)
    {
        const Turns turns{omp_get_thread_num(), num_threads};
        work.shrink_all(turns);
#pragma omp barrier
        work.expand_all(turns);
    }
}

template <typename T>
void choose(const void* call) {
    const Call<T>& c = *static_cast<const Call<T>*>(call);
    c.is_wide ? run<T, float>(c) : run<T, T>(c);
}

}  // namespace
}  // namespace millrace

extern "C" void lora_bf16(const void* call) { millrace::choose<millrace::Bf16>(call); }
extern "C" void lora_f32(const void* call) { millrace::choose<float>(call); }
