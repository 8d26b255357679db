// What `Generic` needs, for AVX-512F alone. Included by both AVX-512 files; compiled separately in each.
#pragma once
#include "generic.h"

#include <immintrin.h>

namespace {

struct Avx512 {
    using V = __m512;
    using M = __mmask16;
    static constexpr int W = 16, registers = 32, streams = 2;

    static V zero() { return _mm512_setzero_ps(); }
    static V broadcast(float value) { return _mm512_set1_ps(value); }
    static V load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
    static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
    static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
    static V add(V a, V b) { return _mm512_add_ps(a, b); }
    static V min(V a, V b) { return _mm512_min_ps(a, b); }
    static V max(V a, V b) { return _mm512_max_ps(a, b); }
    static float reduce_min(V v) { return _mm512_reduce_min_ps(v); }
    static uint32_t equal(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
    static M above(V v, V bound) { return _mm512_cmp_ps_mask(_mm512_abs_ps(v), bound, _CMP_GT_OQ); }
    static M without(M a, M b) { return _mm512_kandn(b, a); }
    static V select(M mask, V a, V b) { return _mm512_mask_blend_ps(mask, b, a); }
    static uint32_t bits(M mask) { return mask; }
    // Those of the mask side by side; what follows them is written to as well.
    static void gather(float* place, M mask, V v) { _mm512_storeu_ps(place, _mm512_maskz_compress_ps(mask, v)); }
    static M set(const uint8_t* bytes) {
        __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
        return _mm512_test_epi32_mask(wide, wide);
    }
    static void put(uint8_t* bytes, M mask) {
        _mm_storeu_si128((__m128i*)bytes, _mm512_cvtepi32_epi8(_mm512_maskz_set1_epi32(mask, 1)));
    }
    static float reduce(V v) { return _mm512_reduce_add_ps(v); }

    template <int KIND>
    static inline __attribute__((always_inline)) V widen(const void* p) {
        if (KIND == F32) return _mm512_loadu_ps(p);
        if (KIND == INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
        __m256i half = _mm256_loadu_si256((const __m256i*)p);
        if (KIND == F16) return _mm512_cvtph_ps(half);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static V load_kind(const void* data, int32_t kind, int64_t i) {
        if (kind == F32) return widen<F32>((const float*)data + i);
        const uint16_t* p = (const uint16_t*)data + i;
        return kind == BF16 ? widen<BF16>(p) : widen<F16>(p);
    }
    static __m256i to_bf16(V v) {  // round to nearest even; NaN keeps its upper half and becomes quiet
        __m512i bits = _mm512_castps_si512(v);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    }
    static void store_kind(void* place, int32_t kind, V v) {
        if (kind == F32) return _mm512_storeu_ps(place, v);
        __m256i half = kind == BF16 ? to_bf16(v) : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
        _mm256_storeu_si256((__m256i*)place, half);
    }
    // The sums of four vectors, side by side.
    static inline __attribute__((always_inline)) __m128 reduce_four(V a, V b, V c, V d) {
        V ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        V cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
        V all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
        __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all),
                                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
        return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    }
    // Four neighbouring results of one token: with short rows, storing them one by one takes as long as the products.
    static inline __attribute__((always_inline)) void store_values(const Output& out, int64_t token, int64_t group,
                                                                   __m128 values) {
        int64_t row = group * 4, at = token * out.rows + row;
        if (row + 4 > out.rows) {
            alignas(16) float tail[4];
            _mm_store_ps(tail, values);
            for (int r = 0; r < 4; r++) ::store(out, token, row + r, tail[r]);
        } else if (out.kind == F32) {
            if (out.bias) values = _mm_add_ps(values, _mm_loadu_ps((const float*)out.bias + row));
            _mm_storeu_ps((float*)out.data + at, values);
        } else if (out.kind == F16) {
            if (out.bias)
                values = _mm_add_ps(values, _mm_cvtph_ps(_mm_loadl_epi64((const __m128i_u*)((const uint16_t*)out.bias + row))));
            _mm_storeu_si64((uint16_t*)out.data + at, _mm_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
        } else {
            if (out.bias) {
                __m128i bias = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i_u*)((const uint16_t*)out.bias + row)));
                values = _mm_add_ps(values, _mm_castsi128_ps(_mm_slli_epi32(bias, 16)));
            }
            __m128i bits = _mm_castps_si128(values), odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
            __m128i rounded = _mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), odd);
            __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(values, values));
            rounded = _mm_blendv_epi8(rounded, _mm_or_si128(bits, _mm_set1_epi32(0x400000)), nan);
            rounded = _mm_srli_epi32(rounded, 16);
            _mm_storeu_si64((uint16_t*)out.data + at, _mm_packus_epi32(rounded, rounded));
        }
    }
    static inline __attribute__((always_inline)) void store_four(const Output& out, int64_t token, int64_t group,
                                                                 const V* sums, const float* scales) {
        __m128 values = reduce_four(sums[0], sums[1], sums[2], sums[3]);
        if (scales) values = _mm_mul_ps(values, _mm_loadu_ps(scales));
        store_values(out, token, group, values);
    }
    // Load, clear, then expand by merging. With a memory operand float32 products took 3.5 times as long on Zen 5, and
    // the zero-masking form waits for the old value of its destination.
    template <int KIND>
    static inline __attribute__((always_inline)) V expand(typename Trait<KIND>::Place values, uint32_t bits) {
        if constexpr (KIND > INT8) {
            return expand_each<Avx512, KIND>(values, bits);
        } else {
            V loaded = widen<KIND>(values.at), made;
            asm("" : "+v"(loaded));
            asm("vpxord %0, %0, %0\n\tvexpandps %1, %0%{%2%}" : "=&v"(made) : "v"(loaded), "Yk"((__mmask16)bits));
            return made;
        }
    }
};

}  // namespace
