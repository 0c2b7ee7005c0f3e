// Sums over processes that share memory: each writes its part, says so by a counter, and adds up all parts itself.
#include <atomic>

#include "simd.h"

namespace millrace {
namespace {

constexpr long COUNTER_BYTES = 128;

struct Parts {
    char* first;   // part of rank 0
    long stride;   // bytes from one rank's part to the next one's
    int size;      // ranks

    template <class T>
    const T* of(int rank) const { return reinterpret_cast<const T*>(first + rank * stride); }
};

std::atomic<int64_t>& counter(char* counters, int rank) {
    return *reinterpret_cast<std::atomic<int64_t>*>(counters + rank * COUNTER_BYTES);
}

/// Waits until a rank has come to a round, but not for ever: whoever waits long looks whether the other one lives.
bool reaches(char* counters, int rank, int64_t round, int max_spins) {
    for (int i = 0; i < max_spins; i++) {
        if (counter(counters, rank).load(std::memory_order_acquire) >= round) return true;
        _mm_pause();
    }
    return false;
}

/// Adds in the order of the ranks, so that all of them get the same bits.
template <class T>
void sum(const Parts& parts, T* result, long count) {
    for (long i = 0; i < count; i += LANES) {
        const int left = int(std::min<long>(count - i, LANES));
        Vec total = load(parts.of<T>(0) + i, left);
        for (int rank = 1; rank < parts.size; rank++) total = add(total, load(parts.of<T>(rank) + i, left));
        store(result + i, total, left);
    }
}

template <class T>
int exchange_sum(T* tensor, long count, char* first, long stride, char* counters, int rank, int size, long round,
                 int max_spins) {
    const Parts parts{first, stride, size};
    std::memcpy(first + rank * stride, tensor, count * sizeof(T));
    counter(counters, rank).store(round, std::memory_order_release);
    for (int other = 0; other < size; other++) {
        if (!reaches(counters, other, round, max_spins)) return 0;
    }
    sum(parts, tensor, count);
    return 1;
}

}  // namespace
}  // namespace millrace

#define EXCHANGE(ending, T)                                                                                           \
    extern "C" int exchange_sum_##ending(void* tensor, long count, char* first, long stride, char* counters, int rank, \
                                         int size, long round, int max_spins) {                                       \
        return millrace::exchange_sum((T*)tensor, count, first, stride, counters, rank, size, round, max_spins);      \
    }                                                                                                                 \
    extern "C" void exchange_add_##ending(void* tensor, long count, char* first, long stride, int size) {             \
        millrace::sum(millrace::Parts{first, stride, size}, (T*)tensor, count);                                       \
    }

EXCHANGE(f32, float)
EXCHANGE(bf16, millrace::Bf16)
