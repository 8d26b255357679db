// One token of each of several sequences through all blocks of a decoder of the usual shape, in one call: what
// decoding/step.py fills in, and the walk. Included by dispatch.cpp, whose threads and scratch memory it uses.
//
//     x += Wo · attend(rotate(Wq n), rotate(Wk n), Wv n)   with n = norm(x)
//     x += Wdown · (swish(Wgate n) * (Wup n))              with n = norm(x)
//
// or, in a mixture, the second line for each of the experts that the router picks, times its share.
//
// Products that share an input share its conversion and one fork of the threads.
#pragma once
#include "generic.h"

#include <math.h>

namespace {

struct Product {  // y [rows] = W x + bias; `packed`, or else a dense weight of `kind`
    const Packed* packed;
    const void* weight;
    const float* bias;
    int64_t rows, cols;
    int32_t kind, unused;
};

struct Block {
    Product query, key, value, output, gate, up, down, router;
    const Product* experts;  // [experts, 2]: gate and up in one, and down; null where there is one `gate`, `up` and `down`
    const float *norm_attention, *norm_mlp, *norm_query, *norm_key;  // the last two may be null
    void *keys, *values;  // [places, capacity, kv_heads * dim] of the model's kind
};

struct Decoder {
    const Block* blocks;
    const float* norm;
    Product head;
    const float *cosine, *sine;  // [capacity, rotated]
    // [places, …] each: the residual stream, what products give, attention's scores, the logits.
    float *hidden, *wide, *narrow, *scores, *logits;
    float *routed, *shares, *mixed;  // of mixtures: [places, experts], [places, picked], and what all experts add up to
    int64_t* picks;                  // [places, picked]
    void *input, *gathered, *gated;  // what goes into products, of the model's kind
    int64_t count, width, heads, kv_heads, dim, rotated, inner, capacity, places, experts, picked, expert_inner;
    float eps, scale;
    int32_t kind, normalised;  // whether the shares of the picked experts add up to 1
};

struct Token {  // at `position` of the sequence that has this place
    int64_t place, position;
};

int32_t form_of(const Product& p, int32_t kind) {
    return chosen->form(p.packed ? p.packed->kind : p.kind, kind);
}

struct Jobs {
    Job jobs[3];
    int count;
};

void jobs_worker(void* all) {
    Jobs& jobs = *(Jobs*)all;
    for (int i = 0; i < jobs.count; i++) work(jobs.jobs[i], thread_number(), thread_count());
}

// Up to three products with one input [tokens, cols]; results are float32.
int32_t multiply(const Product* const* products, float* const* places, int count, const void* x, int32_t kind,
                 int64_t tokens, int32_t threads) {
    for (int first = 0; first < count;) {
        int32_t form = form_of(*products[first], kind);
        Input input;
        if (int32_t error = prepare(input, form, x, kind, tokens, products[first]->cols, threads)) return error;
        Dense dense[3];
        Output outputs[3];
        Jobs jobs = {{}, 0};
        int64_t bytes = 0;
        for (; first < count && form_of(*products[first], kind) == form; first++) {
            const Product& p = *products[first];
            int n = jobs.count++;
            outputs[n] = {places[first], p.bias, p.rows, F32};
            dense[n] = {p.weight, p.rows, p.cols, p.kind, 0};
            jobs.jobs[n] = {p.packed, p.packed ? nullptr : &dense[n], &input, &outputs[n], nullptr, 0, 0, 0,
                            p.packed ? p.packed->groups : p.rows, p.packed ? tile_bytes(*p.packed, form, tokens) : 0, 0};
            bytes += p.packed ? cost(*p.packed, p.packed->groups) : p.rows * p.cols * value_size(p.kind);
        }
        if (threads > 1 && gomp_parallel && bytes >= 32768) gomp_parallel(jobs_worker, &jobs, (unsigned)threads, 0);
        else
            for (int i = 0; i < jobs.count; i++) work(jobs.jobs[i], 0, 1);
        for (int i = 0; i < jobs.count; i++)
            if (jobs.jobs[i].failed) return 3;
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

struct Attentions {  // one a token, each of as many heads
    const Decoder* d;
    const Block* block;
    const Token* tokens;
    int64_t count;
};

void attend_part(const Attentions& all, int64_t part, int64_t parts) {
    const Decoder& d = *all.d;
    int64_t stored = d.kv_heads * d.dim, queries = d.heads * d.dim, size = value_size(d.kind);
    int64_t from = all.count * d.heads * part / parts, to = all.count * d.heads * (part + 1) / parts;
    for (int64_t t = from / d.heads; t * d.heads < to; t++) {
        int64_t past = all.tokens[t].place * d.capacity * stored * size;
        Attention a = {d.wide + t * queries,
                       (const uint8_t*)all.block->keys + past,
                       (const uint8_t*)all.block->values + past,
                       d.scores + t * d.heads * d.capacity,
                       (uint8_t*)d.input + t * queries * size,
                       d.heads, d.heads / d.kv_heads, d.dim, all.tokens[t].position + 1, stored, d.capacity, d.scale, d.kind};
        int64_t first = from > t * d.heads ? from - t * d.heads : 0;
        chosen->attend(&a, first, to - t * d.heads < d.heads ? to - t * d.heads : d.heads);
    }
}

void attention_worker(void* all) { attend_part(*(const Attentions*)all, thread_number(), thread_count()); }

void add(float* x, const float* y, int64_t count) {
    for (int64_t i = 0; i < count; i++) x[i] += y[i];
}

void norm_rows(const Decoder& d, const float* weight, int64_t count) {
    for (int64_t t = 0; t < count; t++)
        chosen->norm(d.hidden + t * d.width, weight, d.width, d.eps, (uint8_t*)d.input + t * d.width * value_size(d.kind), d.kind);
}

// The experts of one token, the likeliest first, and their shares: a softmax of logits that the model's kind holds.
void pick(const Decoder& d, float* logits, int64_t* picks, float* shares) {
    float highest = -INFINITY, total = 0.0f;
    for (int64_t e = 0; e < d.experts; e++) {
        keep(logits + e, 1, logits + e, d.kind, 0);
        logits[e] = load_float(logits + e, d.kind, 0);
        highest = logits[e] > highest ? logits[e] : highest;
    }
    for (int64_t e = 0; e < d.experts; e++) total += logits[e] = expf(logits[e] - highest);
    float sum = 0.0f;
    for (int64_t i = 0; i < d.picked; i++) {
        int64_t best = -1;  // never one that was picked, even among NaN: an expert has room for each token once
        for (int64_t e = 0; e < d.experts; e++)
            if (logits[e] != -1.0f && (best < 0 || logits[e] > logits[best])) best = e;
        picks[i] = best;
        sum += shares[i] = logits[best] / total;
        logits[best] = -1.0f;
    }
    for (int64_t i = 0; d.normalised && i < d.picked; i++) shares[i] /= sum;
}

// hidden += what the picked experts make of `input`; an expert that several tokens share is read once.
int32_t mixture(const Decoder& d, const Block& block, int64_t count, int32_t threads) {
    const Product* router[] = {&block.router};
    if (int32_t error = multiply(router, &d.routed, 1, d.input, d.kind, count, threads)) return error;
    for (int64_t t = 0; t < count; t++) pick(d, d.routed + t * d.experts, d.picks + t * d.picked, d.shares + t * d.picked);
    memset(d.mixed, 0, count * d.width * 4);
    int64_t row = d.width * value_size(d.kind);
    for (int64_t e = 0; e < d.experts; e++) {
        int64_t together = 0;
        float* place = d.routed;  // the shares of the tokens that picked this expert
        for (int64_t i = 0; i < count * d.picked; i++)
            if (d.picks[i] == e) {
                if (count > 1)
                    memcpy((uint8_t*)d.gathered + together * row, (const uint8_t*)d.input + i / d.picked * row, row);
                place[together++] = d.shares[i];
            }
        if (!together) continue;
        const Product *wide[] = {block.experts + 2 * e}, *down[] = {block.experts + 2 * e + 1};
        if (int32_t error = multiply(wide, &d.wide, 1, count > 1 ? d.gathered : d.input, d.kind, together, threads))
            return error;
        for (int64_t n = 0; n < together; n++) {
            const float* gate = d.wide + n * 2 * d.expert_inner;
            chosen->swish(gate, gate + d.expert_inner, d.expert_inner,
                          (uint8_t*)d.gated + n * d.expert_inner * value_size(d.kind), d.kind);
        }
        if (int32_t error = multiply(down, &d.narrow, 1, d.gated, d.kind, together, threads)) return error;
        for (int64_t i = 0, n = 0; i < count * d.picked; i++)
            if (d.picks[i] == e) {
                float *sum = d.mixed + i / d.picked * d.width, *y = d.narrow + n * d.width, share = place[n++];
                for (int64_t j = 0; j < d.width; j++) sum[j] += share * y[j];
            }
    }
    add(d.hidden, d.mixed, count * d.width);
    return 0;
}

// `count` tokens of as many sequences; the embedding of token t is hidden[t].
int32_t step(const Decoder& d, const Token* tokens, int64_t count, int32_t threads) {
    const int64_t queries = d.heads * d.dim, stored = d.kv_heads * d.dim, size = value_size(d.kind);
    for (int64_t b = 0; b < d.count; b++) {
        const Block& block = d.blocks[b];
        float *q = d.wide, *k = q + count * queries, *v = k + count * stored;
        norm_rows(d, block.norm_attention, count);
        const Product* into[] = {&block.query, &block.key, &block.value};
        float* places[] = {q, k, v};
        if (int32_t error = multiply(into, places, 3, d.input, d.kind, count, threads)) return error;
        norm_heads(q, count * d.heads, d.dim, block.norm_query, d.eps);
        norm_heads(k, count * d.kv_heads, d.dim, block.norm_key, d.eps);
        int64_t read = 0;
        for (int64_t t = 0; t < count; t++) {
            const float *cosine = d.cosine + tokens[t].position * d.rotated, *sine = d.sine + tokens[t].position * d.rotated;
            rotate(q + t * queries, d.heads, d.dim, d.rotated, cosine, sine);
            rotate(k + t * stored, d.kv_heads, d.dim, d.rotated, cosine, sine);
            int64_t at = (tokens[t].place * d.capacity + tokens[t].position) * stored;
            keep(k + t * stored, stored, block.keys, d.kind, at);
            keep(v + t * stored, stored, block.values, d.kind, at);
            read += 2 * (tokens[t].position + 1) * stored * size;
        }
        Attentions attentions = {&d, &block, tokens, count};
        if (threads > 1 && gomp_parallel && read >= 32768) gomp_parallel(attention_worker, &attentions, (unsigned)threads, 0);
        else attend_part(attentions, 0, 1);
        const Product* out[] = {&block.output};
        if (int32_t error = multiply(out, &d.narrow, 1, d.input, d.kind, count, threads)) return error;
        add(d.hidden, d.narrow, count * d.width);

        norm_rows(d, block.norm_mlp, count);
        if (block.experts) {
            if (int32_t error = mixture(d, block, count, threads)) return error;
            continue;
        }
        const Product* wide[] = {&block.gate, &block.up};
        float* two[] = {d.wide, d.wide + count * d.inner};
        if (int32_t error = multiply(wide, two, 2, d.input, d.kind, count, threads)) return error;
        chosen->swish(two[0], two[1], count * d.inner, d.input, d.kind);
        const Product* down[] = {&block.down};
        if (int32_t error = multiply(down, &d.narrow, 1, d.input, d.kind, count, threads)) return error;
        add(d.hidden, d.narrow, count * d.width);
    }
    norm_rows(d, d.norm, count);
    const Product* head[] = {&d.head};
    return multiply(head, &d.logits, 1, d.input, d.kind, count, threads);
}

}  // namespace
