// AVX-VNNI beside AVX2 (Intel's client processors since Alder Lake): products of bytes, added up, in one instruction. Two
// tokens and more times integers are lanes.h. All else is AVX2's, one token too: it gains nothing here.
#include "avx2.h"
#include "lanes.h"

namespace {

struct AvxVnni : Avx2 {
    struct InBytes : Avx2 {
        static constexpr int bytes = 64;
        static void store_words(int16_t* place, const float* x) {  // high bytes, with an offset of 128, then low ones
            for (int j = 0; j < 64; j += 16) {
                __m256i a = _mm256_cvtps_epi32(_mm256_load_ps(x + j)), b = _mm256_cvtps_epi32(_mm256_load_ps(x + j + 8));
                __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
                __m256i high = _mm256_add_epi16(_mm256_srai_epi16(words, 8), _mm256_set1_epi16(128));
                __m256i low = _mm256_and_si256(words, _mm256_set1_epi16(255));
                __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(high, low), 0xd8);
                _mm_store_si128((__m128i*)((uint8_t*)place + j), _mm256_castsi256_si128(bytes));
                _mm_store_si128((__m128i*)((uint8_t*)place + 64 + j), _mm256_extracti128_si256(bytes, 1));
            }
        }
    };
    struct Pairs { __m256i high, low; };
    using Total = __m256;
    static constexpr int chains = 1;

    static Pairs load_pairs(const uint8_t* p) {
        return {_mm256_load_si256((const __m256i*)p), _mm256_load_si256((const __m256i*)(p + 32))};
    }
    static Pairs no_pairs() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    template <int QUADS>
    static inline __attribute__((always_inline)) void add_products(Pairs& sum, Pairs x, const int8_t* w) {
        __m256i all;
        if constexpr (QUADS == 1) all = _mm256_broadcastd_epi32(_mm_loadu_si32(w));
        if constexpr (QUADS == 2) all = _mm256_broadcastq_epi64(_mm_loadu_si64(w));
        if constexpr (QUADS == 4) all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)w));
        if constexpr (QUADS == 8) all = _mm256_loadu_si256((const __m256i*)w);
        sum.high = _mm256_dpbusd_avx_epi32(sum.high, x.high, all);
        sum.low = _mm256_dpbusd_avx_epi32(sum.low, x.low, all);
    }
    static Total high(float value) { return broadcast(256.0f * value); }
    static Total add_scaled(Pairs sums, float scale, Total total) {
        __m256 all = fma(_mm256_cvtepi32_ps(sums.high), broadcast(256.0f), _mm256_cvtepi32_ps(sums.low));
        return fma(all, broadcast(scale), total);
    }
    static __m256 joined(Total total) { return total; }
    static void store_values(const Output& out, int64_t token, int64_t group, __m128 values) {
        alignas(16) float four[4];
        _mm_store_ps(four, values);
        for (int r = 0; r < 4 && group * 4 + r < out.rows; r++) ::store(out, token, group * 4 + r, four[r]);
    }
};

using L = Lanes<AvxVnni>;

void prepare(int32_t form, const void* x, int32_t kind, int64_t tokens, int64_t cols, void* data, float* scales) {
    if (form == FORM_I16 && tokens > 1) L::prepare(x, kind, tokens, cols, data, scales);
    else tawny_avx2()->prepare(form, x, kind, tokens, cols, data, scales);
}

void packed(const Packed* p, const Input* x, const Output* out, int64_t from, int64_t to, void* tile) {
    if (x->form == FORM_I16 && x->tokens > 1) L::packed(*p, *x, *out, from, to);
    else tawny_avx2()->packed(p, x, out, from, to, tile);
}

}  // namespace

extern "C" const Kernels* tawny_avxvnni() {
    static const Kernels table = [] {
        Kernels made = *tawny_avx2();
        made.name = "avxvnni", made.prepare = prepare, made.packed = packed;
        return made;
    }();
    return &table;
}
