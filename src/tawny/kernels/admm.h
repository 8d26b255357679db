// What lies between ALPS's products (solvers/alps.py): elementwise passes over a weight, each read and written once.
// D is T where |T| is above a threshold and the weight was not zero to begin with, else 0. Written once over the vector
// type of generic.h; what is left of a last vector goes through the same code in a copy, so that where threads
// part the weights changes nothing.
#pragma once
#include "generic.h"

namespace {

template <class I>
struct Admm {
    using V = typename I::V;
    using M = typename I::M;
    static constexpr int W = I::W;
    static constexpr int64_t HELD = 256;

    static inline __attribute__((always_inline)) M kept(V values, V threshold, const uint8_t* zero) {
        M above = I::above(values, threshold);
        return zero ? I::without(above, I::set(zero)) : above;
    }

    // ρ(D − W) − before·(T − D): the right side of the product
    static void right(const Pass* p, int64_t from, int64_t to) {
        if (p->kind == BF16) right_as<BF16, uint16_t>(p, from, to);
        else right_as<F32, float>(p, from, to);
    }

    template <int KIND, class E>
    static void right_as(const Pass* p, int64_t from, int64_t to) {
        E* made = (E*)p->out;
        V threshold = I::broadcast(p->threshold);
        V rho = I::broadcast(p->rho), less = I::broadcast(-p->rho), gone = I::broadcast(-p->before);
        auto one = [&](const float* values, const float* weight, const uint8_t* zero, E* out)
            __attribute__((always_inline)) {
            V t = I::load(values);
            V share = I::select(kept(t, threshold, zero), rho, gone);
            I::store_kind(out, KIND, I::fma(share, t, I::mul(less, I::load(weight))));
        };
        int64_t i = from;
        for (; i + W <= to; i += W) one(p->values + i, p->weight + i, p->zero ? p->zero + i : nullptr, made + i);
        if (i == to) return;
        float values[W] = {}, weight[W] = {};
        E out[W];
        uint8_t zero[W] = {};
        size_t left = (size_t)(to - i);
        memcpy(values, p->values + i, left * 4);
        memcpy(weight, p->weight + i, left * 4);
        if (p->zero) memcpy(zero, p->zero + i, left);
        one(values, weight, zero, out);
        memcpy(made + i, out, left * sizeof(E));
    }

    // T ← W + S + (T − D)·before/ρ, and how the new |T| are spread: counts[0] of them are at most `low`, counts[1 + b] lie
    // between `low` and `high` in the bin b of 2^shift neighbouring floats. A weight that was zero counts as 0.
    static void update(const Pass* p, int64_t from, int64_t to, int64_t* counts) {
        if (p->kind == BF16) update_as<BF16, uint16_t>(p, from, to, counts);
        else update_as<F32, float>(p, from, to, counts);
    }

    template <int KIND, class E>
    static void update_as(const Pass* p, int64_t from, int64_t to, int64_t* counts) {
        float* made = (float*)p->out;
        const E* steps = (const E*)p->product;
        V threshold = I::broadcast(p->threshold), low = I::broadcast(p->low), high = I::broadcast(p->high);
        V ratio = I::broadcast(p->before / p->rho), none = I::zero();
        const int32_t first = float_bits(p->low) + 1;
        int64_t above = 0, held = 0;
        // Values between the bounds wait here: counted where they are met, each would be a branch foretold wrongly.
        float near[HELD + W];
        auto count = [&] {
            for (int64_t k = 0; k < held; k++)
                counts[1 + (((float_bits(near[k]) & 0x7fffffff) - first) >> p->shift)]++;
            held = 0;
        };
        auto one = [&](float* values, const float* weight, const E* step, const uint8_t* zero)
            __attribute__((always_inline)) {
            V t = I::load(values);
            V share = I::select(kept(t, threshold, zero), none, ratio);
            t = I::fma(share, t, I::add(I::load(weight), I::load_kind(step, KIND, 0)));
            I::store(values, t);
            M some = kept(t, low, zero);
            above += __builtin_popcount(I::bits(some));
            M between = I::without(some, I::above(t, high));
            I::gather(near + held, between, t);
            held += __builtin_popcount(I::bits(between));
            if (held >= HELD) count();
        };
        int64_t i = from;
        for (; i + W <= to; i += W) one(made + i, p->weight + i, steps + i, p->zero ? p->zero + i : nullptr);
        if (i < to) {
            float values[W] = {}, weight[W] = {};
            E step[W] = {};
            uint8_t zero[W] = {};
            size_t left = (size_t)(to - i);
            memcpy(values, made + i, left * 4);
            memcpy(weight, p->weight + i, left * 4);
            memcpy(step, steps + i, left * sizeof(E));
            if (p->zero) memcpy(zero, p->zero + i, left);
            one(values, weight, step, zero);  // the padding is 0, which is above nothing
            memcpy(made + i, values, left * 4);
        }
        count();
        counts[0] += to - from - above;
    }

    // The support of T takes the place of an earlier one; how many weights changed sides.
    static int64_t support(const Pass* p, int64_t from, int64_t to) {
        V threshold = I::broadcast(p->threshold);
        int64_t changed = 0;
        auto one = [&](const float* values, const uint8_t* zero, uint8_t* support) __attribute__((always_inline)) {
            M now = kept(I::load(values), threshold, zero);
            changed += __builtin_popcount(I::bits(now) ^ I::bits(I::set(support)));
            I::put(support, now);
        };
        int64_t i = from;
        for (; i + W <= to; i += W) one(p->values + i, p->zero ? p->zero + i : nullptr, p->support + i);
        if (i == to) return changed;
        float values[W] = {};
        uint8_t zero[W] = {}, support[W] = {};
        size_t left = (size_t)(to - i);
        memcpy(values, p->values + i, left * 4);
        memcpy(support, p->support + i, left);
        if (p->zero) memcpy(zero, p->zero + i, left);
        one(values, zero, support);
        memcpy(p->support + i, support, left);
        return changed;
    }
};

}  // namespace
