// AVX2, FMA and F16C: there is no expand instruction, so 8 survivors at a time go through a byte shuffle whose control
// comes from a table with one entry for each of the 256 masks. Absent columns are zeroed by the shuffle itself.
#include "admm.h"
#include "between.h"
#include "greedy.h"

#include <immintrin.h>

namespace {

// entry m: for each set bit of m, in order, where its survivor lies; 0x80 elsewhere (the shuffle writes zero there)
struct Tables {
    alignas(64) uint8_t bytes[256][8];
    alignas(64) uint8_t words[256][16];
    constexpr Tables() : bytes(), words() {
        for (int m = 0; m < 256; m++)
            for (int j = 0, n = 0; j < 8; j++) {
                bool set = (m >> j) & 1;
                bytes[m][j] = (uint8_t)(set ? n : 0x80);
                words[m][2 * j] = (uint8_t)(set ? 2 * n : 0x80);
                words[m][2 * j + 1] = (uint8_t)(set ? 2 * n + 1 : 0x80);
                n += set;
            }
    }
};
constexpr Tables tables;

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
        float buffer[8];
        _mm256_storeu_ps(buffer, v);
        for (int j = 0; j < 8; j++) ((uint16_t*)place)[j] = float_to_bf16(buffer[j]);
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
        } else if constexpr (KIND == INT8) {
            __m128i moved = _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i*)values.at),
                                             _mm_loadl_epi64((const __m128i*)tables.bytes[bits]));
            return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(moved));
        } else if constexpr (KIND == BF16 || KIND == F16) {
            __m128i moved = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)values.at),
                                             _mm_load_si128((const __m128i*)tables.words[bits]));
            return KIND == BF16 ? widen_bf16(moved) : _mm256_cvtph_ps(moved);
        } else {
            return expand_each<Avx2, KIND>(values, bits);
        }
    }
};

using G = Generic<Avx2>;
using B = Between<Avx2>;
using R = Greedy<Avx2>;
using A = Admm<Avx2>;
const Kernels table = {"avx2", G::form, G::prepare, G::packed, G::expand, G::dense, G::stream, B::norm, B::swish, B::attend,
                       R::scratch, R::remove_half, A::right, A::update, A::support};

}  // namespace

extern "C" const Kernels* tawny_avx2() { return &table; }
