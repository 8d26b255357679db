// AVX2, FMA and F16C: there is no expand instruction, so 8 survivors at a time go through a byte shuffle whose control
// comes from a table (tables.h). Absent columns are zeroed by the shuffle itself.
#pragma once
#include "integers.h"
#include "tables.h"

#include <immintrin.h>

namespace {

struct Avx2 {
    using V = __m256;
    using M = __m256;
    static constexpr int W = 8, registers = 16, streams = 2;

    static V zero() { return _mm256_setzero_ps(); }
    static V broadcast(float value) { return _mm256_set1_ps(value); }
    static V load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
    static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
    static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
    static V add(V a, V b) { return _mm256_add_ps(a, b); }
    static V min(V a, V b) { return _mm256_min_ps(a, b); }
    static V max(V a, V b) { return _mm256_max_ps(a, b); }
    static float reduce_min(V v) {
        __m128 half = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        half = _mm_min_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_min_ss(half, _mm_shuffle_ps(half, half, 1)));
    }
    static uint32_t equal(V a, V b) { return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
    static M above(V v, V bound) {
        return _mm256_cmp_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v), bound, _CMP_GT_OQ);
    }
    static M without(M a, M b) { return _mm256_andnot_ps(b, a); }
    static V select(M mask, V a, V b) { return _mm256_blendv_ps(b, a, mask); }
    static uint32_t bits(M mask) { return (uint32_t)_mm256_movemask_ps(mask); }
    static void gather(float* place, M mask, V v) {
        uint32_t left = bits(mask);
        if (!left) return;
        alignas(32) float all[8];
        _mm256_store_ps(all, v);
        for (int j = 0; j < 8; j++) *place = all[j], place += left >> j & 1;
    }
    static M set(const uint8_t* bytes) {
        __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
        return _mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()));
    }
    static void put(uint8_t* bytes, M mask) {
        __m256i ones = _mm256_srli_epi32(_mm256_castps_si256(mask), 31);
        __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(ones), _mm256_extracti128_si256(ones, 1));
        _mm_storel_epi64((__m128i*)bytes, _mm_packus_epi16(words, words));
    }
    static float reduce(V v) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
    }
    static V widen_bf16(__m128i half) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    static V load_kind(const void* data, int32_t kind, int64_t i) {
        if (kind == F32) return _mm256_loadu_ps((const float*)data + i);
        __m128i half = _mm_loadu_si128((const __m128i*)((const uint16_t*)data + i));
        return kind == BF16 ? widen_bf16(half) : _mm256_cvtph_ps(half);
    }
    static void store_kind(void* place, int32_t kind, V v) {
        if (kind == F32) return _mm256_storeu_ps((float*)place, v);
        if (kind == F16) {
            _mm_storeu_si128((__m128i*)place, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
            return;
        }
        __m256i raw = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(raw, 16), _mm256_set1_epi32(1));
        __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(raw, _mm256_set1_epi32(0x7fff)), odd);
        __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(raw, _mm256_set1_epi32(0x400000)), nan);
        rounded = _mm256_srli_epi32(rounded, 16);
        __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
        _mm_storeu_si128((__m128i*)place, words);
    }
    static void store_four(const Output& out, int64_t token, int64_t group, const V* sums, const float* scales) {
        ::store_four<Avx2>(out, token, group, sums, scales);
    }
    template <int KIND>
    static inline __attribute__((always_inline)) V expand(typename Trait<KIND>::Place values, uint32_t bits) {
        if constexpr (KIND == F32) {
            __m256i place = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)tables.bytes[bits]));
            __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps((const float*)values.at), place);
            return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(place, 31)), moved);
        } else if constexpr (KIND == BF16 || KIND == F16) {
            __m128i moved = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)values.at),
                                             _mm_load_si128((const __m128i*)tables.words[bits]));
            return KIND == BF16 ? widen_bf16(moved) : _mm256_cvtph_ps(moved);
        } else {
            return expand_each<Avx2, KIND>(values, bits);
        }
    }

    // -------------------------------------------------------------------------------------- integers.h

    using Bytes = __m256i;
    using Sums = __m256i;
    static constexpr int bytes = 32;
    static constexpr float offset = 0.0f;

    static void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
    static Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
    static Bytes add(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
    static Bytes same(int value) { return _mm256_set1_epi8((char)value); }
    static Bytes load_bytes(const int8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
    static void store_bytes(int8_t* p, Bytes v) { _mm256_storeu_si256((__m256i*)p, v); }
    static Bytes table(const int8_t* levels) {
        return levels ? _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)levels)) : _mm256_setzero_si256();
    }
    static Bytes lookup(Bytes table, Bytes codes) { return _mm256_shuffle_epi8(table, codes); }
    // Columns [32 PART, 32 PART + 32) of a plane of WIDTH bits, its lowest bit at bit AT of each byte.
    template <int WIDTH, int AT, int PART>
    static inline __attribute__((always_inline)) Bytes plane(const uint8_t* p) {
        Bytes all, moved;
        if constexpr (WIDTH == 4) {
            all = _mm256_loadu_si256((const __m256i*)p);
            moved = PART ? _mm256_srli_epi16(all, 4) : all;
        } else if constexpr (WIDTH == 2) {
            all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
            moved = _mm256_srlv_epi64(all, _mm256_setr_epi64x(4 * PART, 4 * PART, 4 * PART + 2, 4 * PART + 2));
        } else {
            int64_t eight;
            memcpy(&eight, p, 8);
            all = _mm256_set1_epi64x(eight);
            moved = _mm256_srlv_epi64(all, _mm256_setr_epi64x(4 * PART, 4 * PART + 1, 4 * PART + 2, 4 * PART + 3));
        }
        Bytes kept = _mm256_and_si256(moved, _mm256_set1_epi8((1 << WIDTH) - 1));
        return AT ? _mm256_slli_epi16(kept, AT) : kept;
    }
    // Survivors of 32 columns at their places; moves past them.
    static inline __attribute__((always_inline)) Bytes spread(const int8_t*& survivors, const uint8_t* mask) {
        __m128i half[2];
        auto pair = [](const void* low, const void* high) __attribute__((always_inline)) {
            __m128 first = _mm_castsi128_ps(_mm_loadl_epi64((const __m128i*)low));
            return _mm_castps_si128(_mm_loadh_pi(first, (const __m64*)high));
        };
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            uint64_t low = mask[2 * h], high = mask[2 * h + 1];
            const int8_t* next = survivors + _mm_popcnt_u64(low);
            half[h] = _mm_shuffle_epi8(pair(survivors, next), pair(tables.bytes[low], tables.upper[high]));
            survivors = next + _mm_popcnt_u64(high);
        }
        return _mm256_inserti128_si256(_mm256_castsi128_si256(half[0]), half[1], 1);
    }

    static constexpr int halves = 2;  // of a part: its even columns, then its odd ones
    struct Words { __m256i half[2]; };
    static inline __attribute__((always_inline)) Words words(Bytes all) {
        // 1 times each even byte: one instruction, where shifting left and right would be two.
        return {{_mm256_maddubs_epi16(_mm256_set1_epi16(1), all), _mm256_srai_epi16(all, 8)}};
    }
    static __m256i load_words(const int16_t* p) { return _mm256_load_si256((const __m256i*)p); }
    static void hold(__m256i& words) { asm("" : "+x"(words)); }
    static Sums no_sums() { return _mm256_setzero_si256(); }
    static inline __attribute__((always_inline)) void multiply_add(Sums& sums, Words w, int half, __m256i x) {
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(w.half[half], x));
        asm("" : "+x"(sums));  // or GCC adds up many products first, and spills them
    }
    static V floats(Sums sums) { return _mm256_cvtepi32_ps(sums); }
    static V widen(const int8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
    }
    // 32 floats rounded to words, even columns first, as `multiply_add` wants them.
    static void store_words(int16_t* place, const float* x) {
        __m256i even[2], odd[2];
        for (int h = 0; h < 2; h++) {  // 16 columns: a pair of words in each 32 bits
            __m256i a = _mm256_cvtps_epi32(_mm256_load_ps(x + 16 * h)), b = _mm256_cvtps_epi32(_mm256_load_ps(x + 16 * h + 8));
            __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
            even[h] = _mm256_srai_epi32(_mm256_slli_epi32(pairs, 16), 16), odd[h] = _mm256_srai_epi32(pairs, 16);
        }
        _mm256_store_si256((__m256i*)place, _mm256_permute4x64_epi64(_mm256_packs_epi32(even[0], even[1]), 0xd8));
        _mm256_store_si256((__m256i*)(place + 16), _mm256_permute4x64_epi64(_mm256_packs_epi32(odd[0], odd[1]), 0xd8));
    }
};

}  // namespace
