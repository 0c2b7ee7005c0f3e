// What all compiled kernels share: how they are called, and the type of 16 bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace millrace {

struct Bf16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(Bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

/// What the arguments of every kernel begin with (_native.py packs them, tape.cpp runs recorded ones with other rows).
struct Header {
    long num_rows;  // tokens
    int num_threads;

    /// The threads for a call that reads so many numbers: all or one, since OpenMP ends those that a team leaves out.
    int team(long num_numbers) const { return num_numbers >= 16384 ? num_threads : 1; }
};

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int round_up(int a, int b) { return ceil_div(a, b) * b; }

}  // namespace millrace
