// The shapes of everything that crosses a file boundary in the kernels, and the C ABI that Python calls.
//
// A weight W [out, in] is stored in groups of 4 rows. For each 64 columns a group holds 4 masks of 64 bits, then the
// survivors of those 4 rows one after another; a whole weight, of integers only, has no masks and holds every column,
// padding too. docs/packed-format.md is the specification. One source file an
// instruction set is compiled with its own flags and fills one `Kernels` table; dispatch.cpp chooses a table when the
// library is loaded, splits the groups over threads and converts activations. Everything that is not in this header
// lives in anonymous namespaces: a function compiled for AVX-512 must never be the copy the linker keeps for others.
#pragma once
#include <stdint.h>

// Kinds of stored values, by the code that kinds.py gives for each; what is known of one is its trait (generic.h).
// The first three are also those of activations, results and dense weights.
enum Kind : int32_t { F32 = 0, BF16 = 1, F16 = 2, INT8 = 3, INT4 = 4, INT3 = 5, INT6 = 6, INT5 = 7, INT2 = 8, KINDS = 9 };

// How a kernel wants the activations: float32, bfloat16, or 16-bit integers (integers.h, in an order
// of its own).
enum Form : int32_t { FORM_F32 = 0, FORM_BF16 = 1, FORM_I16 = 2 };

// Activations are prepared in parts of so many tokens, whose place depends on the tokens before them alone.
constexpr int64_t TOKENS_TOGETHER = 32;

struct Packed {
    const uint64_t* masks;   // [groups, blocks, 4]; null: whole
    const void* values;      // survivors, then 64 bytes of padding
    const int64_t* offsets;  // [groups + 1], in values; null: whole
    const void* scales;      // of integers only: float32 [groups * 4]; with a span bfloat16, or codes, [groups, spans, 4]
    const uint8_t* exponents;  // [groups * 4], of the codes (kernels/scales.py); null: scales are bfloat16
    const float* sums;       // of integers only: [groups * 4]; sum of a row's integers, or of scale * integer when span != 0
    int64_t rows, cols;      // of the weight, before padding
    int64_t groups, blocks;  // ceil(rows / 4), ceil(cols / 64)
    int32_t kind, span;      // columns a scale covers: 0 (the row), 32, 64 or 128
};

// Groups of rows that are expanded together before they are multiplied: as many as leave most of L2 to the activations.
static inline int64_t tile_groups(int64_t blocks, int64_t size) {
    int64_t groups = (256 << 10) / (blocks * 64 * 4 * size);
    return groups < 1 ? 1 : groups > 8 ? 8 : groups;
}

// Tokens taken together: at most `most`, and no short remainder (8 tokens are 4 + 4, not 6 + 2).
static inline int64_t token_share(int64_t left, int64_t most) {
    int64_t parts = (left + most - 1) / most;
    return (left + parts - 1) / parts;
}

struct Dense {
    const void* weight;  // [rows, cols], row after row; [cols, rows] where it is transposed
    int64_t rows, cols;
    int32_t kind, transposed;
};

struct Input {
    const void* data;     // [tokens, stride] in `form`, 64-byte aligned, zero in the padding columns
    const float* scales;  // FORM_I16 only: [tokens]
    int64_t tokens, stride;
    int32_t form;
};

struct Output {
    void* data;        // [tokens, rows]
    const void* bias;  // [rows] of the same kind, or null
    int64_t rows;
    int32_t kind;
};

struct Attention {  // one token's query heads over the past; `share` of them use one head of keys and values
    const float* query;   // [heads, dim]
    const void *keys, *values;  // [tokens, stride]
    float* scores;        // [heads, capacity], scratch
    void* out;            // [heads, dim] of `kind`
    int64_t heads, share, dim, tokens, stride, capacity;
    float scale;
    int32_t kind;
};

struct Removal {  // half of the columns of every row, greedily (greedy.h)
    const float* weight;   // [rows, width], `stride` apart
    const float* hessian;  // [width, width], `hessian_stride` apart
    const float* carried;  // [rows, width]: what columns that are gone already add to this group's, through H
    float* removed;        // like weight: the weights that went, zero elsewhere
    double* paid;          // [rows], added to
    int64_t rows, width, stride, hessian_stride;
};

struct Pass {  // over contiguous weights, between two products of ALPS (admm.h)
    const float* values;   // T
    const float* weight;   // W
    const void* product;   // S, `kind`
    void* out;             // the right side of the next product, `kind`; or T in place
    const uint8_t* zero;   // 1 where a weight was zero and stays so, or null
    uint8_t* support;      // 1 where T survived, when last looked at
    int64_t count;
    float threshold, rho, before, low, high;
    int32_t shift, kind;   // kind: F32 or BF16
};

struct Fit {  // weights to a grid (fit.h)
    const float* values;   // [rows, width]
    const float* weights;  // [width], or null: what the square of an error counts
    const uint8_t* keep;   // [rows, width], or null: what is not kept counts nothing
    const float* levels;   // `count` of them, ascending; the first and the last of all integers between them where count is 0
    const float* scales;   // [rows, groups of columns]
    float *fitted, *saved; // like scales, each may be null: the least-squares scales, and the squares they save
    float* made;           // like values, or null: level times fitted scale
    int64_t width, group;
    int32_t count, lost;  // lost: bits of a float32 that the scales of `made` do without; 0: it has the given scales
};

struct Kernels {
    const char* name;
    // The Form wanted for these values and activations.
    int32_t (*form)(int32_t kind, int32_t input);
    void (*prepare)(int32_t form, const void* x, int32_t kind, int64_t tokens, int64_t cols, void* data, float* scales);
    void (*packed)(const Packed*, const Input*, const Output*, int64_t from, int64_t to, void* scratch);  // groups
    void (*expand)(const Packed*, int64_t from, int64_t to, void* out, int32_t kind, int64_t stride);     // groups
    void (*dense)(const Dense*, const Input*, const Output*, int64_t from, int64_t to);                   // rows
    void (*dense_transposed)(const Dense*, const Input*, const Output*, int64_t from, int64_t to, void* scratch);
    float (*stream)(const float* data, int64_t count);  // the sum: reads everything once and does nothing else
    // between.h
    void (*norm)(const float* x, const float* weight, int64_t count, float eps, void* out, int32_t kind);
    void (*swish)(const float* gate, const float* up, int64_t count, void* out, int32_t kind);
    void (*attend)(const Attention*, int64_t from, int64_t to);  // query heads
    // greedy.h
    int64_t (*removal_scratch)(const Removal*);  // bytes
    void (*remove_half)(const Removal*, int64_t from, int64_t to, void* scratch);  // rows
    // admm.h
    void (*admm_right)(const Pass*, int64_t from, int64_t to);
    void (*admm_update)(const Pass*, int64_t from, int64_t to, int64_t* counts);
    int64_t (*admm_support)(const Pass*, int64_t from, int64_t to);
    void (*fit)(const Fit*, int64_t from, int64_t to);  // fit.h; rows
};

extern "C" const Kernels* tawny_portable();
extern "C" const Kernels* tawny_avx2();
extern "C" const Kernels* tawny_avxvnni();
extern "C" const Kernels* tawny_avx512f();
extern "C" const Kernels* tawny_avx512vnni();
extern "C" const Kernels* tawny_avx512vbmi2();
extern "C" const Kernels* tawny_neon();
