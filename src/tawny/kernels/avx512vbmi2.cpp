// AVX-512 with VBMI2, VNNI and BF16 (Zen 4 and 5, Sapphire Rapids): the fast path.
//
// bfloat16 values: 32 survivors at a time through vpexpandw into vdpbf16ps, activations in bfloat16. Integers are
// avx512vnni.h. Float32 and float16 values, and float32 activations of floats, are the AVX-512F code.
#include "admm.h"
#include "avx512vnni.h"
#include "between.h"
#include "fit.h"
#include "greedy.h"

namespace {

using F = Generic<Avx512>;

inline __attribute__((always_inline)) __m512i expand16(uint32_t bits, const void* values) {
    __mmask32 mask;
    __m512i made;
    asm("kmovd %1, %0" : "=k"(mask) : "r"(bits));
    asm("vpxord %0, %0, %0\n\tvpexpandw %1, %0%{%2%}" : "=&v"(made) : "v"(load_apart(values)), "Yk"(mask));
    return made;
}

inline __attribute__((always_inline)) void add_products_bf16(__m512& sum, __m512i a, __m512i b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

int32_t form(int32_t kind, int32_t input) {
    if (with_kind(kind, [](auto trait) { return trait.scaled; })) return FORM_I16;
    return input == BF16 && kind == BF16 ? FORM_BF16 : FORM_F32;
}

// ---------------------------------------------------------------------------------------------- activations

void prepare_bf16(const void* x, int64_t tokens, int64_t cols, void* data) {
    int64_t stride = (cols + 63) / 64 * 64;
    for (int64_t t = 0; t < tokens; t++) {
        uint16_t* row = (uint16_t*)data + t * stride;
        memcpy(row, (const uint16_t*)x + t * cols, cols * 2);
        memset(row + cols, 0, (stride - cols) * 2);
    }
}

void prepare(int32_t form, const void* x, int32_t kind, int64_t tokens, int64_t cols, void* data, float* scales) {
    if (form == FORM_BF16) return prepare_bf16(x, tokens, cols, data);
    if (form == FORM_I16) return prepare_integers(x, kind, tokens, cols, data, scales);
    F::prepare(form, x, kind, tokens, cols, data, scales);
}

// ---------------------------------------------------------------------------------------------- bfloat16, direct

template <int S, int T, bool FIRST = true>
NOINLINE void direct_bf16(const Packed& p, const Input& x, const Output& out, int64_t first, int64_t step) {
    __m512 sum[S][4][T];
    const uint8_t* values[S];
    const uint64_t* masks[S];
#pragma GCC unroll 4
    for (int s = 0; s < S; s++) {
        values[s] = values_of<BF16>(p, first + s * step).at;
        masks[s] = p.masks + (first + s * step) * p.blocks * 4;
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) sum[s][r][t] = _mm512_setzero_ps();
    }
    const uint16_t* x0 = (const uint16_t*)x.data;
    for (int64_t b = 0; b < p.blocks; b++) {
        __m512i xs[T][2];
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            xs[t][0] = _mm512_load_si512(x0 + t * x.stride + b * 64);
            xs[t][1] = _mm512_load_si512(x0 + t * x.stride + b * 64 + 32);
        }
#pragma GCC unroll 4
        for (int s = 0; s < S; s++) {
            if (FIRST) prefetch<8>(values[s], masks[s] + b * 4);
            const uint8_t* v = values[s];
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                uint64_t mask = masks[s][b * 4 + r];
                __m512i w0 = expand16((uint32_t)mask, v);
                __m512i w1 = expand16((uint32_t)(mask >> 32), v + 2 * (uint64_t)_mm_popcnt_u32((uint32_t)mask));
                v += 2 * _mm_popcnt_u64(mask);
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) {
                    add_products_bf16(sum[s][r][t], w0, xs[t][0]);
                    add_products_bf16(sum[s][r][t], w1, xs[t][1]);
                }
            }
            values[s] = v;
        }
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; s++)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            const __m512 four[4] = {sum[s][0][t], sum[s][1][t], sum[s][2][t], sum[s][3][t]};
            Avx512::store_four(out, t, first + s * step, four, nullptr);
        }
}

// Two groups at a time, as far apart as the range allows; with many tokens their sums do not fit the registers.
template <int T>
void direct_bf16_range(const Packed& p, const Input& x, const Output& out, int64_t from, int64_t to) {
    constexpr int S = T <= 2 ? 2 : 1;
    int64_t step = (to - from) / S, g = from;
    for (; g < from + step; g++) direct_bf16<S, T>(p, x, out, g, step);
    for (g = from + S * step; g < to; g++) direct_bf16<1, T>(p, x, out, g, 0);
}

// More tokens: four at a time while the group is in cache. Up to about 36, expanding it again costs less than writing a
// tile and reading it, and less than torch's product.

template <bool FIRST>
void direct_bf16_some(const Packed& p, const Input& x, const Output& out, int64_t group, int64_t t0, int64_t share) {
    Input part = {(const uint16_t*)x.data + t0 * x.stride, nullptr, share, x.stride, x.form};
    Output place = {(uint8_t*)out.data + t0 * out.rows * value_size(out.kind), out.bias, out.rows, out.kind};
    switch (share) {
        case 1: return direct_bf16<1, 1, FIRST>(p, part, place, group, 0);
        case 2: return direct_bf16<1, 2, FIRST>(p, part, place, group, 0);
        case 3: return direct_bf16<1, 3, FIRST>(p, part, place, group, 0);
        default: return direct_bf16<1, 4, FIRST>(p, part, place, group, 0);
    }
}

void direct_bf16_many(const Packed& p, const Input& x, const Output& out, int64_t from, int64_t to) {
    for (; from < to; from++) {
        int64_t share = token_share(x.tokens, 4);
        direct_bf16_some<true>(p, x, out, from, 0, share);
        for (int64_t t = share; t < x.tokens; t += share) {
            share = token_share(x.tokens - t, 4);
            direct_bf16_some<false>(p, x, out, from, t, share);
        }
    }
}

// ---------------------------------------------------------------------------------------------- expanding

inline __m512i scale_bytes_to_bf16(__m256i bytes, __m512 scale) {
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    __m512 most = _mm512_set1_ps(largest(BF16));
    low = _mm512_range_ps(_mm512_mul_ps(low, scale), most, 2);  // the smaller magnitude with the product's sign
    high = _mm512_range_ps(_mm512_mul_ps(high, scale), most, 2);
    __m512 zero = _mm512_setzero_ps();  // added, it makes +0 of -0
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_add_ps(high, zero), _mm512_add_ps(low, zero));
}

// One group as 16-bit words [4, stride]. INT8 becomes bfloat16.
template <int KIND>
void expand_group16(const Packed& p, int64_t group, uint16_t* out, int64_t stride, int rows) {
    const uint8_t* values = values_of<KIND>(p, group).at;
    const uint64_t every[4] = {~0ull, ~0ull, ~0ull, ~0ull}, *masks = p.masks ? p.masks + group * p.blocks * 4 : every;
    for (int64_t b = 0; b < p.blocks; b++, masks += p.masks ? 4 : 0) {
        int64_t left = p.cols - b * 64;
        bool whole = left >= 64 || stride >= p.blocks * 64;
        prefetch<KIND == INT8 ? 4 : 8>(values, masks);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            uint64_t mask = masks[r];
            __m512i low, high;
            if (KIND == INT8) {
                __m512i q = expand8(mask, values);
                __m256i q0 = _mm512_castsi512_si256(q), q1 = _mm512_extracti64x4_epi64(q, 1);
                auto scale = [&](int64_t column) {
                    return _mm512_set1_ps(p.span ? span_scale(p, group, column, r) : group_scales(p, group)[r]);
                };
                low = scale_bytes_to_bf16(q0, scale(b * 64)), high = scale_bytes_to_bf16(q1, scale(b * 64 + 32));
                values += __builtin_popcountll(mask);
            } else {
                low = expand16((uint32_t)mask, values);
                high = expand16((uint32_t)(mask >> 32), values + 2 * __builtin_popcount((uint32_t)mask));
                values += 2 * __builtin_popcountll(mask);
            }
            if (r >= rows) continue;
            uint16_t* place = out + r * stride + b * 64;
            if (whole) {
                _mm512_storeu_si512(place, low);
                _mm512_storeu_si512(place + 32, high);
            } else {
                uint64_t keep = (1ull << left) - 1;
                _mm512_mask_storeu_epi16(place, (__mmask32)keep, low);
                _mm512_mask_storeu_epi16(place + 32, (__mmask32)(keep >> 32), high);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------- the table

void packed(const Packed* p, const Input* x, const Output* out, int64_t from, int64_t to, void* scratch) {
    if (x->form == FORM_I16) return multiply_integers(*p, *x, *out, from, to);
    if (x->form == FORM_F32) return F::packed(p, x, out, from, to, scratch);
    switch (x->tokens) {
        case 1: return direct_bf16_range<1>(*p, *x, *out, from, to);
        case 2: return direct_bf16_range<2>(*p, *x, *out, from, to);
        case 3: return direct_bf16_range<3>(*p, *x, *out, from, to);
        case 4: return direct_bf16_range<4>(*p, *x, *out, from, to);
        default: return direct_bf16_many(*p, *x, *out, from, to);
    }
}

void expand(const Packed* p, int64_t from, int64_t to, void* out, int32_t kind, int64_t stride) {
    bool words = (p->kind == kind && kind != F32) || (p->kind == INT8 && kind == BF16);
    if (!words) return p->scales ? N::expand(*p, from, to, out, kind, stride) : F::expand(p, from, to, out, kind, stride);
    for (int64_t g = from; g < to; g++) {
        uint16_t* place = (uint16_t*)out + (g - from) * 4 * stride;
        int rows = p->rows - g * 4 < 4 ? (int)(p->rows - g * 4) : 4;
        if (p->kind == INT8) expand_group16<INT8>(*p, g, place, stride, rows);
        else expand_group16<BF16>(*p, g, place, stride, rows);
    }
}

// ---------------------------------------------------------------------------------------------- dense bfloat16

template <int S, int T>
void dense_rows(const Dense& d, const Input& x, const Output& out, int64_t first, int64_t step) {
    // From T alone: which row is left without a partner depends on the threads, its sum must not.
    constexpr int U = T >= 4 ? 2 : 4;
    __m512 sum[S][T][U];
    const uint16_t* w[S];
    for (int s = 0; s < S; s++) w[s] = (const uint16_t*)d.weight + (first + s * step) * d.cols;
    for (int s = 0; s < S; s++)
        for (int t = 0; t < T; t++)
            for (int u = 0; u < U; u++) sum[s][t][u] = _mm512_setzero_ps();
    const uint16_t* x0 = (const uint16_t*)x.data;
    int64_t k = 0;
    for (; k + 32 * U <= d.cols; k += 32 * U)
#pragma GCC unroll 4
        for (int s = 0; s < S; s++)
#pragma GCC unroll 4
            for (int u = 0; u < U; u++) {
                __m512bh v = (__m512bh)_mm512_loadu_si512(w[s] + k + 32 * u);
#pragma GCC unroll 4
                for (int t = 0; t < T; t++)
                    sum[s][t][u] = _mm512_dpbf16_ps(
                        sum[s][t][u], v, (__m512bh)_mm512_load_si512(x0 + t * x.stride + k + 32 * u));
            }
    for (; k < d.cols; k += 32) {
        __mmask32 keep = d.cols - k >= 32 ? 0xffffffffu : (1u << (d.cols - k)) - 1;
        for (int s = 0; s < S; s++) {
            __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(keep, w[s] + k);
            for (int t = 0; t < T; t++)
                sum[s][t][0] =
                    _mm512_dpbf16_ps(sum[s][t][0], v, (__m512bh)_mm512_load_si512(x0 + t * x.stride + k));
        }
    }
    for (int s = 0; s < S; s++)
        for (int t = 0; t < T; t++) {
            __m512 total = sum[s][t][0];
            for (int u = 1; u < U; u++) total = _mm512_add_ps(total, sum[s][t][u]);
            store(out, t, first + s * step, _mm512_reduce_add_ps(total));
        }
}

template <int S, int T>
void dense_range(const Dense& d, const Input& x, const Output& out, int64_t first, int64_t count, int64_t apart, int64_t t0) {
    Input part = {(const uint16_t*)x.data + t0 * x.stride, nullptr, T, x.stride, x.form};
    Output place = out;
    place.data = (uint8_t*)out.data + t0 * out.rows * value_size(out.kind);
    for (int64_t r = first; r < first + count; r++) dense_rows<S, T>(d, part, place, r, apart);
}

void dense(const Dense* d, const Input* x, const Output* out, int64_t from, int64_t to) {
    if (x->form != FORM_BF16) return F::dense(d, x, out, from, to);
    dense_in_halves(*d, x->tokens, from, to, [&](auto streams, auto tokens, int64_t first, int64_t count, int64_t t0) {
        dense_range<streams.value, tokens.value>(*d, *x, *out, first, count, (to - from) / 2, t0);
    });
}

using B = Between<Avx512>;
using R = Greedy<Avx512>;
using A = Admm<Avx512>;
const Kernels table = {"avx512vbmi2", form, prepare, packed, expand, dense, F::dense_transposed, F::stream, B::norm, B::swish, B::attend,
                       R::scratch, R::remove_half, A::right, A::update, A::support, Fitting<Avx512>::fit};

}  // namespace

extern "C" const Kernels* tawny_avx512vbmi2() { return &table; }
