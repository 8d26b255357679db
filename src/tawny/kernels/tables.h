// Controls of byte shuffles that put survivors at their columns, one for each mask of 8 bits: for instruction sets that
// have no expand instruction.
#pragma once
#include <stdint.h>

namespace {

// entry m: for each set bit of m, in order, where its survivor lies; 0x80 elsewhere (the shuffle writes zero there)
struct Tables {
    alignas(64) uint8_t bytes[256][8];
    alignas(64) uint8_t words[256][16];
    alignas(64) uint8_t upper[256][8];  // like bytes, for survivors that lie in the upper half
    constexpr Tables() : bytes(), words(), upper() {
        for (int m = 0; m < 256; m++)
            for (int j = 0, n = 0; j < 8; j++) {
                bool set = (m >> j) & 1;
                bytes[m][j] = (uint8_t)(set ? n : 0x80);
                upper[m][j] = (uint8_t)(set ? 8 + n : 0x80);
                words[m][2 * j] = (uint8_t)(set ? 2 * n : 0x80);
                words[m][2 * j + 1] = (uint8_t)(set ? 2 * n + 1 : 0x80);
                n += set;
            }
    }
};
constexpr Tables tables;

}  // namespace
