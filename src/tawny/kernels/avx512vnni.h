// Integers with AVX-512's VBMI2 and VNNI: 64 survivors at a time through vpexpandb into vpdpbusd. Activations are 16-bit
// integers split into two unsigned bytes, hi + 128 and lo, because vpdpbusd multiplies unsigned by signed; the 128 is taken
// back with the row's sum of integers, which the format stores. Everything is exact integer arithmetic as long as a scale
// lasts. Masked int8 times one token has its own loop here, other integers times one token are integers.h, and more tokens
// lanes.h.
#pragma once
#include "avx512.h"
#include "integers.h"
#include "lanes.h"

namespace {

// The inner loops are a few instructions that a compiler spoils: it folds the load into the expansion (slower on Zen 4),
// splits a mask by a 64-bit mask register and a shift, expands with zero-masking (which waits for the register's old
// value, Zen 4 and 5), and copies or spills accumulators that could stay in place (GCC 12: a fifth of the time of int8).
// So these few are spelled out: expand into a cleared register, accumulate in place.
inline __attribute__((always_inline)) __m512i load_apart(const void* values) {
    __m512i loaded = _mm512_loadu_si512(values);
    asm("" : "+v"(loaded));
    return loaded;
}

inline __attribute__((always_inline)) __m512i expand8(__mmask64 mask, const void* values) {
    __m512i made;
    asm("vpxord %0, %0, %0\n\tvpexpandb %1, %0%{%2%}" : "=&v"(made) : "v"(load_apart(values)), "Yk"(mask));
    return made;
}

inline __attribute__((always_inline)) void add_products_int8(__m512i& sum, __m512i x, __m512i w) {  // unsigned x
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
}

// The hardware prefetcher follows neither two streams a core nor runs of uneven length well. So for each block of 64
// columns some cache lines of values are requested 4 KB ahead, no fewer than a block consumes (8 at most with bfloat16,
// 4 with int8), and one line of masks 1 KB ahead. Too few lines lose more than too many; 1 or 2 KB is too near on Zen 5.
template <int LINES>
inline __attribute__((always_inline)) void prefetch(const uint8_t* values, const uint64_t* masks) {
#pragma GCC unroll 8
    for (int i = 0; i < LINES; i++) _mm_prefetch((const char*)values + 4096 + 64 * i, _MM_HINT_T0);
    _mm_prefetch((const char*)masks + 1024, _MM_HINT_T0);
}

struct Vbmi2 : Avx512 {
    using Bytes = __m512i;
    using Words = __m512i;
    struct Sums { __m512i high, low; };
    struct Split { __m512i high, low; };
    static constexpr int bytes = 64, halves = 1;
    static constexpr float offset = 32768.0f;

    static void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
    static Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
    static Bytes add(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
    static Bytes same(int value) { return _mm512_set1_epi8((char)value); }
    static Bytes load_bytes(const int8_t* p) { return _mm512_loadu_si512(p); }
    static void store_bytes(int8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }
    static Bytes table(const int8_t* levels) {
        return levels ? _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)levels)) : _mm512_setzero_si512();
    }
    static Bytes lookup(Bytes table, Bytes codes) { return _mm512_shuffle_epi8(table, codes); }
    // 64 columns of a plane of WIDTH bits, its lowest bit at bit AT of each byte.
    template <int WIDTH, int AT, int PART>
    static inline __attribute__((always_inline)) Bytes plane(const uint8_t* p) {
        Bytes moved;
        if constexpr (WIDTH == 4) {
            __m256i all = _mm256_loadu_si256((const __m256i*)p);
            moved = _mm512_inserti64x4(_mm512_castsi256_si512(all), _mm256_srli_epi16(all, 4), 1);
        } else if constexpr (WIDTH == 2) {
            Bytes all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
            moved = _mm512_srlv_epi64(all, _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6));
        } else {
            int64_t eight;
            memcpy(&eight, p, 8);
            moved = _mm512_srlv_epi64(_mm512_set1_epi64(eight), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
        }
        Bytes kept = _mm512_and_si512(moved, _mm512_set1_epi8((1 << WIDTH) - 1));
        return AT ? _mm512_slli_epi16(kept, AT) : kept;
    }
    static inline __attribute__((always_inline)) Bytes spread(const int8_t*& survivors, const uint8_t* mask) {
        uint64_t bits;
        memcpy(&bits, mask, 8);
        Bytes found = expand8(bits, survivors);
        survivors += _mm_popcnt_u64(bits);
        return found;
    }
    static Words words(Bytes v) { return v; }
    static Split load_words(const int16_t* p) { return {_mm512_load_si512(p), _mm512_load_si512(p + 32)}; }
    static void hold(Split&) {}
    static Sums no_sums() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
    static inline __attribute__((always_inline)) void multiply_add(Sums& sums, Words w, int, Split x) {
        add_products_int8(sums.high, x.high, w);
        add_products_int8(sums.low, x.low, w);
    }
    static V floats(Sums sums) { return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sums.high, 8), sums.low)); }
    static V pair(float first, float second) {  // of 32 columns each: four bytes of them in each lane
        return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(first), _mm512_set1_ps(second));
    }
    static V widen(const int8_t* p) { return Avx512::widen<INT8>(p); }
    static void store_words(int16_t* place, const float* x) {
        for (int j = 0; j < 64; j += 16) {
            __m512i q = _mm512_cvtps_epi32(_mm512_load_ps(x + j));
            __m512i high = _mm512_add_epi32(_mm512_srai_epi32(q, 8), _mm512_set1_epi32(128));
            _mm_store_si128((__m128i*)((uint8_t*)place + j), _mm512_cvtepi32_epi8(high));
            _mm_store_si128((__m128i*)((uint8_t*)place + 64 + j), _mm512_cvtepi32_epi8(q));
        }
    }

    // ------------------------------------------------------------------------------------------ lanes.h

    using InBytes = Vbmi2;  // whose `store_words` makes high and low bytes
    using Pairs = __m512i;
    using Total = __m512;
    static constexpr int chains = 2;

    static Pairs load_pairs(const uint8_t* p) { return _mm512_load_si512(p); }
    static Pairs no_pairs() { return _mm512_setzero_si512(); }
    static Pairs both(Pairs a, Pairs b) { return _mm512_add_epi32(a, b); }
    // QUADS times four bytes of weights, again and again in the lanes of a vector, times bytes of activations.
    template <int QUADS>
    static inline __attribute__((always_inline)) void add_products(Pairs& sum, Pairs x, const int8_t* w) {
        if constexpr (QUADS == 1) asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(x), "m"(*(const int32_t*)w));
        if constexpr (QUADS == 2) add_products_int8(sum, x, _mm512_broadcastq_epi64(_mm_loadu_si64(w)));
        if constexpr (QUADS == 4) add_products_int8(sum, x, _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)w)));
        if constexpr (QUADS == 8) add_products_int8(sum, x, _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)w)));
    }
    static Total high(float value) { return _mm512_maskz_mov_ps(0xff, broadcast(value)); }
    static Total add_scaled(Pairs sums, float scale, Total total) {
        return fma(_mm512_cvtepi32_ps(sums), broadcast(scale), total);
    }
    static __m256 joined(Total total) {
        __m256 low = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(total), 1));
        return _mm256_fmadd_ps(_mm512_castps512_ps256(total), _mm256_set1_ps(256.0f), low);
    }
};

using N = Integers<Vbmi2>;
using L = Lanes<Vbmi2>;

// ---------------------------------------------------------------------------------------------- int8, direct

inline __attribute__((always_inline)) __m128i reduce_four(__m512i a, __m512i b, __m512i c, __m512i d) {
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

template <int S, bool SPAN>
NOINLINE void direct_int8(const Packed& p, const Input& x, const Output& out, int64_t first, int64_t second) {
    __m512i high[S][4], low[S][4];
    __m512 sum[S][4];
    const uint8_t* values[S];
    const uint64_t* masks[S];
    const int64_t groups[2] = {first, second}, ends = p.span / 64 - 1;
#pragma GCC unroll 2
    for (int s = 0; s < S; s++) {
        values[s] = values_of<INT8>(p, groups[s]).at;
        masks[s] = p.masks + groups[s] * p.blocks * 4;
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            high[s][r] = low[s][r] = _mm512_setzero_si512();
            sum[s][r] = _mm512_setzero_ps();
        }
    }
    const uint8_t* x0 = (const uint8_t*)x.data;
    for (int64_t b = 0; b < p.blocks; b++) {
        __m512i x_high = _mm512_load_si512(x0 + b * 128), x_low = _mm512_load_si512(x0 + b * 128 + 64);
#pragma GCC unroll 2
        for (int s = 0; s < S; s++) {
            prefetch<4>(values[s], masks[s] + b * 4);
            const uint8_t* v = values[s];
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                uint64_t mask = masks[s][b * 4 + r];
                __m512i w = expand8(mask, v);
                v += _mm_popcnt_u64(mask);
                add_products_int8(high[s][r], x_high, w);
                add_products_int8(low[s][r], x_low, w);
                if (SPAN && ((b & ends) == ends || b + 1 == p.blocks)) {
                    __m512 scale = _mm512_set1_ps(span_scale(p, groups[s], b * 64, r));
                    sum[s][r] = _mm512_fmadd_ps(Vbmi2::floats({high[s][r], low[s][r]}), scale, sum[s][r]);
                    high[s][r] = low[s][r] = _mm512_setzero_si512();
                }
            }
            values[s] = v;
        }
    }
#pragma GCC unroll 2
    for (int s = 0; s < S; s++) {
        __m128 sums = _mm_loadu_ps(p.sums + groups[s] * 4), total;
        if (SPAN) {
            total = Avx512::reduce_four(sum[s][0], sum[s][1], sum[s][2], sum[s][3]);
            total = _mm_fnmadd_ps(_mm_set1_ps(32768.0f), sums, total);
        } else {
            // The sums of the high bytes may wrap around 2^32; what is left after taking 128 back may not (up to
            // 65536 columns), so wrapping arithmetic is exact.
            __m128i h = reduce_four(high[s][0], high[s][1], high[s][2], high[s][3]);
            __m128i l = reduce_four(low[s][0], low[s][1], low[s][2], low[s][3]);
            h = _mm_sub_epi32(h, _mm_slli_epi32(_mm_cvtps_epi32(sums), 7));
            total = _mm_fmadd_ps(_mm_cvtepi32_ps(h), _mm_set1_ps(256.0f), _mm_cvtepi32_ps(l));
            total = _mm_mul_ps(total, _mm_loadu_ps((const float*)p.scales + groups[s] * 4));
        }
        Avx512::store_values(out, 0, groups[s], _mm_mul_ps(total, _mm_set1_ps(x.scales[0])));
    }
}

template <bool SPAN>
void direct_int8_range(const Packed& p, const Input& x, const Output& out, int64_t from, int64_t to) {
    int64_t half = (to - from) / 2;
    for (int64_t g = from; g < from + half; g++) direct_int8<2, SPAN>(p, x, out, g, g + half);
    if ((to - from) & 1) direct_int8<1, SPAN>(p, x, out, to - 1, to - 1);
}

inline void prepare_integers(const void* x, int32_t kind, int64_t tokens, int64_t cols, void* data, float* scales) {
    (tokens == 1 ? N::prepare : L::prepare)(x, kind, tokens, cols, data, scales);
}

inline void multiply_integers(const Packed& p, const Input& x, const Output& out, int64_t from, int64_t to) {
    if (x.tokens > 1) return L::packed(p, x, out, from, to);
    bool own = p.kind == INT8 && p.masks && p.span != 32 && p.cols <= 65536;
    if (!own) return N::packed(p, x, out, from, to);
    return p.span ? direct_int8_range<true>(p, x, out, from, to) : direct_int8_range<false>(p, x, out, from, to);
}

}  // namespace
