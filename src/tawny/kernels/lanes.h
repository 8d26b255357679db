// Two tokens and more times integers, with products of unsigned by signed bytes: tokens lie in the lanes of a vector,
// weights are broadcast to them. A lane's sum is then one token's, so nothing is added up across lanes until the row ends,
// and a scale costs one multiplication for eight tokens. integers.h, where columns lie in lanes, needs one for each token.
//
// Eight lanes hold the high bytes of activations, with an offset of 128, and eight the low ones: a `Pairs` of the
// instruction set. A lane multiplies four neighbouring columns (a quad) at once. So 8 tokens take a quad of one row at a
// time, and P tokens take 8 / P quads. Tokens come in eights; what is left of them is a four, a two and a one.
#pragma once
#include "integers.h"

namespace {

template <class I>
struct Lanes {
    using N = Integers<I>;
    using Pairs = typename I::Pairs;
    using Total = typename I::Total;

    // Calls use(P, t) for the parts of `count` tokens: P of them, from token t.
    template <class F>
    static inline __attribute__((always_inline)) void each_part(int64_t count, F use) {
        int64_t t = 0;
        for (; count - t >= 8; t += 8) use(typename N::template Number<8>{}, t);
        if (count & 4) use(typename N::template Number<4>{}, t), t += 4;
        if (count & 2) use(typename N::template Number<2>{}, t), t += 2;
        if (count & 1) use(typename N::template Number<1>{}, t);
    }

    // As in integers.h, then the tokens of each part change places with the quads of each block.
    static void prepare(const void* x, int32_t kind, int64_t tokens, int64_t cols, void* data, float* scales) {
        Integers<typename I::InBytes>::prepare(x, kind, tokens, cols, data, scales);
        int64_t blocks = (cols + 63) / 64;
        uint32_t* place = (uint32_t*)data;
        for (int64_t left = tokens; left > 0; left -= N::TOGETHER) {
            int64_t count = left < N::TOGETHER ? left : N::TOGETHER;
            for (int64_t b = 0; b < blocks; b++, place += count * 32)
                each_part(count, [&](auto part, int64_t t) { exchange<part.value>(place + t * 32); });
        }
    }

    template <int P>
    static void exchange(uint32_t* place) {
        constexpr int Q = 8 / P;
        uint32_t before[P * 32];  // [token, high or low, quad]
        memcpy(before, place, sizeof before);
        for (int lane = 0; lane < 16; lane++)
            for (int step = 0; step < 16 / Q; step++)
                place[step * 16 + lane] = before[lane % 8 / Q * 32 + lane / 8 * 16 + step * Q + lane % Q];
    }

    // sum[r] += row r of a strip, times the P tokens of x, whose blocks lie `step` bytes apart.
    template <int P, bool HALF>
    NOINLINE static void multiply(const int8_t* strip, int64_t blocks, int64_t together, const float* scales,
                                    const uint8_t* x, int64_t step, Total* sum) {
        constexpr int Q = 8 / P, STEPS = 2 * P, SPANS = HALF ? 2 : 1, CHAINS = HALF ? 1 : I::chains;
        Total total[4] = {sum[0], sum[1], sum[2], sum[3]};
        for (int64_t b = 0, end; b < blocks; b = end) {
            end = HALF ? b + 1 : b + together < blocks ? b + together : blocks;
#pragma GCC unroll 2
            for (int span = 0; span < SPANS; span++, scales += 4) {
                Pairs acc[4][CHAINS];
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++)
#pragma GCC unroll 2
                    for (int c = 0; c < CHAINS; c++) acc[r][c] = I::no_pairs();
                for (int64_t i = b; i < end; i++)
#pragma GCC unroll 16
                    for (int s = span * STEPS / SPANS; s < (span + 1) * STEPS / SPANS; s++) {
                        Pairs tokens = I::load_pairs(x + i * step + s * 64);
#pragma GCC unroll 4
                        for (int r = 0; r < 4; r++)
                            I::template add_products<Q>(acc[r][s % CHAINS], tokens, strip + (i * 4 + r) * 64 + s * 4 * Q);
                    }
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) {
                    Pairs all = acc[r][0];
                    if constexpr (CHAINS == 2) all = I::both(all, acc[r][1]);
                    total[r] = I::add_scaled(all, scales[r], total[r]);
                }
            }
        }
        for (int r = 0; r < 4; r++) sum[r] = total[r];
    }

    // The four rows of each of P tokens, from sums whose lanes are [token, quad].
    template <int P>
    static void finish(const Total* sum, const Output& out, int64_t group, int64_t first, const float* scales) {
        __m256 one[4];  // [token, quad] of a row
        for (int r = 0; r < 4; r++) one[r] = I::joined(sum[r]);
        __m256 a = _mm256_unpacklo_ps(one[0], one[1]), b = _mm256_unpackhi_ps(one[0], one[1]);
        __m256 c = _mm256_unpacklo_ps(one[2], one[3]), d = _mm256_unpackhi_ps(one[2], one[3]);
        const __m256 lanes[4] = {_mm256_shuffle_ps(a, c, 0x44), _mm256_shuffle_ps(a, c, 0xee),
                                 _mm256_shuffle_ps(b, d, 0x44), _mm256_shuffle_ps(b, d, 0xee)};
        for (int t = 0; t < P; t++) {
            __m128 values = _mm_setzero_ps();
            for (int lane = t * (8 / P); lane < (t + 1) * (8 / P); lane++)
                values = _mm_add_ps(values, lane < 4 ? _mm256_castps256_ps128(lanes[lane]) : _mm256_extractf128_ps(lanes[lane - 4], 1));
            I::store_values(out, first + t, group, _mm_mul_ps(values, _mm_set1_ps(scales[t])));
        }
    }

    template <int KIND, bool HALF>
    static void group(const Packed& p, const Input& x, const Output& out, int64_t g, int64_t first, int64_t tokens) {
        constexpr int PARTS = N::TOGETHER / 8 + 2;  // 31 tokens: three eights, a four, a two and a one
        Total sum[PARTS + 1][4];
        int parts = 0;
        each_part(tokens, [&](auto part, int64_t) {
            // High bytes carry an offset of 128. Quads share what takes it back.
            for (int r = 0; r < 4; r++) {
                float offset = p.sums[g * 4 + r] * (p.span ? 1.0f : group_scales(p, g)[r]) * (-128.0f * part.value / 8);
                sum[parts][r] = I::high(offset);
            }
            parts++;
        });
        typename N::template Strips<KIND> strips(p, g);
        int64_t step = tokens * 128, together = N::blocks_of(p);
        const uint8_t* place = (const uint8_t*)x.data + first * p.blocks * 128;
        for (int64_t b = 0; b < p.blocks; b += N::STRIP) {
            int64_t blocks = p.blocks - b < N::STRIP ? p.blocks - b : N::STRIP;
            typename N::Scales scales(p, g, b);
            const int8_t* strip = strips.next(blocks);
            int at = 0;
            each_part(tokens, [&](auto part, int64_t t) {
                multiply<part.value, HALF>(strip, blocks, together, scales.at, place + b * step + t * 128, step, sum[at++]);
            });
        }
        int at = 0;
        each_part(tokens, [&](auto part, int64_t t) {
            finish<part.value>(sum[at++], out, g, first + t, x.scales + first + t);
        });
    }

    template <int KIND, bool HALF>
    static void range(const Packed& p, const Input& x, const Output& out, int64_t from, int64_t to) {
        for (int64_t t = 0; t < x.tokens; t += N::TOGETHER)
            for (int64_t g = from; g < to; g++)
                group<KIND, HALF>(p, x, out, g, t, x.tokens - t < N::TOGETHER ? x.tokens - t : N::TOGETHER);
    }

    static void packed(const Packed& p, const Input& x, const Output& out, int64_t from, int64_t to) {
        with_kind(p.kind, [&](auto trait) {
            if constexpr (trait.scaled)
                p.span == 32 ? range<trait.kind, true>(p, x, out, from, to) : range<trait.kind, false>(p, x, out, from, to);
        });
    }
};

}  // namespace
