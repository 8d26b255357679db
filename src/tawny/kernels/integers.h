// Products with integers, written once over the vector type like generic.h. What an instruction set supplies besides are
// vectors of bytes, their products with 16-bit words, and how it spreads survivors by a mask (`Portable` has the list).
//
// Activations are 16-bit integers with a scale a token, so every product is exact and sums are integers as long as a
// scale lasts. A weight is made in strips of 32 blocks, as signed bytes that stay in L1: [blocks, 4, 64]. Codes of few bits
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
    static constexpr int STRIP = 32;   // blocks; sums of so many products fit 32 bits
    static constexpr int TOGETHER = 32;  // tokens that share a strip

    // For each block of 64 columns all tokens side by side, a part of N columns in the order that `multiply_add` wants.
    static void prepare(const void* x, int32_t kind, int64_t tokens, int64_t cols, void* data, float* scales) {
        int64_t blocks = (cols + 63) / 64;
        for (int64_t t = 0; t < tokens; t++) {
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
                int16_t* place = (int16_t*)data + (b * tokens + t) * 64;
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

    template <int KIND>
    static inline __attribute__((always_inline)) Bytes table() {
        if constexpr (Trait<KIND>::bits <= 4) return I::table(Trait<KIND>::levels);
        else return I::table(nullptr);
    }

    // Part `part` of a chunk as signed bytes.
    template <int KIND, int PART>
    static inline __attribute__((always_inline)) Bytes unpack(const uint8_t* chunk, Bytes table) {
        constexpr int bits = Trait<KIND>::bits;
        Bytes codes;
        if constexpr (bits == 6) codes = I::either(I::template plane<4, 0, PART>(chunk), I::template plane<2, 4, PART>(chunk + 32));
        if constexpr (bits == 5) codes = I::either(I::template plane<4, 0, PART>(chunk), I::template plane<1, 4, PART>(chunk + 32));
        if constexpr (bits == 4) codes = I::template plane<4, 0, PART>(chunk);
        if constexpr (bits == 3) codes = I::either(I::template plane<2, 0, PART>(chunk), I::template plane<1, 2, PART>(chunk + 16));
        if constexpr (bits == 2) codes = I::template plane<2, 0, PART>(chunk);
        if constexpr (bits <= 4) return I::lookup(table, codes);
        else return I::add(Trait<KIND>::step == 2 ? I::add(codes, codes) : codes, I::same(Trait<KIND>::first));
    }

    template <int KIND, int PART = 0>
    static inline __attribute__((always_inline)) void unpack_to(const uint8_t* chunk, Bytes table, int8_t* out) {
        I::store_bytes(out + PART * N, unpack<KIND, PART>(chunk, table));
        if constexpr (PART + 1 < PARTS) unpack_to<KIND, PART + 1>(chunk, table, out);
    }

    template <int KIND>
    TAWNY_LOOP static void unpack_chunks(const uint8_t* chunks, int64_t count, int8_t* out) {
        constexpr int size = Trait<KIND>::bits * 8;
        Bytes levels = table<KIND>();
        for (int64_t i = 0; i < count; i++) {
            I::prefetch(chunks + i * size + 4096);
            unpack_to<KIND>(chunks + i * size, levels, out + i * 64);
        }
    }

    // Survivors at their columns, zero elsewhere: a row of 64 columns for each mask. Reads up to N bytes past the last.
    TAWNY_LOOP static const int8_t* spread(const int8_t* survivors, const uint64_t* masks, int64_t count, int8_t* out) {
        for (int64_t i = 0; i < count; i++) {
            I::prefetch(survivors + 4096);
            I::prefetch(masks + i + 128);
            for (int part = 0; part < PARTS; part++)
                I::store_bytes(out + i * 64 + part * N, I::spread(survivors, (const uint8_t*)(masks + i) + part * (N / 8)));
        }
        return survivors;
    }

    // A group's signed bytes, strip after strip.
    template <int KIND>
    struct Strips {
        typename Trait<KIND>::Place values;
        const uint64_t* masks;
        alignas(64) int8_t survivors[STRIP * 256 + 192], dense[STRIP * 256];
        Strips(const Packed& p, int64_t group)
            : values(values_of<KIND>(p, group)), masks(p.masks ? p.masks + group * p.blocks * 4 : nullptr) {}

        const int8_t* next(int64_t blocks) {
            int64_t count = blocks * 256;
            if (masks) {
                count = 0;
                if (KIND != INT8)
                    for (int64_t i = 0; i < blocks * 4; i++) count += __builtin_popcountll(masks[i]);
            }
            const int8_t* from;
            if constexpr (KIND == INT8) {
                from = (const int8_t*)values.at;
                if (!masks) values.skip(count);
            } else {
                int8_t* to = masks ? survivors : dense;
                unpack_chunks<KIND>(values.at, (values.inside + count + 63) / 64, to);
                from = to + values.inside;
                values.skip(count);
            }
            if (!masks) return from;
            const int8_t* end = spread(from, masks, blocks * 4, dense);
            if constexpr (KIND == INT8) values.skip(end - from);
            masks += blocks * 4;
            return dense;
        }
    };

    // ------------------------------------------------------------------------------------------ products

    // Where a strip's scales begin, how many spans may still be read there, and blocks a scale (two spans a block: 0).
    struct Scales {
        const uint16_t* at;
        int64_t last, blocks;
        Scales(const Packed& p, int64_t group, int64_t block)
            : at(p.span ? span_scales(p, group, block * 64) : nullptr),
              last(p.span ? (p.cols - 1 - block * 64) / p.span : 0), blocks(p.span ? p.span / 64 : STRIP) {}
        float of(int64_t span, int row) const {
            return at ? bf16_to_float(at[(span < last ? span : last) * 4 + row]) : 1.0f;
        }
    };

    // sum[r][t] += a strip times T tokens, whose blocks lie `step` words apart.
    template <int T, bool HALF>
    TAWNY_LOOP static void multiply(const int8_t* strip, int64_t blocks, const Scales& scales, const int16_t* x, int64_t step,
                                    V* sum, int64_t tokens) {
        for (int64_t b = 0, span = 0; b < blocks; b += HALF ? 1 : scales.blocks, span++) {
            int64_t end = HALF ? b + 1 : b + scales.blocks < blocks ? b + scales.blocks : blocks;
            for (int r = 0; r < 4; r++) {
                Sums acc[T];
                auto flush = [&](float scale) __attribute__((always_inline)) {
                    V factor = I::broadcast(scale);
#pragma GCC unroll 8
                    for (int t = 0; t < T; t++) sum[r * tokens + t] = I::fma(I::floats(acc[t]), factor, sum[r * tokens + t]);
                };
                auto clear = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
                    for (int t = 0; t < T; t++) acc[t] = I::no_sums();
                };
                clear();
                for (int64_t i = b; i < end; i++) {
#pragma GCC unroll 4
                    for (int part = 0; part < PARTS; part++) {
                        auto w = I::words(strip + (i * 4 + r) * 64 + part * N);
#pragma GCC unroll 8
                        for (int t = 0; t < T; t++) acc[t] = I::multiply_add(acc[t], w, x + i * step + t * 64 + part * N);
                        if (HALF && (part + 1) * N == 32) flush(scales.of(2 * b, r)), clear();
                    }
                }
                flush(scales.of(HALF ? 2 * b + 1 : span, r));
            }
        }
    }

    template <bool HALF>
    static void multiply_all(const int8_t* strip, int64_t blocks, const Scales& scales, const int16_t* x, int64_t step, V* sum,
                             int64_t tokens) {
        int64_t t = 0;
        if constexpr (I::streams == 1) {  // portable code has no registers to fill
            for (; t < tokens; t++) multiply<1, HALF>(strip, blocks, scales, x + t * 64, step, sum + t, tokens);
            return;
        }
        for (; t + 8 <= tokens; t += 8) multiply<8, HALF>(strip, blocks, scales, x + t * 64, step, sum + t, tokens);
        if (t + 4 <= tokens) multiply<4, HALF>(strip, blocks, scales, x + t * 64, step, sum + t, tokens), t += 4;
        if (t + 2 <= tokens) multiply<2, HALF>(strip, blocks, scales, x + t * 64, step, sum + t, tokens), t += 2;
        if (t < tokens) multiply<1, HALF>(strip, blocks, scales, x + t * 64, step, sum + t, tokens);
    }

    template <int KIND>
    static void group(const Packed& p, const Input& x, const Output& out, int64_t g, int64_t first, int64_t tokens) {
        V sum[4 * TOGETHER];
        for (int64_t i = 0; i < 4 * tokens; i++) sum[i] = I::zero();
        Strips<KIND> strips(p, g);
        for (int64_t b = 0; b < p.blocks; b += STRIP) {
            int64_t blocks = p.blocks - b < STRIP ? p.blocks - b : STRIP, step = x.tokens * 64;
            const int16_t* words = (const int16_t*)x.data + b * step + first * 64;
            const int8_t* strip = strips.next(blocks);
            Scales scales(p, g, b);
            if (p.span == 32) multiply_all<true>(strip, blocks, scales, words, step, sum, tokens);
            else multiply_all<false>(strip, blocks, scales, words, step, sum, tokens);
        }
        const float* rows = group_scales(p, g);
        for (int64_t t = 0; t < tokens; t++) {
            const V four[4] = {sum[t], sum[tokens + t], sum[2 * tokens + t], sum[3 * tokens + t]};
            float factors[4];
            for (int r = 0; r < 4; r++) factors[r] = x.scales[first + t] * (rows ? rows[r] : 1.0f);
            I::store_four(out, first + t, g, four, factors);
        }
    }

    static void packed(const Packed& p, const Input& x, const Output& out, int64_t from, int64_t to) {
        with_kind(p.kind, [&](auto trait) {
            if constexpr (trait.scaled)
                for (int64_t g = from; g < to; g++)
                    for (int64_t t = 0, share; t < x.tokens; t += share) {
                        share = token_share(x.tokens - t, TOGETHER);
                        group<trait.kind>(p, x, out, g, t, share);
                    }
        });
    }

    // ------------------------------------------------------------------------------------------ written out

    static void write(const Packed& p, int64_t g, int64_t block, int64_t blocks, const int8_t* strip, void* out, int32_t kind,
                      int64_t stride) {
        V least = I::broadcast(-largest(kind)), most = I::broadcast(largest(kind));
        Scales scales(p, g, block);
        const float* rows = group_scales(p, g);
        int64_t size = value_size(kind);
        for (int64_t b = 0; b < blocks; b++)
            for (int r = 0; r < 4 && g * 4 + r < p.rows; r++) {
                const int8_t* bytes = strip + (b * 4 + r) * 64;
                int64_t left = p.cols - (block + b) * 64;
                uint8_t* place = (uint8_t*)out + (r * stride + (block + b) * 64) * size;
                alignas(64) float buffer[64];
                for (int h = 0; h < 2; h++) {
                    V scale = I::broadcast(rows ? rows[r] : scales.of((b * 64 + h * 32) / p.span, r));
                    for (int j = h * 32; j < h * 32 + 32; j += W) {
                        V w = I::max(I::min(I::mul(I::widen(bytes + j), scale), most), least);
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
    static int32_t form(int32_t kind, int32_t, int64_t, int64_t) {
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
