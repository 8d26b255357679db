// The kernel of last resort in C++: no instruction set beyond what the compiler assumes. Slow, and correct anywhere.
#include "admm.h"
#include "between.h"
#include "fit.h"
#include "greedy.h"
#include "integers.h"

namespace {

struct Portable {
    struct V { float f[8]; };
    using M = uint32_t;
    static constexpr int W = 8, registers = 16, streams = 1;

    static V zero() { return V{}; }
    static V broadcast(float value) {
        V v;
        for (float& f : v.f) f = value;
        return v;
    }
    static V load(const float* p) {
        V v;
        memcpy(v.f, p, sizeof v.f);
        return v;
    }
    static void store(float* p, V v) { memcpy(p, v.f, sizeof v.f); }
    static V load_kind(const void* data, int32_t kind, int64_t i) {
        V v;
        for (int j = 0; j < 8; j++) v.f[j] = load_float(data, kind, i + j);
        return v;
    }
    static void store_kind(void* place, int32_t kind, V v) {
        Output out = {place, nullptr, 8, kind};
        for (int j = 0; j < 8; j++) ::store(out, 0, j, v.f[j]);
    }
    static V fma(V a, V b, V c) {
        for (int j = 0; j < 8; j++) c.f[j] += a.f[j] * b.f[j];
        return c;
    }
    static V mul(V a, V b) {
        for (int j = 0; j < 8; j++) a.f[j] *= b.f[j];
        return a;
    }
    static V add(V a, V b) {
        for (int j = 0; j < 8; j++) a.f[j] += b.f[j];
        return a;
    }
    static V min(V a, V b) {
        for (int j = 0; j < 8; j++) a.f[j] = b.f[j] < a.f[j] ? b.f[j] : a.f[j];
        return a;
    }
    static V max(V a, V b) {
        for (int j = 0; j < 8; j++) a.f[j] = b.f[j] > a.f[j] ? b.f[j] : a.f[j];
        return a;
    }
    static float reduce_min(V v) {
        float least = v.f[0];
        for (float f : v.f) least = f < least ? f : least;
        return least;
    }
    static uint32_t equal(V a, V b) {
        uint32_t bits = 0;
        for (int j = 0; j < 8; j++) bits |= (uint32_t)(a.f[j] == b.f[j]) << j;
        return bits;
    }
    static M above(V v, V bound) {
        M bits = 0;
        for (int j = 0; j < 8; j++) bits |= (M)(__builtin_fabsf(v.f[j]) > bound.f[j]) << j;
        return bits;
    }
    static M without(M a, M b) { return a & ~b; }
    static V select(M mask, V a, V b) {
        for (int j = 0; j < 8; j++) a.f[j] = mask >> j & 1 ? a.f[j] : b.f[j];
        return a;
    }
    static uint32_t bits(M mask) { return mask; }
    static void gather(float* place, M mask, V v) {
        for (int j = 0; j < 8; j++) *place = v.f[j], place += mask >> j & 1;
    }
    static M set(const uint8_t* bytes) {
        M bits = 0;
        for (int j = 0; j < 8; j++) bits |= (M)(bytes[j] != 0) << j;
        return bits;
    }
    static void put(uint8_t* bytes, M mask) {
        for (int j = 0; j < 8; j++) bytes[j] = mask >> j & 1;
    }
    static float reduce(V v) {
        return ((v.f[0] + v.f[4]) + (v.f[2] + v.f[6])) + ((v.f[1] + v.f[5]) + (v.f[3] + v.f[7]));
    }
    static void store_four(const Output& out, int64_t token, int64_t group, const V* sums, const float* scales) {
        ::store_four<Portable>(out, token, group, sums, scales);
    }
    template <int KIND>
    static V expand(typename Trait<KIND>::Place values, uint32_t bits) {
        return expand_each<Portable, KIND>(values, bits);
    }

    // integers.h
    struct Bytes { int8_t b[16]; };
    struct Sums { int32_t i[8]; };
    static constexpr int bytes = 16;
    static constexpr float offset = 0.0f;

    static void prefetch(const void*) {}
    static Bytes either(Bytes a, Bytes b) {
        for (int j = 0; j < 16; j++) a.b[j] |= b.b[j];
        return a;
    }
    static Bytes add(Bytes a, Bytes b) {
        for (int j = 0; j < 16; j++) a.b[j] = (int8_t)(a.b[j] + b.b[j]);
        return a;
    }
    static Bytes same(int value) {
        Bytes all;
        memset(all.b, value, 16);
        return all;
    }
    static Bytes load_bytes(const int8_t* p) {
        Bytes v;
        memcpy(v.b, p, 16);
        return v;
    }
    static void store_bytes(int8_t* p, Bytes v) { memcpy(p, v.b, 16); }
    static Bytes table(const int8_t* levels) {
        Bytes all = {};
        if (levels) memcpy(all.b, levels, 16);
        return all;
    }
    static Bytes lookup(Bytes table, Bytes codes) {
        for (int8_t& code : codes.b) code = table.b[code];
        return codes;
    }
    template <int WIDTH, int AT, int PART>
    static Bytes plane(const uint8_t* p) {
        Bytes found;
        for (int j = 0; j < 16; j++) {
            int at = PART * 16 + j, bits = p[at % (8 * WIDTH)] >> (at / (8 * WIDTH) * WIDTH);
            found.b[j] = (int8_t)((bits & ((1 << WIDTH) - 1)) << AT);
        }
        return found;
    }
    static Bytes spread(const int8_t*& survivors, const uint8_t* mask) {
        Bytes found = {};
        for (uint32_t bits = mask[0] | mask[1] << 8; bits; bits &= bits - 1) found.b[__builtin_ctz(bits)] = *survivors++;
        return found;
    }
    using Words = Bytes;
    static constexpr int halves = 1;
    static Bytes words(Bytes v) { return v; }
    static const int16_t* load_words(const int16_t* p) { return p; }
    static void hold(const int16_t*) {}
    static Sums no_sums() { return {}; }
    static void multiply_add(Sums& sums, Bytes w, int, const int16_t* x) {
        for (int j = 0; j < 8; j++) sums.i[j] += w.b[2 * j] * x[2 * j] + w.b[2 * j + 1] * x[2 * j + 1];
    }
    static V floats(Sums sums) {
        V v;
        for (int j = 0; j < 8; j++) v.f[j] = (float)sums.i[j];
        return v;
    }
    static V widen(const int8_t* p) {
        V v;
        for (int j = 0; j < 8; j++) v.f[j] = (float)p[j];
        return v;
    }
    static void store_words(int16_t* place, const float* x) {
        for (int j = 0; j < 16; j++) place[j] = (int16_t)((x[j] + 12582912.0f) - 12582912.0f);  // rounded
    }
};

using G = Generic<Portable>;
using N = Both<Portable>;
using B = Between<Portable>;
using R = Greedy<Portable>;
using A = Admm<Portable>;
const Kernels table = {"portable", N::form, N::prepare, N::packed, N::expand, G::dense, G::dense_transposed, G::stream, B::norm, B::swish, B::attend,
                       R::scratch, R::remove_half, A::right, A::update, A::support, Fitting<Portable>::fit};

}  // namespace

extern "C" const Kernels* tawny_portable() { return &table; }
