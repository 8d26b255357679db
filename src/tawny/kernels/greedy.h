// LSA's greedy removal (allocation/lsa.py): half of a row's columns go, one after another, each the one that costs least
// just now. Written once over the vector type of generic.h. A row's costs are a few vectors that stay in the first-level
// cache; a removal is one pass over them that adds a row of the Hessian and finds the next minimum on the way.
#pragma once
#include "generic.h"

namespace {

template <class I>
struct Greedy {
    using V = typename I::V;
    static constexpr int W = I::W;
    static constexpr float GONE = 1e38f;  // above every cost, and finite: an infinity would become NaN in an update

    static int64_t padded(int64_t width) { return (width + W - 1) / W * W; }

    static int64_t scratch(const Removal* r) { return (r->width + 3) * padded(r->width) * 4; }

    static inline __attribute__((always_inline)) int64_t place(const float* costs, int64_t size, float least) {
        V wanted = I::broadcast(least);
        for (int64_t j = 0; j < size; j += W)
            if (uint32_t found = I::equal(I::load(costs + j), wanted)) return j + __builtin_ctz(found);
        return 0;  // only a NaN equals nothing
    }

    static void remove_half(const Removal* r, int64_t from, int64_t to, void* memory) {
        const int64_t width = r->width, size = padded(width);
        float *hessian = (float*)memory, *diagonal = hessian + width * size;
        float *costs = diagonal + size, *twice = costs + size;
        memset(memory, 0, (size_t)scratch(r));
        for (int64_t i = 0; i < width; i++) {
            memcpy(hessian + i * size, r->hessian + i * r->hessian_stride, (size_t)width * 4);
            diagonal[i] = hessian[i * size + i];
        }
        for (int64_t row = from; row < to; row++) {
            const float* w = r->weight + row * r->stride;
            const float* carried = r->carried + row * width;
            float* removed = r->removed + row * r->stride;
            float least = GONE;
            for (int64_t j = 0; j < width; j++) {
                costs[j] = w[j] * (w[j] * diagonal[j] + 2.0f * carried[j]);
                twice[j] = 2.0f * w[j];
                removed[j] = 0.0f;
                least = costs[j] < least ? costs[j] : least;
            }
            for (int64_t j = width; j < size; j++) costs[j] = GONE;
            double paid = 0.0;
            for (int64_t gone = 0; gone < width / 2; gone++) {
                int64_t at = place(costs, size, least);
                paid += costs[at];
                removed[at] = w[at];
                costs[at] = GONE;
                // cost_j += 2·w_i·w_j·H_ij for the weight i that has just left
                V left = I::broadcast(w[at]), lowest = I::broadcast(GONE);
                const float* row_of_hessian = hessian + at * size;
                for (int64_t j = 0; j < size; j += W) {
                    V cost = I::fma(I::mul(I::load(twice + j), left), I::load(row_of_hessian + j), I::load(costs + j));
                    I::store(costs + j, cost);
                    lowest = I::min(lowest, cost);
                }
                least = I::reduce_min(lowest);
            }
            r->paid[row] += paid;
        }
    }
};

}  // namespace
