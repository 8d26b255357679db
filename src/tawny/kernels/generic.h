// The algorithms, written once over a vector type: what an instruction set must supply is loading, expanding by a mask,
// and one multiply-add (see `Portable` in portable.cpp for the list). Activations are float32 here, and so are products of
// float kinds; integers.h multiplies integers.
//
// Three ways to multiply, by the number of tokens:
//   direct   1-4 tokens: survivors are expanded into registers and used at once. Two groups of rows that lie far apart
//            are walked together: two distant memory streams a core are faster than one, two adjacent ones slower.
//   tile     more: one group is expanded to [4, cols] in scratch memory that stays in L2, then multiplied 4 rows by a
//            few tokens at a time.
//   expand   for prefill: rows are written out densely and the caller runs its matrix product.
#pragma once
#include "tawny.h"

#include <stddef.h>
#include <string.h>

namespace {

inline float bf16_to_float(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

inline int32_t float_bits(float value) {
    int32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

inline uint16_t float_to_bf16(float value) {  // round to nearest, ties to even; a NaN stays one
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float f16_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = half & 0x7fffu, bits;
    if (rest >= 0x7c00u) {
        bits = sign | 0x7f800000u | ((rest & 0x3ffu) << 13);
    } else if (rest >= 0x400u) {
        bits = sign | ((rest << 13) + (112u << 23));
    } else {  // subnormal or zero: exact as a product of two float32
        float value = (float)rest * 5.9604644775390625e-8f;
        memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t float_to_f16(float value) {  // round to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);
    if (rest < 0x38800000u) {  // subnormal: let float32 addition round
        float shifted;
        memcpy(&shifted, &rest, 4);
        shifted += 0.5f;
        memcpy(&rest, &shifted, 4);
        return (uint16_t)(sign | (rest - 0x3f000000u));
    }
    rest += 0xfffu + ((rest >> 13) & 1);
    return (uint16_t)(sign | ((rest - (112u << 23)) >> 13));
}

// The largest finite number of a kind. A scale that was rounded up may carry the largest weight past it.
constexpr float largest(int32_t kind) {
    return kind == F16 ? 65504.0f : kind == BF16 ? 0x1.fep127f : 0x1.fffffep127f;
}

inline float load_float(const void* data, int32_t kind, int64_t i) {
    if (kind == F32) return ((const float*)data)[i];
    uint16_t bits = ((const uint16_t*)data)[i];
    return kind == BF16 ? bf16_to_float(bits) : f16_to_float(bits);
}

inline void store(const Output& out, int64_t token, int64_t row, float value) {
    if (row >= out.rows) return;
    if (out.bias) value += load_float(out.bias, out.kind, row);
    int64_t i = token * out.rows + row;
    if (out.kind == F32) {
        ((float*)out.data)[i] = value;
    } else {
        ((uint16_t*)out.data)[i] = out.kind == BF16 ? float_to_bf16(value) : float_to_f16(value);
    }
}

// A loop over a group is a function of its own, so that the choice among kinds does not share its registers.
#define NOINLINE __attribute__((noinline))

constexpr int value_size(int kind) { return kind == F32 ? 4 : 2; }  // of a float

// ---------------------------------------------------------------------------------------------- kinds
//
// A new kind is one trait here with its code in `Kind` and `with_kind`, and one row in kinds.py. Every kernel then
// reads it: integers.h every kind of integers, and an instruction set that has no `expand` of its own for a kind of floats
// widens survivors one by one.

// A place among survivors that take whole bytes.
template <int BYTES>
struct Whole {
    const uint8_t* at;
    Whole(const void* values, int64_t first) : at((const uint8_t*)values + first * BYTES) {}
    void skip(int64_t count) { at += count * BYTES; }
};

// A place among codes of few bits. 64 of them are a chunk, and a chunk consists of planes: 4, 2 and 1 bits of every code,
// as far as the kind has them. A byte of a plane holds codes that lie 32, 16 or 8 apart.
template <int BITS>
struct Chunked {
    const uint8_t* at;  // the chunk
    int64_t inside;     // codes of it that are behind us
    Chunked(const void* values, int64_t first) : at((const uint8_t*)values), inside(0) { skip(first); }
    void skip(int64_t count) {
        at += (inside + count) / 64 * (8 * BITS);
        inside = (inside + count) % 64;
    }
};

template <int KIND>
struct Trait;  // bits of a survivor, whether it is an integer to be scaled, where it is; of a float its value as float32

template <int KIND>
struct FloatTrait {
    static constexpr int kind = KIND, bits = 8 * value_size(KIND);
    static constexpr bool scaled = false;
    using Place = Whole<value_size(KIND)>;
    static float load(Place place, int64_t i) { return load_float(place.at, KIND, i); }
};
template <>
struct Trait<F32> : FloatTrait<F32> {};
template <>
struct Trait<BF16> : FloatTrait<BF16> {};
template <>
struct Trait<F16> : FloatTrait<F16> {};
template <>
struct Trait<INT8> {
    static constexpr int kind = INT8, bits = 8;
    static constexpr bool scaled = true;
    using Place = Whole<1>;
};

// Codes of few bits. A code stands for a signed byte, its level. Up to 4 bits any table of levels will do; with more bits the
// levels follow each other from `first` on. kinds.py has the same levels.
template <int BITS>
struct FewTrait {
    static constexpr int bits = BITS;
    static constexpr bool scaled = true;
    using Place = Chunked<BITS>;
};
template <>
struct Trait<INT4> : FewTrait<4> {
    static constexpr int kind = INT4;
    static constexpr int8_t levels[16] = {-53, -40, -31, -24, -18, -12, -6, 0, 5, 11, 17, 24, 31, 39, 49, 63};
};
template <>
struct Trait<INT3> : FewTrait<3> {
    static constexpr int kind = INT3;
    static constexpr int8_t levels[16] = {-48, -29, -15, 0, 12, 24, 39, 63};
};
template <>
struct Trait<INT2> : FewTrait<2> {
    static constexpr int kind = INT2;
    static constexpr int8_t levels[16] = {-50, -15, 24, 63};
};
template <>
struct Trait<INT5> : FewTrait<5> {
    static constexpr int kind = INT5, first = -14;
};
template <>
struct Trait<INT6> : FewTrait<6> {
    static constexpr int kind = INT6, first = -28;
};

// `use(trait)` for a kind that is known only now.
template <class F>
inline auto with_kind(int32_t kind, F use) {
    static_assert(KINDS == 9, "a new kind needs a case here");
    switch (kind) {
        case F32: return use(Trait<F32>{});
        case BF16: return use(Trait<BF16>{});
        case F16: return use(Trait<F16>{});
        case INT4: return use(Trait<INT4>{});
        case INT3: return use(Trait<INT3>{});
        case INT6: return use(Trait<INT6>{});
        case INT5: return use(Trait<INT5>{});
        case INT2: return use(Trait<INT2>{});
        default: return use(Trait<INT8>{});
    }
}

template <int KIND>
constexpr int level(int code) {
    if constexpr (Trait<KIND>::bits <= 4) return Trait<KIND>::levels[code];
    else return Trait<KIND>::first + code;
}

inline int64_t stored_bytes(int32_t kind, int64_t count) {
    return with_kind(kind, [&](auto trait) { return count * trait.bits / 8; });
}

// The number of a group's first survivor.
inline int64_t start_of(const Packed& p, int64_t group) { return p.offsets ? p.offsets[group] : group * p.blocks * 256; }

template <int KIND>
inline typename Trait<KIND>::Place values_of(const Packed& p, int64_t group) {
    return {p.values, start_of(p, group)};
}

// Survivors where their bits say, zero elsewhere: what an instruction set does with a kind that it has no better way for.
template <class I, int KIND>
inline typename I::V expand_each(typename Trait<KIND>::Place place, uint32_t bits) {
    alignas(64) float all[I::W] = {};
    for (int64_t i = 0; bits; bits &= bits - 1, i++) all[__builtin_ctz(bits)] = Trait<KIND>::load(place, i);
    return I::load(all);
}

// Four rows of a group at once, the slow way; instruction sets with a better one have their own.
template <class I>
inline __attribute__((always_inline)) void store_four(const Output& out, int64_t token, int64_t group,
                                                      const typename I::V* sums, const float* scales) {
    for (int r = 0; r < 4; r++) store(out, token, group * 4 + r, I::reduce(sums[r]) * (scales ? scales[r] : 1.0f));
}

// The scales of a group's rows still to be multiplied with once the last column is done, or null.
inline const float* group_scales(const Packed& p, int64_t group) {
    return p.scales && p.span == 0 ? (const float*)p.scales + group * 4 : nullptr;
}

// Of scales [groups, spans, 4], the number of the first of the span that holds a column.
inline int64_t span_place(const Packed& p, int64_t group, int64_t column) {
    int64_t shift = __builtin_ctz((uint32_t)p.span), spans = ((p.blocks * 64 - 1) >> shift) + 1;
    return (group * spans + (column >> shift)) * 4;
}

// A scale of eight bits: a sign, an exponent above the row's own, four bits of a fraction. `row` is the row's exponent where
// a float has it. Few operations, so that a loop of vectors keeps up with memory.
inline float coded_scale(int8_t code, uint32_t row) {
    uint32_t bits = code ? (((uint32_t)(int32_t)code << 19) & 0x83f80000u) + row : 0;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline float span_scale(const Packed& p, int64_t group, int64_t column, int row) {
    int64_t place = span_place(p, group, column) + row;
    if (!p.exponents) return bf16_to_float(((const uint16_t*)p.scales)[place]);
    return coded_scale(((const int8_t*)p.scales)[place], (uint32_t)p.exponents[group * 4 + row] << 23);
}

template <int N>
struct Number {
    static constexpr int value = N;
};

// `use(streams, tokens, first row, rows, first token)` over rows [from, to) of a dense weight: its two halves side by
// side, all tokens for as many rows as the cache keeps, up to 4 tokens together.
template <class F>
inline void dense_in_halves(const Dense& d, int64_t tokens, int64_t from, int64_t to, F use) {
    int64_t half = (to - from) / 2, few = (64 << 10) / (d.cols * value_size(d.kind)) + 1;
    auto all = [&](auto streams, int64_t first, int64_t count) {
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4) use(streams, Number<4>{}, first, count, t);
        for (; t + 2 <= tokens; t += 2) use(streams, Number<2>{}, first, count, t);
        for (; t < tokens; t++) use(streams, Number<1>{}, first, count, t);
    };
    for (int64_t r = 0; r < half; r += few) all(Number<2>{}, from + r, half - r < few ? half - r : few);
    if ((to - from) & 1) all(Number<1>{}, to - 1, 1);
}

template <class I>
struct Generic {
    using V = typename I::V;
    static constexpr int W = I::W;

    static int32_t form(int32_t, int32_t) { return FORM_F32; }

    static void prepare(int32_t, const void* x, int32_t kind, int64_t tokens, int64_t cols, void* data, float*) {
        int64_t stride = (cols + 63) / 64 * 64;
        for (int64_t t = 0; t < tokens; t++) {
            float* row = (float*)data + t * stride;
            int64_t i = 0;
            for (; i + W <= cols; i += W) I::store(row + i, I::load_kind(x, kind, t * cols + i));
            for (; i < cols; i++) row[i] = load_float(x, kind, t * cols + i);
            for (; i < stride; i++) row[i] = 0.0f;
        }
    }

    // Survivors of one row's 64 columns, W at a time, handed to `use(column, vector)`.
    template <int KIND, class F>
    static inline __attribute__((always_inline)) typename Trait<KIND>::Place walk(uint64_t mask,
                                                                                  typename Trait<KIND>::Place values, F use) {
#pragma GCC unroll 64
        for (int j = 0; j < 64; j += W) {
            uint64_t bits = (mask >> j) & ((1ull << W) - 1);
            use(j, I::template expand<KIND>(values, (uint32_t)bits));
            values.skip(__builtin_popcountll(bits));
        }
        return values;
    }

    template <int KIND, int S, int T>
    NOINLINE static void direct(const Packed& p, const Input& x, const Output& out, int64_t first, int64_t second) {
        V sum[S][4][T];
        const int64_t groups[2] = {first, second};
        typename Trait<KIND>::Place values[2] = {values_of<KIND>(p, first), values_of<KIND>(p, second)};
        const uint64_t* masks[S];
#pragma GCC unroll 2
        for (int s = 0; s < S; s++) {
            masks[s] = p.masks + groups[s] * p.blocks * 4;
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) sum[s][r][t] = I::zero();
        }
        const float* x0 = (const float*)x.data;
        for (int64_t b = 0; b < p.blocks; b++) {
#pragma GCC unroll 2
            for (int s = 0; s < S; s++)
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++)
                    values[s] = walk<KIND>(masks[s][b * 4 + r], values[s], [&](int j, V w) __attribute__((always_inline)) {
#pragma GCC unroll 4
                        for (int t = 0; t < T; t++)
                            sum[s][r][t] = I::fma(w, I::load(x0 + t * x.stride + b * 64 + j), sum[s][r][t]);
                    });
        }
#pragma GCC unroll 2
        for (int s = 0; s < S; s++)
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const V four[4] = {sum[s][0][t], sum[s][1][t], sum[s][2][t], sum[s][3][t]};
                I::store_four(out, t, groups[s], four, nullptr);
            }
    }

    template <int KIND, int T>
    static void direct_range(const Packed& p, const Input& x, const Output& out, int64_t from, int64_t to) {
        int64_t half = (to - from) / 2, g = from;
        if (I::streams == 2 && T <= 2)
            for (; g < from + half; g++) direct<KIND, 2, T>(p, x, out, g, g + half);
        if (g == from + half && half) g = from + 2 * half;
        for (; g < to; g++) direct<KIND, 1, T>(p, x, out, g, g);
    }

    // One group as float32 [4, blocks * 64].
    template <int KIND>
    static void expand_group(const Packed& p, int64_t group, float* tile) {
        auto values = values_of<KIND>(p, group);
        const uint64_t* masks = p.masks + group * p.blocks * 4;
        for (int64_t b = 0; b < p.blocks; b++)
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++)
                values = walk<KIND>(masks[b * 4 + r], values, [&](int j, V w) __attribute__((always_inline)) {
                    I::store(tile + (r * p.blocks + b) * 64 + j, w);
                });
    }

    template <int T>
    NOINLINE static void multiply(const Packed& p, const float* tile, const Input& x, const Output& out, int64_t group,
                                    int64_t t0) {
        V sum[4][T];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
#pragma GCC unroll 6
            for (int t = 0; t < T; t++) sum[r][t] = I::zero();
        const float* x0 = (const float*)x.data + t0 * x.stride;
        for (int64_t k = 0; k < p.blocks * 64; k += W) {
            V w[4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) w[r] = I::load(tile + r * p.blocks * 64 + k);
#pragma GCC unroll 6
            for (int t = 0; t < T; t++) {
                V v = I::load(x0 + t * x.stride + k);
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) sum[r][t] = I::fma(w[r], v, sum[r][t]);
            }
        }
#pragma GCC unroll 6
        for (int t = 0; t < T; t++) {
            const V four[4] = {sum[0][t], sum[1][t], sum[2][t], sum[3][t]};
            I::store_four(out, t0 + t, group, four, nullptr);
        }
    }

    static void multiply_any(int64_t share, const Packed& p, const float* tile, const Input& x, const Output& out,
                             int64_t group, int64_t t0) {
        switch (share) {
            case 1: return multiply<1>(p, tile, x, out, group, t0);
            case 2: return multiply<2>(p, tile, x, out, group, t0);
        }
        if constexpr (I::registers >= 32) switch (share) {
            case 3: return multiply<3>(p, tile, x, out, group, t0);
            case 4: return multiply<4>(p, tile, x, out, group, t0);
            case 5: return multiply<5>(p, tile, x, out, group, t0);
            case 6: return multiply<6>(p, tile, x, out, group, t0);
        }
    }

    template <int KIND>
    static void run(const Packed& p, const Input& x, const Output& out, int64_t from, int64_t to, float* tile) {
        if (x.tokens == 1) return direct_range<KIND, 1>(p, x, out, from, to);
        if (x.tokens == 2) return direct_range<KIND, 2>(p, x, out, from, to);
        if constexpr (I::registers >= 32) {
            if (x.tokens == 3) return direct_range<KIND, 3>(p, x, out, from, to);
            if (x.tokens == 4) return direct_range<KIND, 4>(p, x, out, from, to);
        }
        constexpr int most = I::registers >= 32 ? 6 : 2;
        int64_t together = tile_groups(p.blocks, 4), size = p.blocks * 64 * 4;
        for (; from < to; from += together) {
            int64_t n = to - from < together ? to - from : together;
            for (int64_t i = 0; i < n; i++) expand_group<KIND>(p, from + i, tile + i * size);
            for (int64_t t = 0, share; t < x.tokens; t += share) {
                share = token_share(x.tokens - t, most);
                for (int64_t i = 0; i < n; i++) multiply_any(share, p, tile + i * size, x, out, from + i, t);
            }
        }
    }

    static void packed(const Packed* p, const Input* x, const Output* out, int64_t from, int64_t to, void* tile) {
        with_kind(p->kind, [&](auto trait) {
            if constexpr (!trait.scaled) run<trait.kind>(*p, *x, *out, from, to, (float*)tile);
        });
    }

    template <int KIND>
    NOINLINE static void expand_rows(const Packed& p, int64_t from, int64_t to, void* out, int32_t kind, int64_t stride) {
        int64_t size = value_size(kind);
        for (int64_t g = from; g < to; g++) {
            auto values = values_of<KIND>(p, g);
            const uint64_t* masks = p.masks + g * p.blocks * 4;
            for (int64_t b = 0; b < p.blocks; b++)
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) {
                    int64_t row = g * 4 + r, left = p.cols - b * 64;
                    bool inside = row < p.rows;
                    uint8_t* place = (uint8_t*)out + ((row - from * 4) * stride + b * 64) * size;
                    alignas(64) float buffer[64];
                    values = walk<KIND>(masks[b * 4 + r], values, [&](int j, V w) __attribute__((always_inline)) {
                        if (inside && left >= 64) I::store_kind(place + j * size, kind, w);
                        else I::store(buffer + j, w);
                    });
                    if (inside && left < 64) {
                        Output tail = {place, nullptr, left, kind};
                        for (int64_t j = 0; j < left; j++) store(tail, 0, j, buffer[j]);
                    }
                }
        }
    }

    // 16 bits written as they are stored: arithmetic would set a bit of each NaN.
    template <int KIND>
    NOINLINE static void copy_rows(const Packed& p, int64_t from, int64_t to, uint16_t* out, int64_t stride) {
        for (int64_t g = from; g < to; g++) {
            const uint8_t* value = values_of<KIND>(p, g).at;
            const uint64_t* masks = p.masks + g * p.blocks * 4;
            for (int64_t b = 0; b < p.blocks; b++)
                for (int64_t row = g * 4; row < g * 4 + 4; row++) {
                    uint64_t mask = *masks++;
                    int64_t left = p.cols - b * 64;
                    if (row >= p.rows) continue;  // where no bit is set
                    uint16_t* place = out + (row - from * 4) * stride + b * 64;
                    memset(place, 0, (size_t)(left < 64 ? left : 64) * 2);
                    for (; mask; mask &= mask - 1, value += 2) memcpy(place + __builtin_ctzll(mask), value, 2);
                }
        }
    }

    static void expand(const Packed* p, int64_t from, int64_t to, void* out, int32_t kind, int64_t stride) {
        with_kind(p->kind, [&](auto trait) {
            if constexpr (trait.kind == BF16 || trait.kind == F16)
                if (kind == trait.kind) return copy_rows<trait.kind>(*p, from, to, (uint16_t*)out, stride);
            if constexpr (!trait.scaled) expand_rows<trait.kind>(*p, from, to, out, kind, stride);
        });
    }

    // Dense rows, two distant streams at a time; columns past the last whole vector are done one by one.
    template <int S, int T>
    static void dense_rows(const Dense& d, const Input& x, const Output& out, int64_t first, int64_t second) {
        V sum[S][T][2];
        const int64_t rows[2] = {first, second};
        for (int s = 0; s < S; s++)
            for (int t = 0; t < T; t++) sum[s][t][0] = sum[s][t][1] = I::zero();
        const float* x0 = (const float*)x.data;
        int64_t k = 0;
        for (; k + 2 * W <= d.cols; k += 2 * W)
#pragma GCC unroll 2
            for (int s = 0; s < S; s++)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    V w = I::load_kind(d.weight, d.kind, rows[s] * d.cols + k + h * W);
#pragma GCC unroll 4
                    for (int t = 0; t < T; t++)
                        sum[s][t][h] = I::fma(w, I::load(x0 + t * x.stride + k + h * W), sum[s][t][h]);
                }
        for (int s = 0; s < S; s++)
            for (int t = 0; t < T; t++) {
                float total = I::reduce(sum[s][t][0]) + I::reduce(sum[s][t][1]);
                for (int64_t i = k; i < d.cols; i++)
                    total += load_float(d.weight, d.kind, rows[s] * d.cols + i) * x0[t * x.stride + i];
                store(out, t, rows[s], total);
            }
    }

    template <int S, int T>
    static void dense_range(const Dense& d, const Input& x, const Output& out, int64_t first, int64_t count, int64_t apart,
                            int64_t t0) {
        Input part = {(const float*)x.data + t0 * x.stride, nullptr, T, x.stride, x.form};
        Output place = out;
        place.data = (uint8_t*)out.data + t0 * out.rows * value_size(out.kind);
        for (int64_t r = first; r < first + count; r++) dense_rows<S, T>(d, part, place, r, r + apart);
    }

    static void dense(const Dense* d, const Input* x, const Output* out, int64_t from, int64_t to) {
        dense_in_halves(*d, x->tokens, from, to, [&](auto streams, auto tokens, int64_t first, int64_t count, int64_t t0) {
            dense_range<streams.value, tokens.value>(*d, *x, *out, first, count, (to - from) / 2, t0);
        });
    }

    // y = x Wᵀ with the weight stored [cols, rows], as some experts are. Four of its columns at a time are added to sums of
    // [tokens, to - from] floats, which stay in the cache; the weight is read once, in its own order.
    static void dense_transposed(const Dense* d, const Input* x, const Output* out, int64_t from, int64_t to, void* scratch) {
        float *sums = (float*)scratch, none[4] = {};
        int64_t width = to - from;
        memset(sums, 0, x->tokens * width * 4);
        for (int64_t k = 0; k < d->cols; k += 4) {
            int64_t left = d->cols - k < 4 ? d->cols - k : 4, at[4];
            for (int64_t i = 0; i < 4; i++) at[i] = (k + (i < left ? i : 0)) * d->rows + from;
            for (int64_t t = 0; t < x->tokens; t++) {
                const float* given = (const float*)x->data + t * x->stride + k;
                for (int64_t i = 0; i < 4; i++) none[i] = i < left ? given[i] : 0.0f;
                V factor[4] = {I::broadcast(none[0]), I::broadcast(none[1]), I::broadcast(none[2]), I::broadcast(none[3])};
                float* sum = sums + t * width;
                int64_t j = 0;
                for (; j + W <= width; j += W) {
                    V all = I::load(sum + j);
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++) all = I::fma(I::load_kind(d->weight, d->kind, at[i] + j), factor[i], all);
                    I::store(sum + j, all);
                }
                for (; j < width; j++)
                    for (int64_t i = 0; i < left; i++) sum[j] += given[i] * load_float(d->weight, d->kind, at[i] + j);
            }
        }
        for (int64_t t = 0; t < x->tokens; t++)
            for (int64_t j = 0; j < width; j++) store(*out, t, from + j, sums[t * width + j]);
    }

    // What one core can read: two distant streams, four independent sums.
    static float stream(const float* data, int64_t count) {
        int64_t half = count / 2 / (2 * W) * (2 * W);
        V sum[2][2] = {{I::zero(), I::zero()}, {I::zero(), I::zero()}}, one = I::broadcast(1.0f);
        for (int64_t i = 0; i < half; i += 2 * W)
#pragma GCC unroll 2
            for (int s = 0; s < 2; s++)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) sum[s][h] = I::fma(I::load(data + s * half + i + h * W), one, sum[s][h]);
        return I::reduce(sum[0][0]) + I::reduce(sum[0][1]) + I::reduce(sum[1][0]) + I::reduce(sum[1][1]);
    }
};

}  // namespace
