// One token through all blocks of a decoder of the usual shape, in one call: what decoding/step.py fills in, and the
// walk. Included by dispatch.cpp, whose threads and scratch memory it uses.
//
//     x += Wo · attend(rotate(Wq n), rotate(Wk n), Wv n)   with n = norm(x)
//     x += Wdown · (swish(Wgate n) * (Wup n))              with n = norm(x)
//
// Products that share an input share its conversion and one fork of the threads.
#pragma once
#include "generic.h"

namespace {

struct Product {  // y [rows] = W x + bias; `packed`, or else a dense weight of `kind`
    const Packed* packed;
    const void* weight;
    const float* bias;
    int64_t rows, cols;
    int32_t kind, unused;
};

struct Block {
    Product query, key, value, output, gate, up, down;
    const float *norm_attention, *norm_mlp, *norm_query, *norm_key;  // the last two may be null
    void *keys, *values;                                             // [capacity, kv_heads * dim] of the model's kind
};

struct Decoder {
    const Block* blocks;
    const float* norm;
    Product head;
    const float *cosine, *sine;  // [capacity, rotated]
    float *hidden, *wide, *narrow, *scores, *logits;
    void* input;  // of the model's kind
    int64_t count, width, heads, kv_heads, dim, rotated, inner, capacity;
    float eps, scale;
    int32_t kind, unused;
};

int32_t form_of(const Product& p, int32_t kind) {
    return chosen->form(p.packed ? p.packed->kind : p.kind, kind, 1, p.cols);
}

struct Jobs {
    Job jobs[3];
    int count;
};

void jobs_worker(void* all) {
    Jobs& jobs = *(Jobs*)all;
    for (int i = 0; i < jobs.count; i++) work(jobs.jobs[i], thread_number(), thread_count());
}

// Up to three products with one input; results are float32.
int32_t multiply(const Product* const* products, float* const* places, int count, const void* x, int32_t kind,
                 int32_t threads) {
    for (int first = 0; first < count;) {
        int32_t form = form_of(*products[first], kind);
        Input input;
        if (int32_t error = prepare(input, form, x, kind, 1, products[first]->cols)) return error;
        Dense dense[3];
        Output outputs[3];
        Jobs jobs = {{}, 0};
        int64_t bytes = 0;
        for (; first < count && form_of(*products[first], kind) == form; first++) {
            const Product& p = *products[first];
            int n = jobs.count++;
            outputs[n] = {places[first], p.bias, p.rows, F32};
            dense[n] = {p.weight, p.rows, p.cols, p.kind};
            jobs.jobs[n] = {p.packed, p.packed ? nullptr : &dense[n], &input, &outputs[n], nullptr, 0, 0, 0,
                            p.packed ? p.packed->groups : p.rows, 0, 0};
            bytes += p.packed ? cost(*p.packed, p.packed->groups) : p.rows * p.cols * value_size(p.kind);
        }
        if (threads > 1 && gomp_parallel && bytes >= 32768) gomp_parallel(jobs_worker, &jobs, (unsigned)threads, 0);
        else
            for (int i = 0; i < jobs.count; i++) work(jobs.jobs[i], 0, 1);
    }
    return 0;
}

// The first `rotated` of a head's dimensions, as pairs half of them apart.
void rotate(float* heads, int64_t count, int64_t dim, int64_t rotated, const float* cosine, const float* sine) {
    int64_t half = rotated / 2;
    for (int64_t h = 0; h < count; h++)
        for (int64_t i = 0; i < half; i++) {
            float low = heads[h * dim + i], high = heads[h * dim + i + half];
            heads[h * dim + i] = low * cosine[i] - high * sine[i];
            heads[h * dim + i + half] = high * cosine[i + half] + low * sine[i + half];
        }
}

void norm_heads(float* heads, int64_t count, int64_t dim, const float* weight, float eps) {
    for (int64_t h = 0; weight && h < count; h++) chosen->norm(heads + h * dim, weight, dim, eps, heads + h * dim, F32);
}

void keep(const float* from, int64_t count, void* place, int32_t kind, int64_t at) {
    Output out = {place, nullptr, INT64_MAX, kind};
    for (int64_t i = 0; i < count; i++) store(out, 0, at + i, from[i]);
}

void attention_worker(void* attention) {
    const Attention* a = (const Attention*)attention;
    int64_t part = thread_number(), parts = thread_count();
    chosen->attend(a, a->heads * part / parts, a->heads * (part + 1) / parts);
}

void add(float* x, const float* y, int64_t count) {
    for (int64_t i = 0; i < count; i++) x[i] += y[i];
}

int32_t step(const Decoder& d, int64_t position, int32_t threads) {
    const int64_t queries = d.heads * d.dim, stored = d.kv_heads * d.dim;
    const float *cosine = d.cosine + position * d.rotated, *sine = d.sine + position * d.rotated;
    for (int64_t b = 0; b < d.count; b++) {
        const Block& block = d.blocks[b];
        float *q = d.wide, *k = q + queries, *v = k + stored;
        chosen->norm(d.hidden, block.norm_attention, d.width, d.eps, d.input, d.kind);
        const Product* into[] = {&block.query, &block.key, &block.value};
        float* places[] = {q, k, v};
        if (int32_t error = multiply(into, places, 3, d.input, d.kind, threads)) return error;
        norm_heads(q, d.heads, d.dim, block.norm_query, d.eps);
        norm_heads(k, d.kv_heads, d.dim, block.norm_key, d.eps);
        rotate(q, d.heads, d.dim, d.rotated, cosine, sine);
        rotate(k, d.kv_heads, d.dim, d.rotated, cosine, sine);
        keep(k, stored, block.keys, d.kind, position * stored);
        keep(v, stored, block.values, d.kind, position * stored);
        Attention a = {q, block.keys, block.values, d.scores, d.input, d.heads, d.heads / d.kv_heads, d.dim, position + 1,
                       stored, d.capacity, d.scale, d.kind};
        int64_t read = 2 * a.tokens * stored * value_size(d.kind);
        if (threads > 1 && gomp_parallel && read >= 32768) gomp_parallel(attention_worker, &a, (unsigned)threads, 0);
        else chosen->attend(&a, 0, a.heads);
        const Product* out[] = {&block.output};
        if (int32_t error = multiply(out, &d.narrow, 1, d.input, d.kind, threads)) return error;
        add(d.hidden, d.narrow, d.width);

        chosen->norm(d.hidden, block.norm_mlp, d.width, d.eps, d.input, d.kind);
        const Product* wide[] = {&block.gate, &block.up};
        float* two[] = {d.wide, d.wide + d.inner};
        if (int32_t error = multiply(wide, two, 2, d.input, d.kind, threads)) return error;
        chosen->swish(two[0], two[1], d.inner, d.input, d.kind);
        const Product* down[] = {&block.down};
        if (int32_t error = multiply(down, &d.narrow, 1, d.input, d.kind, threads)) return error;
        add(d.hidden, d.narrow, d.width);
    }
    chosen->norm(d.hidden, d.norm, d.width, d.eps, d.input, d.kind);
    const Product* head[] = {&d.head};
    return multiply(head, &d.logits, 1, d.input, d.kind, threads);
}

}  // namespace
