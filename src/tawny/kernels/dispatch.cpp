// The C ABI that Python calls: choose a kernel table, prepare activations, split the work over threads.
//
// Threads are torch's. This library links no OpenMP runtime; Python hands over GOMP_parallel of the one torch loaded
// (a second runtime means a second pool of spinning threads, and two-thread timings fall apart). Without it, or for
// work too small to share, everything runs in the calling thread.
#include "generic.h"

#include <stdlib.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

// ---------------------------------------------------------------------------------------------- CPU features

#if defined(__x86_64__)
uint64_t enabled_state() {  // XCR0: which registers the operating system saves
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return 0;
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
}
#endif

// bit i: table i of `choose` can run here
int32_t supported() {
    int32_t found = 1;
#if defined(__x86_64__)
    uint32_t a, b, c, d, a7, b7, c7, d7;
    uint64_t state = enabled_state();
    if (!__get_cpuid(1, &a, &b, &c, &d) || !__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7)) return found;
    bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6;
    bool fma = c & (1u << 12), f16c = c & (1u << 29), avx = c & (1u << 28), avx2 = b7 & (1u << 5);
    bool popcnt = c & (1u << 23), bmi2 = b7 & (1u << 8);
    if (!(ymm && avx && avx2 && fma && f16c && popcnt && bmi2)) return found;
    found |= 2;
    uint32_t a71 = 0, b71, c71, d71;
    if (a7 >= 1) __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71);
#if defined(HAVE_AVXVNNI)
    if (a71 & (1u << 4)) found |= 4;
#endif
    if (!(zmm && (b7 & (1u << 16)))) return found;  // F
    found |= 8;
    bool dq = b7 & (1u << 17), bw = b7 & (1u << 30), vl = b7 & (1u << 31);
    bool vbmi2 = c7 & (1u << 6), vnni = c7 & (1u << 11);
    if (!(dq && bw && vl && vbmi2 && vnni)) return found;
    found |= 16;
    if (a71 & (1u << 5)) found |= 32;  // BF16
#elif defined(__aarch64__)
    found |= 64;  // there is none without NEON
#endif
    return found;
}

const Kernels* choose(int32_t level) {
    switch (level) {
        case 0: return tawny_portable();
#if defined(__x86_64__)
        case 1: return tawny_avx2();
#if defined(HAVE_AVXVNNI)
        case 2: return tawny_avxvnni();
#endif
        case 3: return tawny_avx512f();
        case 4: return tawny_avx512vnni();
        case 5: return tawny_avx512vbmi2();
#elif defined(__aarch64__)
        case 6: return tawny_neon();
#endif
        default: return nullptr;
    }
}

const Kernels* chosen = nullptr;

// ---------------------------------------------------------------------------------------------- threads and scratch

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Count = int (*)();
Parallel gomp_parallel = nullptr;
Count thread_number = nullptr, thread_count = nullptr;

struct Scratch {  // one a thread, grows and stays
    void* data = nullptr;
    size_t size = 0;
    void* get(size_t wanted) {
        if (wanted > size) {
            free(data);
            size = (wanted + 4095) / 4096 * 4096;
            data = aligned_alloc(64, size);
            if (!data) size = 0;
        }
        return data;
    }
    ~Scratch() { free(data); }
};
thread_local Scratch activations, tiles;

struct Job {
    const Packed* packed;
    const Dense* dense;
    const Input* input;
    const Output* output;
    void* place;  // expand
    int32_t kind;
    int64_t stride, from, to;
    size_t tile;
    int32_t failed;
};

// Bytes of groups [0, g): what the split balances, because bytes are what decoding costs.
int64_t cost(const Packed& p, int64_t g) {
    return (p.masks ? g * p.blocks * 32 : 0) + stored_bytes(p.kind, start_of(p, g));
}

int64_t boundary(const Job& job, int part, int parts) {
    if (part <= 0) return job.from;
    if (part >= parts) return job.to;
    if (job.dense) {
        int64_t at = job.from + (job.to - job.from) * part / parts;
        return job.dense->transposed ? at / 64 * 64 : at;  // whole vectors of neighbours
    }
    int64_t start = cost(*job.packed, job.from), end = cost(*job.packed, job.to);
    int64_t wanted = start + (end - start) / parts * part, low = job.from, high = job.to;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (cost(*job.packed, middle) < wanted) low = middle + 1;
        else high = middle;
    }
    return low;
}

void work(Job& job, int part, int parts) {
    int64_t from = boundary(job, part, parts), to = boundary(job, part + 1, parts);
    if (from >= to) return;
    if (job.place) {
        uint8_t* place = (uint8_t*)job.place + (from - job.from) * 4 * job.stride * value_size(job.kind);
        return chosen->expand(job.packed, from, to, place, job.kind, job.stride);
    }
    void* tile = job.tile ? tiles.get(job.tile) : nullptr;
    if (job.tile && !tile) {
        job.failed = 1;
        return;
    }
    if (!job.dense) chosen->packed(job.packed, job.input, job.output, from, to, tile);
    else if (job.dense->transposed) chosen->dense_transposed(job.dense, job.input, job.output, from, to, tile);
    else chosen->dense(job.dense, job.input, job.output, from, to);
}

void worker(void* job) { work(*(Job*)job, thread_number(), thread_count()); }

int32_t run(Job& job, int64_t bytes, int32_t threads) {
    if (threads > 1 && gomp_parallel && bytes >= 32768) gomp_parallel(worker, &job, (unsigned)threads, 0);
    else work(job, 0, 1);
    return job.failed ? 3 : 0;
}

struct Preparation {
    int32_t form, kind;
    const void* x;
    int64_t tokens, cols;
    uint8_t* data;
    float* scales;
};

// A part has two tokens or more, for one alone may be in another order; so the last takes what remains.
void prepare_part(const Preparation& p, int part, int parts) {
    int64_t count = p.tokens / TOKENS_TOGETHER, size = p.form == FORM_F32 ? 4 : 2, padded = (p.cols + 63) / 64 * 64;
    int64_t from = count * part / parts * TOKENS_TOGETHER, to = count * (part + 1) / parts * TOKENS_TOGETHER;
    if (part + 1 == parts) to = p.tokens;
    if (from < to)
        chosen->prepare(p.form, (const uint8_t*)p.x + from * p.cols * value_size(p.kind), p.kind, to - from, p.cols,
                        p.data + from * padded * size, p.scales + from);
}

void prepare_worker(void* all) { prepare_part(*(const Preparation*)all, thread_number(), thread_count()); }

// Activations as the kernel wants them: as they are when they already fit, else converted into scratch memory.
int32_t prepare(Input& input, int32_t form, const void* x, int32_t kind, int64_t tokens, int64_t cols, int32_t threads) {
    int64_t padded = (cols + 63) / 64 * 64;
    input = {x, nullptr, tokens, padded, form};
    bool same = (form == FORM_F32 && kind == F32) || (form == FORM_BF16 && kind == BF16);
    if (same && padded == cols && (uintptr_t)x % 64 == 0) return 0;
    size_t scales = (tokens * 4 + 63) / 64 * 64;
    uint8_t* data = (uint8_t*)activations.get(scales + tokens * padded * (form == FORM_F32 ? 4 : 2));
    if (!data) return 3;
    Preparation all = {form, kind, x, tokens, cols, data + scales, (float*)data};
    if (threads > 1 && gomp_parallel && tokens >= 2 * TOKENS_TOGETHER) gomp_parallel(prepare_worker, &all, (unsigned)threads, 0);
    else prepare_part(all, 0, 1);
    input.data = data + scales;
    input.scales = (const float*)data;
    return 0;
}

// Scratch memory of a thread that expands groups of rows before it multiplies them.
size_t tile_bytes(const Packed& p, int32_t form, int64_t tokens) {
    int64_t size = form == FORM_F32 ? 4 : 2;
    return tokens > 2 && form != FORM_I16 ? (size_t)(tile_groups(p.blocks, size) * p.blocks * 64 * 4 * size) : 0;
}

struct StreamJob {
    const float* data;
    int64_t count;
    float total[64];
};

void stream_part(StreamJob& job, int part, int parts) {
    int64_t share = job.count / parts;
    job.total[part % 64] = chosen->stream(job.data + part * share, share);
}

void stream_worker(void* job) { stream_part(*(StreamJob*)job, thread_number(), thread_count()); }

struct RemovalJob {
    const Removal* removal;
    int32_t failed;
};

void removal_part(RemovalJob& job, int part, int parts) {
    const Removal& r = *job.removal;
    int64_t from = r.rows * part / parts, to = r.rows * (part + 1) / parts;
    if (from >= to) return;
    void* scratch = tiles.get((size_t)chosen->removal_scratch(&r));
    if (scratch) chosen->remove_half(&r, from, to, scratch);
    else job.failed = 1;
}

void removal_worker(void* job) { removal_part(*(RemovalJob*)job, thread_number(), thread_count()); }

struct PassJob {
    const Pass* pass;
    int32_t which;    // 0 right, 1 update, 2 support
    int64_t* counts;  // update: [threads, row]
    int64_t row, changed;
};

void pass_part(PassJob& job, int part, int parts) {
    const Pass& p = *job.pass;
    int64_t lines = (p.count + 63) / 64;
    int64_t from = lines * part / parts * 64, to = lines * (part + 1) / parts * 64;
    if (to > p.count) to = p.count;
    if (from >= to) return;
    if (job.which == 0) chosen->admm_right(&p, from, to);
    else if (job.which == 1) chosen->admm_update(&p, from, to, job.counts + part * job.row);
    else __atomic_fetch_add(&job.changed, chosen->admm_support(&p, from, to), __ATOMIC_RELAXED);
}

void pass_worker(void* job) { pass_part(*(PassJob*)job, thread_number(), thread_count()); }

void run_pass(PassJob& job, int32_t threads) {
    if (threads > 1 && gomp_parallel) gomp_parallel(pass_worker, &job, (unsigned)threads, 0);
    else pass_part(job, 0, 1);
}

struct FitJob {
    const Fit* fit;
    int64_t rows;
};

void fit_worker(void* given) {
    const FitJob& job = *(const FitJob*)given;
    int64_t part = thread_number(), parts = thread_count();
    chosen->fit(job.fit, job.rows * part / parts, job.rows * (part + 1) / parts);
}

bool valid(const Packed& p) {
    if (p.rows <= 0 || p.cols <= 0 || p.kind < 0 || p.kind >= KINDS || !p.values || !p.masks != !p.offsets) return false;
    bool scaled = with_kind(p.kind, [](auto trait) { return trait.scaled; });
    if (!scaled) return p.masks && !p.scales && !p.exponents && p.span == 0;
    bool span = p.span == 32 || p.span == 64 || p.span == 128 || (p.span == 0 && p.kind == INT8);
    return span && p.scales && p.sums && (p.span || !p.exponents);
}

Packed describe(const void* masks, const void* values, const void* offsets, const void* scales, const void* exponents,
                const void* sums, int64_t rows, int64_t cols, int32_t kind, int32_t span) {
    return {(const uint64_t*)masks, values, (const int64_t*)offsets, scales, (const uint8_t*)exponents, (const float*)sums, rows, cols,
            (rows + 3) / 4, (cols + 63) / 64, kind, span};
}

}  // namespace

#include "step.h"

#pragma GCC visibility push(default)

// Every function that computes returns 0, or 1: no kernel chosen, 2: an argument out of range, 3: out of memory.
extern "C" {

int32_t tawny_abi() { return 12; }

// Bits of a survivor of this kind, times -1 where it is an integer with a scale; 0 for a kind that there is none of.
int32_t tawny_kind_bits(int32_t kind) {
    if (kind < 0 || kind >= KINDS) return 0;
    return with_kind(kind, [](auto trait) { return trait.scaled ? -trait.bits : trait.bits; });
}

// What a code of few bits stands for; 0 for any other kind.
int32_t tawny_level(int32_t kind, int32_t code) {
    if (kind < 0 || kind >= KINDS) return 0;
    return with_kind(kind, [code](auto trait) {
        if constexpr (trait.bits < 8) return code < 0 || code >> trait.bits ? 0 : level<trait.kind>(code);
        else return 0;
    });
}

int32_t tawny_supported() { return supported(); }

int32_t tawny_choose(int32_t level) {
    if (level < 0 || level > 30 || !(supported() >> level & 1)) return 1;
    chosen = choose(level);
    return chosen ? 0 : 1;
}

void tawny_set_openmp(void* parallel, void* number, void* count) {
    gomp_parallel = parallel && number && count ? (Parallel)parallel : nullptr;
    thread_number = (Count)number;
    thread_count = (Count)count;
}

// y [tokens, rows] = x [tokens, cols] Wᵀ + bias; x, y and bias are contiguous and of one kind.
int32_t tawny_packed_at(const Packed* p, const void* x, const void* bias, void* y, int32_t xkind, int64_t tokens,
                        int32_t threads) {
    if (!chosen) return 1;
    if (!valid(*p) || xkind < F32 || xkind > F16 || tokens < 0) return 2;
    if (tokens == 0) return 0;
    Input input;
    int32_t form = chosen->form(p->kind, xkind);
    for (constexpr int64_t most = 512; form == FORM_I16 && tokens > most; tokens -= most) {  // scratch memory stays
        if (int32_t error = tawny_packed_at(p, x, bias, y, xkind, most, threads)) return error;
        x = (const uint8_t*)x + most * p->cols * value_size(xkind);
        y = (uint8_t*)y + most * p->rows * value_size(xkind);
    }
    if (int32_t error = prepare(input, form, x, xkind, tokens, p->cols, threads)) return error;
    Output output = {y, bias, p->rows, xkind};
    Job job = {p, nullptr, &input, &output, nullptr, 0, 0, 0, p->groups, 0, 0};
    job.tile = tile_bytes(*p, form, tokens);
    return run(job, cost(*p, p->groups), threads);
}

// Fill a `Packed`, so that a caller can keep it; `out` has room for `tawny_describe(nullptr, …)` bytes.
int32_t tawny_describe(Packed* out, const void* masks, const void* values, const void* offsets, const void* scales,
                       const void* exponents, const void* sums, int64_t rows, int64_t cols, int32_t kind, int32_t span) {
    if (out) *out = describe(masks, values, offsets, scales, exponents, sums, rows, cols, kind, span);
    return (int32_t)sizeof(Packed);
}

// Rows [4 * from, min(4 * to, rows)) written out densely, in float32, bfloat16 or float16.
int32_t tawny_expand(const void* masks, const void* values, const void* offsets, const void* scales, const void* exponents,
                     const void* sums, int64_t rows, int64_t cols, int32_t kind, int32_t span, int64_t from, int64_t to, void* out,
                     int32_t okind, int64_t stride, int32_t threads) {
    if (!chosen) return 1;
    Packed p = describe(masks, values, offsets, scales, exponents, sums, rows, cols, kind, span);
    if (!valid(p) || okind < F32 || okind > F16 || from < 0 || to > p.groups || stride < cols) return 2;
    Job job = {&p, nullptr, nullptr, nullptr, out, okind, stride, from, to, 0, 0};
    if (from >= to) return 0;
    return run(job, cost(p, to) - cost(p, from), threads);
}

// The same product with a dense weight [rows, cols], or [cols, rows] if `transposed`: float32, bfloat16 or float16.
int32_t tawny_dense(const void* weight, int64_t rows, int64_t cols, int32_t kind, int32_t transposed, const void* x,
                    const void* bias, void* y, int32_t xkind, int64_t tokens, int32_t threads) {
    if (!chosen) return 1;
    if (rows <= 0 || cols <= 0 || kind < F32 || kind > F16 || xkind < F32 || xkind > F16 || tokens < 0) return 2;
    if (tokens == 0) return 0;
    Dense d = {weight, rows, cols, kind, transposed};
    int32_t form = transposed ? FORM_F32 : chosen->form(kind, xkind);
    Input input;
    if (int32_t error = prepare(input, form, x, xkind, tokens, cols, threads)) return error;
    Output output = {y, bias, rows, xkind};
    Job job = {nullptr, &d, &input, &output, nullptr, 0, 0, 0, rows, transposed ? (size_t)(tokens * rows * 4) : 0, 0};
    return run(job, rows * cols * value_size(kind), threads);
}

// Half of the columns of each row of a group removed greedily; what each row paid is added to `paid`.
int32_t tawny_remove_half(const float* weight, const float* hessian, const float* carried, float* removed,
                          double* paid, int64_t rows, int64_t width, int64_t stride, int64_t hessian_stride,
                          int32_t threads) {
    if (!chosen) return 1;
    if (rows < 0 || width <= 0 || stride < width || hessian_stride < width) return 2;
    Removal r = {weight, hessian, carried, removed, paid, rows, width, stride, hessian_stride};
    RemovalJob job = {&r, 0};
    if (threads > 1 && gomp_parallel && rows >= 8 * threads) gomp_parallel(removal_worker, &job, (unsigned)threads, 0);
    else removal_part(job, 0, 1);
    return job.failed ? 3 : 0;
}

// What ALPS does between its products, over `count` weights. D is T where |T| > threshold and not `zero` (null: none is).
// right = ρ(D − W) − before·(T − D), in the kind F32 or BF16
int32_t tawny_admm_right(const float* values, const float* weight, const uint8_t* zero, void* right, int32_t kind,
                         int64_t count, float threshold, float rho, float before, int32_t threads) {
    if (!chosen) return 1;
    if (count < 0 || (kind != F32 && kind != BF16)) return 2;
    Pass p = {values, weight, nullptr, right, zero, nullptr, count, threshold, rho, before, 0.0f, 0.0f, 0, kind};
    PassJob job = {&p, 0, nullptr, 0, 0};
    run_pass(job, threads);
    return 0;
}

// T ← W + S + (T − D)·before/ρ, S in the kind F32 or BF16. Added to `counts` [threads, 1 + bins]: how many |T| (0 for a weight that is `zero`) are at
// most `low`, and how many above it and at most `high`, in bins of 2^shift neighbouring floats.
int32_t tawny_admm_update(float* values, const float* weight, const void* step, const uint8_t* zero, int32_t kind,
                          int64_t count, float threshold, float rho, float before, float low, float high,
                          int32_t shift, int64_t* counts, int64_t bins, int32_t threads) {
    if (!chosen) return 1;
    if (kind != F32 && kind != BF16) return 2;
    if (count < 0 || threads < 1 || bins < 1 || shift < 0 || shift > 31 || !(low >= 0.0f && low <= high)) return 2;
    if (low < high && ((float_bits(high) - float_bits(low) - 1) >> shift) >= bins) return 2;
    Pass p = {nullptr, weight, step, values, zero, nullptr, count, threshold, rho, before, low, high, shift, kind};
    PassJob job = {&p, 1, counts, 1 + bins, 0};
    run_pass(job, threads);
    return 0;
}

// The support of T takes the place of an earlier one; `changed` is how many weights changed sides.
int32_t tawny_admm_support(const float* values, const uint8_t* zero, uint8_t* support, int64_t count, float threshold,
                           int64_t* changed, int32_t threads) {
    if (!chosen) return 1;
    if (count < 0) return 2;
    Pass p = {values, nullptr, nullptr, nullptr, zero, support, count, threshold, 0.0f, 0.0f, 0.0f, 0.0f, 0, F32};
    PassJob job = {&p, 2, nullptr, 0, 0};
    run_pass(job, threads);
    *changed = job.changed;
    return 0;
}

// For every group of columns of `values` [rows, width] the levels nearest by `scales`, and the scales that fit them best (see Fit).
int32_t tawny_fit(const float* values, const float* weights, const uint8_t* keep, const float* levels, int32_t count,
                  const float* scales, float* fitted, float* saved, float* made, int64_t rows, int64_t width, int64_t group,
                  int32_t lost, int32_t threads) {
    if (!chosen) return 1;
    if (rows < 0 || width <= 0 || group <= 0 || lost < 0 || lost > 22) return 2;
    if (count != 0 && count != 4 && count != 8 && count != 16) return 2;
    Fit f = {values, weights, keep, levels, scales, fitted, saved, made, width, group, count, lost};
    FitJob job = {&f, rows};
    if (threads > 1 && gomp_parallel) gomp_parallel(fit_worker, &job, (unsigned)threads, 0);
    else chosen->fit(&f, 0, rows);
    return 0;
}

// Logits after one more token of each of `count` sequences: `tokens` says their places, all different, and positions.
int32_t tawny_step(const Decoder* d, const Token* tokens, int64_t count, int32_t threads) {
    if (!chosen) return 1;
    if (count < 1 || count > d->places || d->kind < F32 || d->kind > F16) return 2;
    for (int64_t t = 0; t < count; t++) {
        if (tokens[t].place < 0 || tokens[t].place >= d->places) return 2;
        if (tokens[t].position < 0 || tokens[t].position >= d->capacity) return 2;
    }
    return step(*d, tokens, count, threads);
}

// Bytes of a Decoder and of a Block, so that a caller whose idea of them differs finds out.
int64_t tawny_step_sizes() { return (int64_t)sizeof(Decoder) << 32 | (int64_t)sizeof(Block); }

// First fault of a packed weight, so that a file cannot make a kernel read outside its arrays.
// A whole weight (null masks) has nothing to check. 0 sound, 1 offsets do not start at 0 or end at `count`, 2 masks and offsets disagree, 3 a bit set in the padding.
int32_t tawny_check(const void* masks, const void* offsets, int64_t rows, int64_t cols, int64_t count) {
    const uint64_t* m = (const uint64_t*)masks;
    const int64_t* o = (const int64_t*)offsets;
    int64_t groups = (rows + 3) / 4, blocks = (cols + 63) / 64;
    uint64_t tail = cols % 64 ? ~((1ull << (cols % 64)) - 1) : 0;
    if (!m) return 0;
    if (o[0] != 0 || o[groups] != count) return 1;
    for (int64_t g = 0; g < groups; g++) {
        int64_t population = 0;
        for (int64_t b = 0; b < blocks; b++)
            for (int r = 0; r < 4; r++) {
                uint64_t mask = m[(g * blocks + b) * 4 + r];
                if ((b + 1 == blocks && (mask & tail)) || (g * 4 + r >= rows && mask)) return 3;
                population += __builtin_popcountll(mask);
            }
        if (o[g + 1] - o[g] != population) return 2;
    }
    return 0;
}

// Read `count` floats once: what the memory can stream, for benchmarks.
float tawny_stream(const void* data, int64_t count, int32_t threads) {
    if (!chosen) return 0.0f;
    StreamJob job = {(const float*)data, count, {}};
    if (threads > 1 && gomp_parallel) gomp_parallel(stream_worker, &job, (unsigned)threads, 0);
    else stream_part(job, 0, 1);
    return job.total[0];
}

}  // extern "C"

#pragma GCC visibility pop
