// The kernel of last resort in C++: no instruction set beyond what the compiler assumes. Slow, and correct anywhere.
#include "admm.h"
#include "between.h"
#include "greedy.h"

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
};

using G = Generic<Portable>;
using B = Between<Portable>;
using R = Greedy<Portable>;
using A = Admm<Portable>;
const Kernels table = {"portable", G::form, G::prepare, G::packed, G::expand, G::dense, G::stream, B::norm, B::swish, B::attend,
                       R::scratch, R::remove_half, A::right, A::update, A::support};

}  // namespace

extern "C" const Kernels* tawny_portable() { return &table; }
