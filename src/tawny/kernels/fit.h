// Weights to the levels of a grid (solvers/grid.py): for every group of columns the nearest levels by a given scale, the
// least-squares scale for these, and the squares that it saves. Plain loops over short arrays, which compilers make
// vectors of; sums have a lane for each eighth column, so that every instruction set adds in the same order.
#pragma once
#include "generic.h"

namespace {

// The nearest number without the last bits, of two as near the even one.
inline float held(float x, int32_t lost) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + ((bits >> lost & 1) + (1u << (lost - 1)) - 1)) >> lost << lost;
    memcpy(&x, &bits, sizeof bits);
    return x;
}

template <class I>
struct Fitting {
    static void fit(const Fit* p, int64_t from, int64_t to) {  // rows
        switch (p->count) {
            case 4: return fit_rows<4>(p, from, to);
            case 8: return fit_rows<8>(p, from, to);
            case 16: return fit_rows<16>(p, from, to);
            default: return fit_rows<0>(p, from, to);
        }
    }

    // N levels, or 0 for all integers between the first and the last.
    template <int N>
    static void fit_rows(const Fit* p, int64_t from, int64_t to) {
        constexpr int LANES = 8, PART = 64;
        const int64_t spans = (p->width + p->group - 1) / p->group;
        float level[N + 2], middle[N + 1];
        for (int k = 0; k < (N ? N : 2); k++) level[k] = p->levels[k];
        for (int k = 0; k + 1 < N; k++) middle[k] = (level[k] + level[k + 1]) / 2;
        for (int64_t row = from; row < to; row++)
            for (int64_t s = 0; s < spans; s++) {
                int64_t first = s * p->group, end = first + p->group < p->width ? first + p->group : p->width;
                float scale = p->scales[row * spans + s], by = scale == 0.0f ? 1.0f : 1.0f / scale;
                float along[LANES] = {}, square[LANES] = {};
                const float* x = p->values + row * p->width;
                float* made = p->made ? p->made + row * p->width : nullptr;
                for (int64_t at = first; at < end; at += PART) {
                    alignas(64) float value[PART] = {}, weight[PART] = {}, nearest[PART];
                    int64_t n = end - at < PART ? end - at : PART;
                    for (int64_t j = 0; j < n; j++) value[j] = x[at + j];
                    for (int64_t j = 0; j < n; j++) weight[j] = p->weights ? p->weights[at + j] : 1.0f;
                    if (p->keep) {
                        const uint8_t* keep = p->keep + row * p->width + at;
                        for (int64_t j = 0; j < n; j++) weight[j] = keep[j] ? weight[j] : 0.0f;
                    }
                    for (int j = 0; j < PART; j++) {
                        float ratio = value[j] * by, found;
                        if (N) {
                            found = level[0];
#pragma GCC unroll 16
                            for (int k = 0; k + 1 < N; k++) found = ratio >= middle[k] ? level[k + 1] : found;
                        } else {
                            // By way of an integer, because compilers make no vectors of floorf; a NaN becomes the first level.
                            found = ratio > level[0] ? ratio : level[0];
                            found = found < level[1] ? found : level[1];
                            found = level[0] + (float)(int32_t)(found - level[0] + 0.5f);
                        }
                        nearest[j] = found;
                    }
                    for (int j = 0; j < PART; j += LANES)
                        for (int l = 0; l < LANES; l++) {
                            float weighed = weight[j + l] * nearest[j + l];
                            along[l] += weighed * value[j + l];
                            square[l] += weighed * nearest[j + l];
                        }
                    if (made)
                        for (int64_t j = 0; j < n; j++)
                            made[at + j] = !p->keep || p->keep[row * p->width + at + j] ? nearest[j] : 0.0f;
                }
                float sum = 0.0f, squares = 0.0f;
                for (int l = 0; l < LANES; l++) sum += along[l], squares += square[l];
                float fitted = squares > 0.0f ? sum / squares : 0.0f;
                if (p->saved) p->saved[row * spans + s] = sum * fitted;
                if (!p->lost) fitted = scale;
                else if (made) fitted = held(fitted, p->lost);
                if (p->fitted) p->fitted[row * spans + s] = fitted;
                if (made)  // adding 0 mends what is −0
                    for (int64_t j = first; j < end; j++) made[j] = made[j] * fitted + 0.0f;
            }
    }
};

}  // namespace
