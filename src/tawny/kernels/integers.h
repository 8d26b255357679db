// Products with integers, written once over the vector type like generic.h. What an instruction set supplies besides are
// vectors of bytes, their products with 16-bit words, and how it spreads survivors by a mask (`Portable` has the list).
//
// Activations are 16-bit integers with a scale a token, so every product is exact and sums are integers as long as a
// scale lasts. A weight is made in strips of 16 blocks, as signed bytes that stay in L1: [blocks, 4, 64]. Codes of few bits
// are unpacked to bytes; survivors of a mask are then spread to their columns; whole int8 is used where it lies. A strip
// serves all tokens, eight of them at a time: their sums fill half of the registers of AVX2.
#pragma once
#include "generic.h"

namespace {

template <class I>
struct Integers {
    using V = typename I::V;
    using Bytes = typename I::Bytes;
    using Sums = typename I::Sums;
    static constexpr int W = I::W, N = I::bytes, PARTS = 64 / N;
    static constexpr int STRIP = 16;     // blocks; sums of so many products fit 32 bits
    static constexpr int TOGETHER = TOKENS_TOGETHER;  // they share a strip: their words of 4096 columns stay in L2
    static constexpr int AHEAD = 2048;   // bytes: 1 KB is as fast on Zen 3, 4 KB a quarter slower

    // Tokens that share a strip lie side by side in each block of 64 columns, a part of N columns in the order that
    // `multiply_add` wants.
    static void prepare(const void* x, int32_t kind, int64_t tokens, int64_t cols, void* data, float* scales) {
        int64_t blocks = (cols + 63) / 64;
        for (int64_t t = 0; t < tokens; t++) {
            int64_t before = t / TOGETHER * TOGETHER, count = tokens - before < TOGETHER ? tokens - before : TOGETHER;
            V most = I::zero(), poison = I::zero();
            alignas(64) float block[64];
            auto load = [&](int64_t b) {
                for (int64_t j = 0, i = b * 64; j < 64; j += W, i += W) {
                    if (i + W <= cols) I::store(block + j, I::load_kind(x, kind, t * cols + i));
                    else
                        for (int64_t k = 0; k < W; k++) block[j + k] = i + k < cols ? load_float(x, kind, t * cols + i + k) : 0.0f;
                }
            };
            for (int64_t b = 0; b < blocks; b++) {
                load(b);
                for (int j = 0; j < 64; j += W) {
                    V v = I::load(block + j);
                    most = I::max(I::max(v, I::mul(v, I::broadcast(-1.0f))), most);
                    poison = I::fma(v, I::zero(), poison);  // NaN once any activation is not finite
                }
            }
            float largest = -I::reduce_min(I::mul(most, I::broadcast(-1.0f))), bad = I::reduce(poison);
            scales[t] = largest / 32767.0f + bad;  // a NaN here makes the whole token NaN, as a matrix product would
            // In two steps for tiny activations, where 32767 / largest would be infinite.
            float lift = largest < 0x1p-100f ? 0x1p64f : 1.0f;
            bool usable = bad == 0.0f && largest > 0.0f;
            V first = I::broadcast(lift), inverse = I::broadcast(usable ? 32767.0f / (largest * lift) : 0.0f);
            for (int64_t b = 0; b < blocks; b++) {
                load(b);
                int16_t* place = (int16_t*)data + (before * blocks + b * count + t - before) * 64;
                if (!usable) {
                    memset(place, 0, 128);
                    continue;
                }
                for (int j = 0; j < 64; j += W) I::store(block + j, I::mul(I::mul(I::load(block + j), first), inverse));
                for (int j = 0; j < 64; j += N) I::store_words(place + j, block + j);
            }
        }
    }

    // ------------------------------------------------------------------------------------------ weights

    template <int NUMBER>
    struct Number { static constexpr int value = NUMBER; };
    template <int PART = 0, class F>
    static inline __attribute__((always_inline)) void each_part(F use) {
        use(Number<PART>{});
        if constexpr (PART + 1 < PARTS) each_part<PART + 1>(use);
    }

    template <int KIND>
    static inline __attribute__((always_inline)) Bytes table() {
        if constexpr (Trait<KIND>::bits <= 4) return I::table(Trait<KIND>::levels);
        else return I::table(nullptr);
    }

    // Part `part` of a chunk as signed bytes.
    template <int KIND, int PART>
    static inline __attribute__((always_inline)) Bytes unpack(const uint8_t* chunk, Bytes table) {
        constexpr int bits = Trait<KIND>::bits;
        [[maybe_unused]] Bytes codes;
        if constexpr (bits == 8) return I::load_bytes((const int8_t*)chunk + PART * N);
        if constexpr (bits == 6) codes = I::either(I::template plane<4, 0, PART>(chunk), I::template plane<2, 4, PART>(chunk + 32));
        if constexpr (bits == 5) codes = I::either(I::template plane<4, 0, PART>(chunk), I::template plane<1, 4, PART>(chunk + 32));
        if constexpr (bits == 4) codes = I::template plane<4, 0, PART>(chunk);
        if constexpr (bits == 3) codes = I::either(I::template plane<2, 0, PART>(chunk), I::template plane<1, 2, PART>(chunk + 16));
        if constexpr (bits == 2) codes = I::template plane<2, 0, PART>(chunk);
        if constexpr (bits <= 4) return I::lookup(table, codes);
        else if constexpr (bits < 8) return I::add(codes, I::same(Trait<KIND>::first));
    }

    template <int KIND, int PART = 0>
    static inline __attribute__((always_inline)) void unpack_to(const uint8_t* chunk, Bytes table, int8_t* out) {
        I::store_bytes(out + PART * N, unpack<KIND, PART>(chunk, table));
        if constexpr (PART + 1 < PARTS) unpack_to<KIND, PART + 1>(chunk, table, out);
    }

    template <int KIND>
    NOINLINE static void unpack_chunks(const uint8_t* chunks, int64_t count, int8_t* out) {
        constexpr int size = Trait<KIND>::bits * 8;
        Bytes levels = table<KIND>();
        for (int64_t i = 0; i < count; i++) {
            I::prefetch(chunks + i * size + 4096);
            unpack_to<KIND>(chunks + i * size, levels, out + i * 64);
        }
    }

    // Survivors at their columns, zero elsewhere, for each mask; moves past them. Reads up to N bytes past the last.
    template <class F>
    static inline __attribute__((always_inline)) void spread(const int8_t*& survivors, const uint64_t* mask, F use) {
        each_part([&](auto part) __attribute__((always_inline)) {
            use(part, I::spread(survivors, (const uint8_t*)mask + part.value * (N / 8)));
        });
    }

    // A group's signed bytes, strip after strip.
    template <int KIND>
    struct Strips {
        typename Trait<KIND>::Place values;
        const uint64_t* masks;
        alignas(64) int8_t bytes[STRIP * 256 + 192], dense[STRIP * 256];
        Strips(const Packed& p, int64_t group)
            : values(values_of<KIND>(p, group)), masks(p.masks ? p.masks + group * p.blocks * 4 : nullptr) {}

        // Where the strip's survivors lie as bytes; all 64 columns of every row, if the weight is whole.
        const int8_t* survivors(int64_t blocks) {
            int64_t count = masks ? 0 : blocks * 256;
            for (int64_t i = 0; masks && i < blocks * 4; i++) count += __builtin_popcountll(masks[i]);
            const int8_t* from = (const int8_t*)values.at;
            if constexpr (KIND != INT8) {
                unpack_chunks<KIND>(values.at, (values.inside + count + 63) / 64, bytes);
                from = bytes + values.inside;
            }
            values.skip(count);
            return from;
        }

        NOINLINE const int8_t* next(int64_t blocks) {
            const int8_t* from = survivors(blocks);
            if (!masks) {
                for (int64_t i = 0; KIND == INT8 && i < blocks * 256; i += 64) I::prefetch(from + i + STRIP * 256);
                return from;
            }
            for (int64_t i = 0; i < blocks * 4; i++) {
                if (KIND == INT8) I::prefetch(from + 4096);
                if (i % 2 == 0) I::prefetch(masks + i + 128);
                spread(from, masks + i, [&](auto part, Bytes w) __attribute__((always_inline)) {
                    I::store_bytes(dense + i * 64 + part.value * N, w);
                });
            }
            masks += blocks * 4;
            return dense;
        }
    };

    // ------------------------------------------------------------------------------------------ products

    // A strip's scales as floats, four for each span: a whole row's are one span.
    struct Scales {
        alignas(64) float at[STRIP * 2 * 4];
        Scales(const Packed& p, int64_t group, int64_t block) {
            if (!p.span) {
                memcpy(at, group_scales(p, group), 16);
                return;
            }
            int64_t left = p.blocks - block, i = 0, count = ((left < STRIP ? left : STRIP) * 64 + p.span - 1) / p.span * 4;
            int64_t place = span_place(p, group, block * 64);
            if (p.exponents) {
                decode((const int8_t*)p.scales + place, p.exponents + group * 4, count);
                return;
            }
            const uint16_t* from = (const uint16_t*)p.scales + place;
            for (; i + W <= count; i += W) I::store(at + i, I::load_kind(from, BF16, i));
            for (; i < count; i++) at[i] = bf16_to_float(from[i]);
        }
        void decode(const int8_t* codes, const uint8_t* exponents, int64_t count) {
            uint32_t rows[16];  // as many as the widest vector has lanes
            for (int i = 0; i < 16; i++) rows[i] = (uint32_t)exponents[i & 3] << 23;
            int64_t i = 0;
            for (; i + 16 <= count; i += 16)
                for (int j = 0; j < 16; j++) at[i + j] = coded_scale(codes[i + j], rows[j]);
            for (; i < count; i++) at[i] = coded_scale(codes[i], rows[i & 3]);
        }
    };

    // What a row's sums begin with: where activations carry an offset, minus what it will add to them.
    static V begin(const Packed& p, int64_t group, int row) {
        if constexpr (I::offset == 0) return I::zero();
        else return I::broadcast(-I::offset / W * p.sums[group * 4 + row] * (p.span ? 1.0f : group_scales(p, group)[row]));
    }

    // Blocks that share a scale: 0 where a block has two.
    static int64_t blocks_of(const Packed& p) { return p.span ? p.span / 64 : STRIP; }

    // sum[r][t] += R rows of blocks [b, end) times T tokens, whose blocks lie `step` words apart; `part(i, r, PART)` is a part
    // of row r of block i.
    template <int R, int T, bool HALF, class Part>
    static inline __attribute__((always_inline)) void add_rows(int64_t b, int64_t end, const float* scales, const int16_t* x,
                                                               int64_t step, V* sum, int64_t tokens, Part part) {
        Sums acc[R][T];
        auto clear = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) acc[r][t] = I::no_sums();
        };
        auto flush = [&](auto factor) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int t = 0; t < T; t++)
                    sum[r * tokens + t] = I::fma(I::floats(acc[r][t]), factor(r), sum[r * tokens + t]);
        };
        clear();
        for (int64_t i = b; i < end; i++)
            each_part([&](auto number) __attribute__((always_inline)) {
                constexpr int n = decltype(number)::value;
                typename I::Words w[R];
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) w[r] = part(i, r, number);
#pragma GCC unroll 4
                for (int half = 0; half < I::halves; half++)
#pragma GCC unroll 4
                    for (int t = 0; t < T; t++) {
                        auto words = I::load_words(x + i * step + t * 64 + n * N + half * (N / I::halves));
                        if (R > 1) I::hold(words);  // or GCC loads it again for every row
#pragma GCC unroll 4
                        for (int r = 0; r < R; r++) I::multiply_add(acc[r][t], w[r], half, words);
                    }
                if constexpr (HALF && (n + 1) * N == 32) flush([&](int r) { return I::broadcast(scales[r]); }), clear();
            });
        flush([&](int r) __attribute__((always_inline)) {
            if constexpr (HALF && N == 64) return I::pair(scales[r], scales[4 + r]);
            else return I::broadcast(scales[(HALF ? 4 : 0) + r]);
        });
    }

    // A strip times T tokens, R rows at a time: four sums of integers and four of floats leave registers for the rest.
    template <int R, int T, bool HALF>
    NOINLINE static void multiply(const int8_t* strip, int64_t blocks, int64_t together, const float* scales, const int16_t* x,
                                    int64_t step, V* sum, int64_t tokens, int64_t count) {
        for (int r0 = 0; r0 < 4; r0 += R)
            for (int64_t t0 = 0; t0 < count; t0 += T) {
                V local[R * T], *place = sum + r0 * tokens + t0;
#pragma GCC unroll 8
                for (int i = 0; i < R * T; i++) local[i] = place[i / T * tokens + i % T];
                const float* scale = scales + r0;
                for (int64_t b = 0, end; b < blocks; b = end, scale += HALF ? 8 : 4) {
                    end = HALF ? b + 1 : b + together < blocks ? b + together : blocks;
                    add_rows<R, T, HALF>(b, end, scale, x + t0 * 64, step, local, T,
                                         [&](int64_t i, int r, auto part) __attribute__((always_inline)) {
                                             return I::words(I::load_bytes(strip + (i * 4 + r0 + r) * 64 + part.value * N));
                                         });
                }
#pragma GCC unroll 8
                for (int i = 0; i < R * T; i++) place[i / T * tokens + i % T] = local[i];
            }
    }

    // One token, straight from the chunks of a whole weight: S groups that lie far apart.
    template <int KIND, bool HALF, int S>
    NOINLINE static void one(const Packed& p, const Input& x, const Output& out, int64_t first, int64_t second) {
        constexpr int size = Trait<KIND>::bits * 8;
        const int64_t groups[2] = {first, second};
        V sum[S][4];
        const uint8_t* chunks[S];
        Bytes levels = table<KIND>();
#pragma GCC unroll 2
        for (int s = 0; s < S; s++) {
            chunks[s] = values_of<KIND>(p, groups[s]).at;
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) sum[s][r] = begin(p, groups[s], r);
        }
        const int16_t* words = (const int16_t*)x.data;
        int64_t together = blocks_of(p);
        for (int64_t strip = 0; strip < p.blocks; strip += STRIP) {
            int64_t blocks = p.blocks - strip < STRIP ? p.blocks - strip : STRIP;
            const Scales scales[2] = {{p, first, strip}, {p, second, strip}};
            int64_t b = 0, span = 0;
            auto add = [&](int64_t end) __attribute__((always_inline)) {
#pragma GCC unroll 2
                for (int s = 0; s < S; s++) {
                    for (int64_t at = b * 4 * size; at < end * 4 * size; at += 64) I::prefetch(chunks[s] + at + AHEAD);
#pragma GCC unroll 4
                    for (int r = 0; r < 4; r++)
                        add_rows<1, 1, HALF>(b, end, scales[s].at + span + r, words, 64, &sum[s][r], 1,
                                             [&](int64_t i, int, auto part) __attribute__((always_inline)) {
                                                 return I::words(unpack<KIND, part.value>(chunks[s] + (i * 4 + r) * size, levels));
                                             });
                }
                b = end, span += HALF ? 8 : 4;
            };
            if (!HALF && together == 2)
                while (b + 2 <= blocks) add(b + 2);
            else if (HALF || together == 1)
                while (b < blocks) add(b + 1);
            while (b < blocks) add(b + together < blocks ? b + together : blocks);
            words += blocks * 64;
#pragma GCC unroll 2
            for (int s = 0; s < S; s++) chunks[s] += blocks * 4 * size;
        }
        const float factors[4] = {x.scales[0], x.scales[0], x.scales[0], x.scales[0]};
#pragma GCC unroll 2
        for (int s = 0; s < S; s++) I::store_four(out, 0, groups[s], sum[s], factors);
    }

    template <int KIND, bool HALF>
    static void one_range(const Packed& p, const Input& x, const Output& out, int64_t from, int64_t to) {
        int64_t half = (to - from) / 2;
        for (int64_t g = from; g < from + half; g++) one<KIND, HALF, 2>(p, x, out, g, g + half);
        if ((to - from) & 1) one<KIND, HALF, 1>(p, x, out, to - 1, to - 1);
    }

    // One token with a masked strip: each survivor goes from its byte to the product without being written.
    template <bool HALF>
    NOINLINE static void one_masked(const int8_t* survivors, const uint64_t* masks, int64_t blocks, int64_t together,
                                      const float* scales, const int16_t* x, V* sum) {
        for (int64_t b = 0, end; b < blocks; b = end, scales += HALF ? 8 : 4) {
            end = HALF ? b + 1 : b + together < blocks ? b + together : blocks;
            Sums acc[2][4];
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) acc[half][r] = I::no_sums();
            for (; b < end; b++) {
                I::prefetch(masks + b * 4 + 128);
                I::prefetch(survivors + AHEAD);
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++)
                    spread(survivors, masks + b * 4 + r, [&](auto part, Bytes w) __attribute__((always_inline)) {
                        auto words = I::words(w);
#pragma GCC unroll 4
                        for (int half = 0; half < I::halves; half++)
                            I::multiply_add(acc[HALF && part.value * N >= 32][r], words, half,
                                            I::load_words(x + b * 64 + part.value * N + half * (N / I::halves)));
                    });
            }
#pragma GCC unroll 2
            for (int half = 0; half < (HALF && N < 64 ? 2 : 1); half++)
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) {
                    V factor = I::broadcast(scales[half * 4 + r]);
                    if constexpr (HALF && N == 64) factor = I::pair(scales[r], scales[4 + r]);
                    sum[r] = I::fma(I::floats(acc[half][r]), factor, sum[r]);
                }
        }
    }

    template <bool HALF>
    static void multiply_all(const int8_t* strip, int64_t blocks, int64_t together, const float* scales, const int16_t* x,
                             int64_t step, V* sum, int64_t tokens) {
        if constexpr (I::streams == 1) {  // portable code has no registers to fill
            return multiply<1, 1, HALF>(strip, blocks, together, scales, x, step, sum, tokens, tokens);
        } else {
            int64_t t = tokens & ~3;
            if (t) multiply<HALF ? 1 : 2, 4, HALF>(strip, blocks, together, scales, x, step, sum, tokens, t);
            if (tokens & 2) multiply<2, 2, HALF>(strip, blocks, together, scales, x + t * 64, step, sum + t, tokens, 2), t += 2;
            if (tokens & 1) multiply<4, 1, HALF>(strip, blocks, together, scales, x + t * 64, step, sum + t, tokens, 1);
        }
    }

    template <int KIND, bool HALF>
    static void group(const Packed& p, const Input& x, const Output& out, int64_t g, int64_t first, int64_t tokens) {
        V sum[4 * TOGETHER];
        for (int64_t i = 0; i < 4 * tokens; i++) sum[i] = begin(p, g, (int)(i / tokens));
        Strips<KIND> strips(p, g);
        int64_t step = tokens * 64, together = blocks_of(p);
        for (int64_t b = 0; b < p.blocks; b += STRIP) {
            int64_t blocks = p.blocks - b < STRIP ? p.blocks - b : STRIP;
            const int16_t* words = (const int16_t*)x.data + first * p.blocks * 64 + b * step;
            Scales scales(p, g, b);
            if (p.masks && x.tokens == 1) {
                const uint64_t* masks = strips.masks;
                const int8_t* survivors = strips.survivors(blocks);
                strips.masks += blocks * 4;
                one_masked<HALF>(survivors, masks, blocks, together, scales.at, words, sum);
            } else {
                multiply_all<HALF>(strips.next(blocks), blocks, together, scales.at, words, step, sum, tokens);
            }
        }
        for (int64_t t = 0; t < tokens; t++) {
            const V four[4] = {sum[t], sum[tokens + t], sum[2 * tokens + t], sum[3 * tokens + t]};
            float scale = x.scales[first + t], factors[4] = {scale, scale, scale, scale};
            I::store_four(out, first + t, g, four, factors);
        }
    }

    template <int KIND, bool HALF>
    static void range(const Packed& p, const Input& x, const Output& out, int64_t from, int64_t to) {
        if constexpr (I::streams == 2 && (KIND == INT8 || KIND == INT4 || KIND == INT3))
            if (x.tokens == 1 && !p.masks) return one_range<KIND, HALF>(p, x, out, from, to);
        for (int64_t t = 0; t < x.tokens; t += TOGETHER)
            for (int64_t g = from; g < to; g++)
                group<KIND, HALF>(p, x, out, g, t, x.tokens - t < TOGETHER ? x.tokens - t : TOGETHER);
    }

    static void packed(const Packed& p, const Input& x, const Output& out, int64_t from, int64_t to) {
        with_kind(p.kind, [&](auto trait) {
            if constexpr (trait.scaled)
                p.span == 32 ? range<trait.kind, true>(p, x, out, from, to) : range<trait.kind, false>(p, x, out, from, to);
        });
    }

    // ------------------------------------------------------------------------------------------ written out

    static void write(const Packed& p, int64_t g, int64_t block, int64_t blocks, const int8_t* strip, void* out, int32_t kind,
                      int64_t stride) {
        V least = I::broadcast(-largest(kind)), most = I::broadcast(largest(kind));
        Scales scales(p, g, block);
        int64_t size = value_size(kind);
        for (int64_t b = 0; b < blocks; b++)
            for (int r = 0; r < 4 && g * 4 + r < p.rows; r++) {
                const int8_t* bytes = strip + (b * 4 + r) * 64;
                int64_t left = p.cols - (block + b) * 64;
                uint8_t* place = (uint8_t*)out + (r * stride + (block + b) * 64) * size;
                alignas(64) float buffer[64];
                for (int h = 0; h < 2; h++) {
                    V scale = I::broadcast(scales.at[(p.span == 32 ? 2 * b + h : b / blocks_of(p)) * 4 + r]);
                    for (int j = h * 32; j < h * 32 + 32; j += W) {
                        V product = I::fma(I::widen(bytes + j), scale, I::zero());  // never -0
                        V w = I::max(I::min(product, most), least);
                        if (left >= 64) I::store_kind(place + j * size, kind, w);
                        else I::store(buffer + j, w);
                    }
                }
                Output tail = {place, nullptr, left, kind};
                for (int64_t j = 0; left < 64 && j < left; j++) store(tail, 0, j, buffer[j]);
            }
    }

    static void expand(const Packed& p, int64_t from, int64_t to, void* out, int32_t kind, int64_t stride) {
        with_kind(p.kind, [&](auto trait) {
            if constexpr (trait.scaled)
                for (int64_t g = from; g < to; g++) {
                    Strips<trait.kind> strips(p, g);
                    for (int64_t b = 0; b < p.blocks; b += STRIP) {
                        int64_t blocks = p.blocks - b < STRIP ? p.blocks - b : STRIP;
                        uint8_t* place = (uint8_t*)out + (g - from) * 4 * stride * value_size(kind);
                        write(p, g, b, blocks, strips.next(blocks), place, kind, stride);
                    }
                }
        });
    }
};

// The functions of a table that have no better way for integers: integers here, the rest in generic.h.
template <class I, class J = I>
struct Both {
    static int32_t form(int32_t kind, int32_t) {
        return with_kind(kind, [](auto trait) { return trait.scaled; }) ? FORM_I16 : FORM_F32;
    }
    static void prepare(int32_t form, const void* x, int32_t kind, int64_t tokens, int64_t cols, void* data, float* scales) {
        if (form == FORM_I16) Integers<J>::prepare(x, kind, tokens, cols, data, scales);
        else Generic<I>::prepare(form, x, kind, tokens, cols, data, scales);
    }
    static void packed(const Packed* p, const Input* x, const Output* out, int64_t from, int64_t to, void* tile) {
        if (x->form == FORM_I16) Integers<J>::packed(*p, *x, *out, from, to);
        else Generic<I>::packed(p, x, out, from, to, tile);
    }
    static void expand(const Packed* p, int64_t from, int64_t to, void* out, int32_t kind, int64_t stride) {
        if (p->scales) Integers<J>::expand(*p, from, to, out, kind, stride);
        else Generic<I>::expand(p, from, to, out, kind, stride);
    }
};

}  // namespace
