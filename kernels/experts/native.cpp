// The experts of a layer: out[t] = sum over its choices of weight * (w2 . gate(w13 . x + b13) + b2).
//
// The pairs of a token and a choice are sorted by expert. Weights are multiplied as a checkpoint has them: a tile takes up
// to 6 rows of x and 2 rows of a weight, which are brought from memory once for all rows of the expert and lie in the L1
// cache meanwhile. Rows of x are widened to float32 first, and end in zeros.
//
// A weight may be in codes of 4 or 8 bits (coded.py). Each is widened to float32 where it is multiplied, for up to 6 rows
// of x at once, so that its bytes are all that is read.
//
// Threads share (expert, 32 columns) in the first product, and 32 columns of the result, of all experts, in the second:
// so each result is added up by one thread, in the order of the experts. A row adds up its products in the same order
// whatever the other rows are: results do not depend on the batch.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../_cpu/header.h"

namespace millrace {
namespace {

constexpr int STEP = 16;        // inputs that a tile multiplies at once: one line of 64 bytes in float32
constexpr int LANES = 8;
constexpr int MAX_ROWS = 6;     // of a tile: with 2 columns 12 sums, which fill the registers with what they need
constexpr int COLUMNS = 32;     // of an item of work
constexpr int GROUP_ROWS = 24;  // rows that stay in the L2 cache while the columns of an item pass

enum Gate : int { SILU, GELU, GELU_TANH, CLAMPED_SWIGLU, RELU_SQUARED };

enum Kind : int { INT4, INT8, E4M3, E2M1, PLAIN };  // of a number of a weight; a plain one has the type of hidden

/// Whether numbers of even places come first when 16 of them are widened: two share a byte, or 32 bits.
template <typename T>
bool is_interleaved(int kind) { return kind == INT4 || kind == E2M1 || (kind == PLAIN && sizeof(T) == 2); }

/// The matrices of all experts, one after another.
struct Matrices {
    const void *numbers, *scales;  // scales: float, or bytes s for 2^(s - 127) if `has_exponents`
    const uint8_t* zeros;          // null for those of the kind
    int kind, group, has_exponents;
};

struct Call : Header {
    const void* hidden;
    Matrices w13, w2;
    const void *w13_bias, *w2_bias;  // null for no bias
    const int* expert_ids;
    const float* weights;
    float *rows, *inner;  // scratch: [max_tokens, round_up(width, 16)], [max_tokens * choices, round_up(size, 16)]
    void* out;
    long hidden_stride;
    int max_tokens, num_experts, num_choices, width, size, gate;

    int num_parts() const { return gate == RELU_SQUARED ? 1 : 2; }  // of the rows of w13
};

// ---- Numbers of 8 lanes ----

/// The place in 16 widened numbers of number i: where two share 32 bits or a byte, those of even places come first.
inline int place(int i, bool is_interleaved) {
    return is_interleaved ? (i & ~(STEP - 1)) + i % 2 * LANES + i % STEP / 2 : i;
}

inline void store(float* p, float x) { *p = x; }
inline void store(Bf16* p, float x) {  // Ties go to even, and NaN stays NaN.
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    p->bits = uint16_t(x != x ? bits >> 16 | 64 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float sum_lanes(__m256 x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// ---- Products ----

/// A row of a plain weight. The halves of 16 numbers are widened in place, those of bfloat16 by places.
template <typename T>
struct PlainRow {
    using Number = T;
    static constexpr bool IS_CODED = false;
    const T* numbers;

    explicit PlainRow(const T* row) : numbers(row) {}
    PlainRow(const Matrices& matrices, long row, int length)
        : numbers(static_cast<const T*>(matrices.numbers) + row * length) {}

    void enter(int) {}
    __m256 half(int i, int half) const { return half_of(numbers + i, half); }

    /// Reads the last numbers from a copy: what comes after the end of a row belongs to another one.
    void enter_rest(int i, int length, T* copy) {
        std::copy(numbers + i, numbers + length, copy);
        numbers = copy - i;
    }

    static __m256 half_of(const float* p, int half) { return _mm256_loadu_ps(p + half * LANES); }
    static __m256 half_of(const Bf16* p, int half) {
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm256_castsi256_ps(
            half ? _mm256_and_si256(pairs, _mm256_set1_epi32(int(0xFFFF0000))) : _mm256_slli_epi32(pairs, 16));
    }
};

/// A row of a weight in codes: (value - zero) * scale, by group of columns.
template <Kind KIND>
struct CodedRow {
    using Number = uint8_t;
    static constexpr bool IS_CODED = true;
    static constexpr int PER_BYTE = KIND == INT4 || KIND == E2M1 ? 2 : 1;
    static constexpr float FACTOR = KIND == E4M3 ? 256.0f : KIND == E2M1 ? 0.5f : 1.0f;  // of what `values_of` returns
    const uint8_t *codes, *zeros;
    const float* scales;
    const uint8_t* exponents;
    int group, next = 0;
    static constexpr float MOVE = KIND == INT4 || KIND == INT8 ? 8388608.0f : 0.0f;
    float scale = 0.0f, zero = MOVE + (KIND == INT4 ? 8.0f : KIND == INT8 ? 128.0f : 0.0f);

    CodedRow(const Matrices& matrices, long row, int length) : group(matrices.group) {
        const long first = row * ceil_div(length, group);
        codes = static_cast<const uint8_t*>(matrices.numbers) + row * (length / PER_BYTE);
        zeros = matrices.zeros ? matrices.zeros + first : nullptr;
        scales = static_cast<const float*>(matrices.scales) + first;
        exponents = matrices.has_exponents ? static_cast<const uint8_t*>(matrices.scales) + first : nullptr;
    }

    /// Takes the next scale if column i begins a group.
    void enter(int i) {
        if (i < next) return;
        if (exponents) {
            const uint32_t bits = uint32_t(*exponents++) << 23;
            std::memcpy(&scale, &bits, sizeof bits);
        } else {
            scale = *scales++;
        }
        scale *= FACTOR;
        if (zeros) zero = MOVE + *zeros++;
        next += group;
    }

    void enter_rest(int i, int length, uint8_t* copy) {
        enter(i);
        std::copy(codes + i / PER_BYTE, codes + length / PER_BYTE, copy);
        codes = copy - i / PER_BYTE;
    }

    __m256 half(int i, int half) const {
        const __m256 values = values_of(codes + i / PER_BYTE, half);
        return _mm256_mul_ps(_mm256_sub_ps(values, _mm256_set1_ps(zero)), _mm256_set1_ps(scale));
    }

    /// 8 values. Integers are moved by 2^23, in whose bits they are the last ones, and `zero` with them.
    static __m256 values_of(const uint8_t* p, int half) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(PER_BYTE == 2 ? p : p + half * LANES));
        const auto moved = [](__m128i integers) {
            return _mm256_castsi256_ps(_mm256_or_si256(_mm256_cvtepu8_epi32(integers), _mm256_set1_epi32(0x4B000000)));
        };
        if (KIND == INT8) return moved(bytes);
        if (KIND == E4M3) {  // The exponent of a float16 has one bit more, and its offset is larger by 8.
            const __m128i wide = _mm_cvtepu8_epi16(bytes), sign = _mm_slli_epi16(wide, 8);
            const __m128i rest = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(127)), 7);
            return _mm256_cvtph_ps(_mm_or_si128(_mm_and_si128(sign, _mm_set1_epi16(short(0x8000))), rest));
        }
        const __m128i nibbles = _mm_and_si128(half ? _mm_srli_epi16(bytes, 4) : bytes, _mm_set1_epi8(15));
        if (KIND == INT4) return moved(nibbles);
        const __m128i twice = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(twice, nibbles)));
    }
};

/// Rows of a weight: `num_first` from one place on, and as many or one fewer from another.
struct Columns {
    long first, second;
    int num_first, num_second, length;
};

/// sums[r][0], sums[r][1] = x[r] . first, x[r] . second
template <typename Row, int ROWS>
void multiply_tile(const float* const* x, Row first, Row second, int length, float (*sums)[2]) {
    __m256 sum[ROWS][2];
    for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
    const auto add = [&](int i) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const __m256 weights[2] = {first.half(i, half), second.half(i, half)};
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                __m256 value = _mm256_loadu_ps(x[r] + i + half * LANES);
                asm("" : "+x"(value));  // The compiler would load it twice otherwise.
                sum[r][0] = _mm256_fmadd_ps(value, weights[0], sum[r][0]);
                sum[r][1] = _mm256_fmadd_ps(value, weights[1], sum[r][1]);
            }
        }
    };
    int i = 0;
    for (; i + STEP <= length; i += STEP) {
        first.enter(i);
        second.enter(i);
        add(i);
    }
    if (i < length) {
        typename Row::Number copies[2][STEP] = {};
        first.enter_rest(i, length, copies[0]);
        second.enter_rest(i, length, copies[1]);
        add(i);
    }
    for (int r = 0; r < ROWS; r++)
        for (int part = 0; part < 2; part++) sums[r][part] = sum_lanes(sum[r][part]);
}

/// The same for up to MAX_ROWS rows.
template <typename Row>
void multiply_rows(
    int num_rows, const float* const* x, const Row& first, const Row& second, int length, float (*sums)[2]
) {
    switch (num_rows) {
        case 1: return multiply_tile<Row, 1>(x, first, second, length, sums);
        case 2: return multiply_tile<Row, 2>(x, first, second, length, sums);
        case 3: return multiply_tile<Row, 3>(x, first, second, length, sums);
        case 4: return multiply_tile<Row, 4>(x, first, second, length, sums);
        case 5: return multiply_tile<Row, 5>(x, first, second, length, sums);
        default: return multiply_tile<Row, 6>(x, first, second, length, sums);
    }
}

/// Writes a row of a weight as float32, in the order of its halves, with zeros up to a multiple of STEP.
template <typename Row>
void widen_row(Row row, int length, float* to) {
    typename Row::Number copy[STEP] = {};
    for (int i = 0; i < length; i += STEP) {
        i + STEP <= length ? row.enter(i) : row.enter_rest(i, length, copy);
        for (int half = 0; half < 2; half++) _mm256_storeu_ps(to + i + half * LANES, row.half(i, half));
    }
}

/// sums[r][part] = x[r] . a row of each of two parts, in tiles of nearly equal height.
template <typename Row>
void multiply_tiles(
    const float* const* x, int num_rows, const Row& first, const Row& second, int length, float (*sums)[2]
) {
    const int num_tiles = ceil_div(num_rows, MAX_ROWS);
    for (int row = 0, i = 0; i < num_tiles; i++) {
        const int height = ceil_div(num_rows - row, num_tiles - i);
        multiply_rows<Row>(height, x + row, first, second, length, sums + row);
        row += height;
    }
}

/// out[r][part][c] = x[r] . row c of a part of the weight. Codes are widened once if there is more than one tile of rows.
template <typename Row>
void multiply(
    const float* const* x, int num_rows, const Matrices& matrices, const Columns& w, float (*out)[2][COLUMNS]
) {
    const bool is_widened = Row::IS_CODED && num_rows > MAX_ROWS;
    const int padded = round_up(w.length, STEP);
    std::vector<float> wide(is_widened ? 2 * padded : 0);
    for (int c = 0; c < w.num_first; c++) {
        const Row first(matrices, w.first + c, w.length);
        const Row second(matrices, c < w.num_second ? w.second + c : w.first + c, w.length);
        float sums[GROUP_ROWS][2];
        if (is_widened) {
            widen_row(first, w.length, wide.data());
            widen_row(second, w.length, wide.data() + padded);
            const PlainRow<float> a(wide.data()), b(wide.data() + padded);
            multiply_tiles(x, num_rows, a, b, padded, sums);
        } else {
            multiply_tiles(x, num_rows, first, second, w.length, sums);
        }
        for (int r = 0; r < num_rows; r++)
            for (int part = 0; part < 2; part++) out[r][part][c] = sums[r][part];
    }
}

// ---- Gates ----

/// exp(x), to 2e-7 of its value: 2^n by the exponent, times the Taylor series of what remains.
inline float exponential(float x) {
    const float y = std::min(std::max(x * 1.4426950408889634f, -126.0f), 127.0f), n = std::nearbyint(y), r = y - n;
    float series = 1.5403530e-4f;  // ln(2)^i / i!
    series = series * r + 1.3333558e-3f;
    series = series * r + 9.6181291e-3f;
    series = series * r + 5.5504109e-2f;
    series = series * r + 2.4022651e-1f;
    series = series * r + 6.9314718e-1f;
    series = series * r + 1.0f;
    const int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return series * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/// gate[i] = activation(gate[i]) * up[i] over the columns of an item.
void apply_gate(int kind, float* gate, const float* up) {
    switch (kind) {
        case SILU:
            for (int i = 0; i < COLUMNS; i++) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
            break;
        case GELU:
            for (int i = 0; i < COLUMNS; i++) gate[i] *= 0.5f * (1.0f + std::erf(gate[i] * 0.70710678f)) * up[i];
            break;
        case GELU_TANH:  // (1 + tanh(y)) / 2 is sigmoid(2 y), and 1.5957... is 2 sqrt(2 / pi).
            for (int i = 0; i < COLUMNS; i++) {
                const float x = gate[i];
                gate[i] = x * sigmoid(1.5957691f * (x + 0.044715f * x * x * x)) * up[i];
            }
            break;
        case CLAMPED_SWIGLU:
            for (int i = 0; i < COLUMNS; i++) {
                const float x = std::min(gate[i], 7.0f), y = std::min(std::max(up[i], -7.0f), 7.0f);
                gate[i] = x * sigmoid(1.702f * x) * (y + 1.0f);
            }
            break;
        default:
            for (int i = 0; i < COLUMNS; i++) gate[i] = std::max(gate[i], 0.0f) * std::max(gate[i], 0.0f);
    }
}

// ---- The layer ----

/// The pairs of a token and a choice, sorted by expert; pairs without an expert of this rank are left out.
struct Sorted {
    std::vector<int> pairs, starts;  // of expert e: pairs[starts[e]] to pairs[starts[e + 1] - 1]

    explicit Sorted(const Call& call) : starts(call.num_experts + 1, 0) {
        const long num_pairs = call.num_rows * call.num_choices;
        const auto is_ours = [&](long pair) { return unsigned(call.expert_ids[pair]) < unsigned(call.num_experts); };
        for (long pair = 0; pair < num_pairs; pair++)
            if (is_ours(pair)) starts[call.expert_ids[pair] + 1]++;
        for (int e = 0; e < call.num_experts; e++) starts[e + 1] += starts[e];
        std::vector<int> next(starts.begin(), starts.end() - 1);
        pairs.resize(starts.back());
        for (long pair = 0; pair < num_pairs; pair++)
            if (is_ours(pair)) pairs[next[call.expert_ids[pair]]++] = int(pair);
    }
};

template <typename T>
struct Layer : Call {
    const Sorted& sorted;
    Layer(const Call& call, const Sorted& order) : Call(call), sorted(order) {}

    int padded_width() const { return round_up(width, STEP); }
    int padded_size() const { return round_up(size, STEP); }

    /// Widens the hidden state of a token, as the tiles read it.
    void widen_row(long token) const {
        const T* from = static_cast<const T*>(hidden) + token * hidden_stride;
        float* to = rows + token * padded_width();
        std::fill(to + width / STEP * STEP, to + padded_width(), 0.0f);
        for (int i = 0; i < width; i++) to[place(i, is_interleaved<T>(w13.kind))] = widen(from[i]);
    }

    /// Computes columns of the input of w2, for all rows of an expert.
    void first_product(int expert, int column) const {
        const int last = std::min(size, column + COLUMNS), end = sorted.starts[expert + 1];
        for (int row = sorted.starts[expert]; row < end; row += GROUP_ROWS)
            first_group(expert, row, std::min(GROUP_ROWS, end - row), column, last);
    }

    void first_group(int expert, int row, int num_rows, int column, int last) const {
        const float* x[GROUP_ROWS];
        for (int r = 0; r < num_rows; r++) x[r] = rows + long(sorted.pairs[row + r] / num_choices) * padded_width();
        const long first_row = long(expert) * num_parts() * size + column;
        const int num = last - column, num_first = num_parts() == 2 ? num : ceil_div(num, 2);
        const int num_second = num_parts() == 2 ? num : num - num_first;
        const long second_row = first_row + (num_parts() == 2 ? size : num_first);
        float sums[GROUP_ROWS][2][COLUMNS] = {};
        const Columns columns{first_row, second_row, num_first, num_second, width};
        product(w13, x, num_rows, columns, sums);
        for (int r = 0; r < num_rows; r++) {
            add_bias(w13_bias, first_row, num_first, sums[r][0]);
            add_bias(w13_bias, second_row, num_second, sums[r][1]);
            if (num_parts() == 1) std::copy(sums[r][1], sums[r][1] + num_second, sums[r][0] + num_first);
            apply_gate(gate, sums[r][0], sums[r][1]);
            float* to = inner + long(row + r) * padded_size();
            for (int c = column; c < std::min(column + COLUMNS, padded_size()); c++)
                to[place(c, is_interleaved<T>(w2.kind))] = c < last ? sums[r][0][c - column] : 0.0f;
        }
    }

    /// Computes columns of the result, for all tokens and experts. `results`: [tokens, COLUMNS]
    void second_product(int column, float* results) const {
        const int last = std::min(width, column + COLUMNS);
        std::fill(results, results + num_rows * COLUMNS, 0.0f);
        for (int expert = 0; expert < num_experts; expert++)
            for (int row = sorted.starts[expert], end = sorted.starts[expert + 1]; row < end; row += GROUP_ROWS)
                second_group(expert, row, std::min(GROUP_ROWS, end - row), column, last, results);
        for (long token = 0; token < num_rows; token++) {
            T* to = static_cast<T*>(out) + token * width;
            for (int c = column; c < last; c++) store(to + c, results[token * COLUMNS + c - column]);
        }
    }

    void second_group(int expert, int row, int num_rows, int column, int last, float* results) const {
        const float* x[GROUP_ROWS];
        for (int r = 0; r < num_rows; r++) x[r] = inner + long(row + r) * padded_size();
        const long first_row = long(expert) * width + column;
        const int num_first = ceil_div(last - column, 2), num_second = last - column - num_first;
        float sums[GROUP_ROWS][2][COLUMNS];
        const Columns columns{first_row, first_row + num_first, num_first, num_second, size};
        product(w2, x, num_rows, columns, sums);
        for (int r = 0; r < num_rows; r++) {
            const int pair = sorted.pairs[row + r];
            float* to = results + pair / num_choices * COLUMNS;
            for (int part = 0, num = num_first; part < 2; part++, to += num_first, num = num_second) {
                add_bias(w2_bias, first_row + part * num_first, num, sums[r][part]);
                for (int c = 0; c < num; c++) to[c] += weights[pair] * sums[r][part][c];
            }
        }
    }

    /// Multiplies by rows of matrices of any kind.
    static void product(
        const Matrices& w, const float* const* x, int num_rows, const Columns& columns, float (*out)[2][COLUMNS]
    ) {
        switch (w.kind) {
            case INT4: return multiply<CodedRow<INT4>>(x, num_rows, w, columns, out);
            case INT8: return multiply<CodedRow<INT8>>(x, num_rows, w, columns, out);
            case E4M3: return multiply<CodedRow<E4M3>>(x, num_rows, w, columns, out);
            case E2M1: return multiply<CodedRow<E2M1>>(x, num_rows, w, columns, out);
            default: return multiply<PlainRow<T>>(x, num_rows, w, columns, out);
        }
    }

    static void add_bias(const void* bias, long first, int num, float* sums) {
        const T* numbers = static_cast<const T*>(bias);
        for (int c = 0; bias && c < num; c++) sums[c] += widen(numbers[first + c]);
    }
};

template <typename T>
void run_part(const Call& call) {
    const Sorted sorted(call);
    const Layer<T> layer(call, sorted);
    std::vector<int> used;  // experts with rows
    for (int e = 0; e < call.num_experts; e++)
        if (sorted.starts[e] < sorted.starts[e + 1]) used.push_back(e);
#pragma omp parallel num_threads(call.team(long(used.size()) * call.width * call.size))
    {
#pragma omp for schedule(static)
        for (long token = 0; token < call.num_rows; token++) layer.widen_row(token);
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (size_t i = 0; i < used.size(); i++)
            for (int column = 0; column < call.size; column += COLUMNS) layer.first_product(used[i], column);
        std::vector<float> sums(call.num_rows * COLUMNS);
#pragma omp for schedule(dynamic, 1)
        for (int column = 0; column < call.width; column += COLUMNS) layer.second_product(column, sums.data());
    }
}

/// Runs all tokens, in parts of nearly equal size for which the scratch memory is large enough.
template <typename T>
void run(const Call& call) {
    const long num_parts = (call.num_rows + call.max_tokens - 1) / std::max(1, call.max_tokens);
    for (long part = 0, first = 0; part < num_parts; part++) {
        Call now = call;
        now.num_rows = (call.num_rows - first + num_parts - part - 1) / (num_parts - part);
        now.hidden = static_cast<const T*>(call.hidden) + first * call.hidden_stride;
        now.out = static_cast<T*>(call.out) + first * call.width;
        now.expert_ids += first * call.num_choices;
        now.weights += first * call.num_choices;
        run_part<T>(now);
        first += now.num_rows;
    }
}

}  // namespace
}  // namespace millrace

extern "C" void experts_bf16(const void* call) {
    millrace::run<millrace::Bf16>(*static_cast<const millrace::Call*>(call));
}
extern "C" void experts_f32(const void* call) {
    millrace::run<float>(*static_cast<const millrace::Call*>(call));
}
