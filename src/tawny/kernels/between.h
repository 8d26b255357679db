// What a decoder block does between its matrix products, for one token: normalise, gate, attend. Written once over the
// vector type of generic.h, like the products. Hidden states are float32 here; what goes into a product, and the keys
// and values of the past, have the model's own kind.
#pragma once
#include "generic.h"

#include <math.h>

namespace {

// e^x to about two units in the last place, without a branch or a call, so that compilers make vectors of loops over it.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounded to an integer
    float rest = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
    float sum = 1.98756915e-4f;
    sum = sum * rest + 1.39819995e-3f;
    sum = sum * rest + 8.33345205e-3f;
    sum = sum * rest + 4.16657962e-2f;
    sum = sum * rest + 1.66666657e-1f;
    sum = sum * rest + 0.5f;
    sum = sum * rest * rest + rest + 1.0f;
    int32_t bits = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return sum * power;
}

inline void store_at(void* place, int32_t kind, int64_t i, float value) {
    if (kind == F32) ((float*)place)[i] = value;
    else ((uint16_t*)place)[i] = kind == BF16 ? float_to_bf16(value) : float_to_f16(value);
}

template <class I>
struct Between {
    using V = typename I::V;
    static constexpr int W = I::W;

    static void store_vector(void* place, int32_t kind, int64_t i, V v) {
        I::store_kind((uint8_t*)place + i * value_size(kind), kind, v);
    }

    // out = x / sqrt(mean(x²) + eps) * weight
    static void norm(const float* x, const float* weight, int64_t count, float eps, void* out, int32_t kind) {
        V sum[2] = {I::zero(), I::zero()};
        int64_t i = 0;
        for (; i + 2 * W <= count; i += 2 * W)
            for (int h = 0; h < 2; h++) sum[h] = I::fma(I::load(x + i + h * W), I::load(x + i + h * W), sum[h]);
        float total = I::reduce(sum[0]) + I::reduce(sum[1]);
        for (; i < count; i++) total += x[i] * x[i];
        float factor = 1.0f / sqrtf(total / (float)count + eps);
        V scale = I::broadcast(factor);
        for (i = 0; i + W <= count; i += W)
            store_vector(out, kind, i, I::mul(I::mul(I::load(x + i), scale), I::load(weight + i)));
        for (; i < count; i++) store_at(out, kind, i, x[i] * factor * weight[i]);
    }

    // out = gate * sigmoid(gate) * up
    static void swish(const float* gate, const float* up, int64_t count, void* out, int32_t kind) {
        for (int64_t i = 0; i < count; i += 64) {
            float buffer[64];
            int64_t n = count - i < 64 ? count - i : 64;
            for (int64_t j = 0; j < n; j++) buffer[j] = gate[i + j] / (1.0f + exponential(-gate[i + j])) * up[i + j];
            int64_t j = 0;
            for (; j + W <= n; j += W) store_vector(out, kind, i + j, I::load(buffer + j));
            for (; j < n; j++) store_at(out, kind, i + j, buffer[j]);
        }
    }

    // Query heads [from, to) over all past tokens.
    static void attend(const Attention* a, int64_t from, int64_t to) {
        int64_t size = value_size(a->kind);
        for (int64_t head = from; head < to; head++) {
            int64_t shared = head / a->share * a->dim;
            const uint8_t *keys = (const uint8_t*)a->keys + shared * size, *values = (const uint8_t*)a->values + shared * size;
            const float* q = a->query + head * a->dim;
            float *scores = a->scores + head * a->capacity, highest = -INFINITY, total = 0.0f;
            for (int64_t t = 0; t < a->tokens; t++) {
                const uint8_t* k = keys + t * a->stride * size;
                V sum = I::zero();
                int64_t i = 0;
                for (; i + W <= a->dim; i += W) sum = I::fma(I::load(q + i), I::load_kind(k, a->kind, i), sum);
                float score = I::reduce(sum);
                for (; i < a->dim; i++) score += q[i] * load_float(k, a->kind, i);
                scores[t] = score *= a->scale;
                highest = score > highest ? score : highest;
            }
            for (int64_t t = 0; t < a->tokens; t++) scores[t] = exponential(scores[t] - highest);
            for (int64_t t = 0; t < a->tokens; t++) total += scores[t];
            int64_t i = 0;
            for (; i + 4 * W <= a->dim; i += 4 * W) mix<4>(a, values, scores, total, head, i);
            for (; i + W <= a->dim; i += W) mix<1>(a, values, scores, total, head, i);
            for (; i < a->dim; i++) {
                float sum = 0.0f;
                for (int64_t t = 0; t < a->tokens; t++)
                    sum += scores[t] * load_float(values + t * a->stride * size, a->kind, i);
                store_at(a->out, a->kind, head * a->dim + i, sum / total);
            }
        }
    }

    template <int N>
    static void mix(const Attention* a, const uint8_t* values, const float* scores, float total, int64_t head, int64_t i) {
        V sum[N];
        for (int n = 0; n < N; n++) sum[n] = I::zero();
        int64_t step = a->stride * value_size(a->kind);
        for (int64_t t = 0; t < a->tokens; t++) {
            V share = I::broadcast(scores[t]);
            for (int n = 0; n < N; n++) sum[n] = I::fma(share, I::load_kind(values + t * step, a->kind, i + n * W), sum[n]);
        }
        V factor = I::broadcast(1.0f / total);
        for (int n = 0; n < N; n++) store_vector(a->out, a->kind, head * a->dim + i + n * W, I::mul(sum[n], factor));
    }
};

}  // namespace
