// NEON as every 64-bit ARM has it. A vector is a pair of registers, so that 8 survivors at a time go through the same
// tables of byte shuffles as with AVX2. `make test-arm` runs it under emulation; no hardware has timed it yet.
#include "admm.h"
#include "between.h"
#include "fit.h"
#include "greedy.h"
#include "integers.h"
#include "tables.h"

#include <arm_neon.h>

namespace {

struct Neon {
    struct V { float32x4_t a, b; };
    struct M { uint32x4_t a, b; };
    static constexpr int W = 8, registers = 16, streams = 2;

    static V zero() { return broadcast(0.0f); }
    static V broadcast(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
    static V load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
    static void store(float* p, V v) { vst1q_f32(p, v.a), vst1q_f32(p + 4, v.b); }
    static V fma(V a, V b, V c) { return {vfmaq_f32(c.a, a.a, b.a), vfmaq_f32(c.b, a.b, b.b)}; }
    static V mul(V a, V b) { return {vmulq_f32(a.a, b.a), vmulq_f32(a.b, b.b)}; }
    static V add(V a, V b) { return {vaddq_f32(a.a, b.a), vaddq_f32(a.b, b.b)}; }
    static V min(V a, V b) { return {vminq_f32(a.a, b.a), vminq_f32(a.b, b.b)}; }
    static V max(V a, V b) { return {vmaxq_f32(a.a, b.a), vmaxq_f32(a.b, b.b)}; }
    static float reduce(V v) { return vaddvq_f32(vaddq_f32(v.a, v.b)); }
    static float reduce_min(V v) { return vminvq_f32(vminq_f32(v.a, v.b)); }
    static M above(V v, V bound) { return {vcagtq_f32(v.a, bound.a), vcagtq_f32(v.b, bound.b)}; }
    static M without(M a, M b) { return {vbicq_u32(a.a, b.a), vbicq_u32(a.b, b.b)}; }
    static V select(M mask, V a, V b) { return {vbslq_f32(mask.a, a.a, b.a), vbslq_f32(mask.b, a.b, b.b)}; }
    static uint32_t bits(M mask) {
        const uint32x4_t low = {1, 2, 4, 8}, high = {16, 32, 64, 128};
        return vaddvq_u32(vorrq_u32(vandq_u32(mask.a, low), vandq_u32(mask.b, high)));
    }
    static uint32_t equal(V a, V b) { return bits({vceqq_f32(a.a, b.a), vceqq_f32(a.b, b.b)}); }
    static void gather(float* place, M mask, V v) {
        uint32_t left = bits(mask);
        if (!left) return;
        float all[8];
        store(all, v);
        for (int j = 0; j < 8; j++) *place = all[j], place += left >> j & 1;
    }
    static M set(const uint8_t* bytes) {
        uint16x8_t wide = vmovl_u8(vld1_u8(bytes));
        return {vcgtzq_s32(vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)))),
                vcgtzq_s32(vreinterpretq_s32_u32(vmovl_high_u16(wide)))};
    }
    static void put(uint8_t* bytes, M mask) {
        uint16x8_t words = vcombine_u16(vmovn_u32(mask.a), vmovn_u32(mask.b));
        vst1_u8(bytes, vand_u8(vmovn_u16(words), vdup_n_u8(1)));
    }
    static V widen_half(uint16x8_t half, int32_t kind) {
        if (kind == BF16)
            return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(half), 16)),
                    vreinterpretq_f32_u32(vshll_high_n_u16(half, 16))};
        float16x8_t floats = vreinterpretq_f16_u16(half);
        return {vcvt_f32_f16(vget_low_f16(floats)), vcvt_high_f32_f16(floats)};
    }
    static V load_kind(const void* data, int32_t kind, int64_t i) {
        return kind == F32 ? load((const float*)data + i) : widen_half(vld1q_u16((const uint16_t*)data + i), kind);
    }
    static uint16x4_t narrow_bf16(float32x4_t v) {
        uint32x4_t raw = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(raw, 16), vdupq_n_u32(1));
        uint32x4_t rounded = vaddq_u32(vaddq_u32(raw, vdupq_n_u32(0x7fff)), odd);
        return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, vorrq_u32(raw, vdupq_n_u32(0x400000))), 16);
    }
    static void store_kind(void* place, int32_t kind, V v) {
        if (kind == F32) return store((float*)place, v);
        uint16x8_t half = kind == BF16 ? vcombine_u16(narrow_bf16(v.a), narrow_bf16(v.b))
                                       : vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(v.a), v.b));
        vst1q_u16((uint16_t*)place, half);
    }
    static void store_four(const Output& out, int64_t token, int64_t group, const V* sums, const float* scales) {
        ::store_four<Neon>(out, token, group, sums, scales);
    }
    template <int KIND>
    static inline __attribute__((always_inline)) V expand(typename Trait<KIND>::Place values, uint32_t bits) {
        if constexpr (KIND == F32) {  // a float is two words: `twice` doubles each of four bits
            static constexpr uint8_t twice[16] = {0, 3, 12, 15, 48, 51, 60, 63, 192, 195, 204, 207, 240, 243, 252, 255};
            uint32_t low = bits & 15;
            const uint8_t* next = values.at + 4 * __builtin_popcount(low);
            return {vreinterpretq_f32_u8(vqtbl1q_u8(vld1q_u8(values.at), vld1q_u8(tables.words[twice[low]]))),
                    vreinterpretq_f32_u8(vqtbl1q_u8(vld1q_u8(next), vld1q_u8(tables.words[twice[bits >> 4]])))};
        } else {
            return widen_half(vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(values.at), vld1q_u8(tables.words[bits]))), KIND);
        }
    }

    // -------------------------------------------------------------------------------------- integers.h

    using Bytes = int8x16_t;
    struct Sums { int32x4_t a, b; };
    static constexpr int bytes = 16;
    static constexpr float offset = 0.0f;

    static void prefetch(const void* p) { __builtin_prefetch(p); }
    static Bytes either(Bytes a, Bytes b) { return vorrq_s8(a, b); }
    static Bytes add(Bytes a, Bytes b) { return vaddq_s8(a, b); }
    static Bytes same(int value) { return vdupq_n_s8((int8_t)value); }
    static Bytes load_bytes(const int8_t* p) { return vld1q_s8(p); }
    static void store_bytes(int8_t* p, Bytes v) { vst1q_s8(p, v); }
    static Bytes table(const int8_t* levels) { return levels ? vld1q_s8(levels) : vdupq_n_s8(0); }
    static Bytes lookup(Bytes table, Bytes codes) { return vqtbl1q_s8(table, vreinterpretq_u8_s8(codes)); }
    // Columns [16 PART, 16 PART + 16) of a plane of WIDTH bits, its lowest bit at bit AT of each byte.
    template <int WIDTH, int AT, int PART>
    static inline __attribute__((always_inline)) Bytes plane(const uint8_t* p) {
        constexpr int down = PART * 16 / (8 * WIDTH) * WIDTH - AT;
        int8x16_t shift = vdupq_n_s8(-down);
        uint8x16_t all;
        if constexpr (WIDTH == 1) {
            all = vcombine_u8(vld1_u8(p), vld1_u8(p));
            shift = vcombine_s8(vget_low_s8(shift), vdup_n_s8(-down - 1));
        } else {
            all = vld1q_u8(p + PART * 16 % (8 * WIDTH));
        }
        return vreinterpretq_s8_u8(vandq_u8(vshlq_u8(all, shift), vdupq_n_u8(((1 << WIDTH) - 1) << AT)));
    }
    // Survivors of 16 columns at their places; moves past them.
    static inline __attribute__((always_inline)) Bytes spread(const int8_t*& survivors, const uint8_t* mask) {
        uint32_t before = (uint32_t)__builtin_popcount(mask[0]);
        uint8x8_t high = vadd_u8(vld1_u8(tables.bytes[mask[1]]), vdup_n_u8((uint8_t)before));
        Bytes found = vqtbl1q_s8(vld1q_s8(survivors), vcombine_u8(vld1_u8(tables.bytes[mask[0]]), high));
        survivors += before + (uint32_t)__builtin_popcount(mask[1]);
        return found;
    }

    static constexpr int halves = 2;  // of a part: its first 8 columns, then the others
    struct Words { int16x8_t half[2]; };
    static Words words(Bytes all) { return {{vmovl_s8(vget_low_s8(all)), vmovl_high_s8(all)}}; }
    static int16x8_t load_words(const int16_t* p) { return vld1q_s16(p); }
    static void hold(int16x8_t& words) { asm("" : "+w"(words)); }
    static Sums no_sums() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
    static inline __attribute__((always_inline)) void multiply_add(Sums& sums, Words w, int half, int16x8_t x) {
        sums.a = vmlal_s16(sums.a, vget_low_s16(w.half[half]), vget_low_s16(x));
        sums.b = vmlal_high_s16(sums.b, w.half[half], x);
    }
    static V floats(Sums sums) { return {vcvtq_f32_s32(sums.a), vcvtq_f32_s32(sums.b)}; }
    static V widen(const int8_t* p) {
        int16x8_t wide = vmovl_s8(vld1_s8(p));
        return floats({vmovl_s16(vget_low_s16(wide)), vmovl_high_s16(wide)});
    }
    static void store_words(int16_t* place, const float* x) {
        for (int j = 0; j < 16; j += 8) {
            int16x4_t low = vmovn_s32(vcvtnq_s32_f32(vld1q_f32(x + j)));
            vst1q_s16(place + j, vmovn_high_s32(low, vcvtnq_s32_f32(vld1q_f32(x + j + 4))));
        }
    }
};

using G = Generic<Neon>;
using N = Both<Neon>;
using B = Between<Neon>;
using R = Greedy<Neon>;
using A = Admm<Neon>;
const Kernels table = {"neon", N::form, N::prepare, N::packed, N::expand, G::dense, G::dense_transposed, G::stream, B::norm, B::swish, B::attend,
                       R::scratch, R::remove_half, A::right, A::update, A::support, Fitting<Neon>::fit};

}  // namespace

extern "C" const Kernels* tawny_neon() { return &table; }
