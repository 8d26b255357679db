// Runs the kernels of 64-bit ARM over the cases that arm.py wrote, and compares what they give with the answers.
//
// A case is a letter that says what to do, numbers and arrays; all counts and numbers are int64. Answers are float64, and
// so is how far from them a result may lie, in the array that follows: not at all if that is empty.
#include "generic.h"

#include <math.h>
#include <stdio.h>
#include <string>
#include <sys/mman.h>
#include <vector>

extern "C" {
int32_t tawny_supported();
int32_t tawny_choose(int32_t level);
int32_t tawny_describe(Packed* out, const void* masks, const void* values, const void* offsets, const void* scales,
                       const void* exponents, const void* sums, int64_t rows, int64_t cols, int32_t kind, int32_t span);
int32_t tawny_packed_at(const Packed* p, const void* x, const void* bias, void* y, int32_t xkind, int64_t tokens,
                        int32_t threads);
int32_t tawny_expand(const void* masks, const void* values, const void* offsets, const void* scales, const void* exponents,
                     const void* sums, int64_t rows, int64_t cols, int32_t kind, int32_t span, int64_t from, int64_t to, void* out,
                     int32_t okind, int64_t stride, int32_t threads);
int32_t tawny_dense(const void* weight, int64_t rows, int64_t cols, int32_t kind, int32_t transposed, const void* x,
                    const void* bias, void* y, int32_t xkind, int64_t tokens, int32_t threads);
int32_t tawny_remove_half(const float* weight, const float* hessian, const float* carried, float* removed, double* paid,
                          int64_t rows, int64_t width, int64_t stride, int64_t hessian_stride, int32_t threads);
}

namespace {

// Memory that ends where a page begins which cannot be read: a vector that reaches past an array ends the program.
// It is NaN in every kind to begin with, so that a result that was not written is none.
struct Memory {
    size_t bytes, mapped;
    uint8_t *start, *at;
    explicit Memory(size_t size) : bytes(size), mapped((size + 4095) / 4096 * 4096 + 4096) {
        start = (uint8_t*)mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        mprotect(start + mapped - 4096, 4096, PROT_NONE);
        at = start + mapped - 4096 - size;
        memset(at, 0xff, size);
    }
    Memory(const Memory&) = delete;
    Memory(Memory&& other) : bytes(other.bytes), mapped(other.mapped), start(other.start), at(other.at) { other.start = nullptr; }
    ~Memory() {
        if (start) munmap(start, mapped);
    }
    template <class T>
    T* as() const { return bytes ? (T*)at : nullptr; }
    operator const void*() const { return as<void>(); }
};

struct Case {
    char what;
    std::string name;
    std::vector<int64_t> n;
    std::vector<Memory> a;
};

int64_t number(FILE* file) {
    int64_t value;
    return fread(&value, 8, 1, file) == 1 ? value : -1;
}

bool read(FILE* file, Case& c) {
    int64_t length = number(file);
    if (length < 0) return false;
    c.name.resize((size_t)length);
    if (fread(&c.name[0], 1, (size_t)length, file) != (size_t)length) return false;
    c.what = c.name[0];
    for (int64_t count = number(file); count > 0; count--) c.n.push_back(number(file));
    for (int64_t count = number(file); count > 0; count--) {
        Memory memory((size_t)number(file));
        if (fread(memory.at, 1, memory.bytes, file) != memory.bytes) return false;
        c.a.push_back(static_cast<Memory&&>(memory));
    }
    return true;
}

bool quiet = false;

// Whether results of one kind are the answers in arrays `i` and `i + 1`; where those are not finite, nor are they.
bool compare(const Case& c, size_t i, const void* found, int32_t kind) {
    const double *wanted = c.a[i].as<double>(), *allowed = c.a[i + 1].as<double>();
    for (size_t j = 0; j < c.a[i].bytes / 8; j++) {
        double value = load_float(found, kind, (int64_t)j);
        double off = allowed ? allowed[j] : 0.0;
        if (!isfinite(wanted[j]) ? isfinite(value) : !(fabs(value - wanted[j]) <= off)) {
            if (!quiet) printf("  [%zu] is %.9g, not %.9g ± %.3g\n", j, value, wanted[j], off);
            return false;
        }
    }
    return true;
}

bool run(const Case& c, const Kernels& k) {
    const auto& n = c.n;
    const auto& a = c.a;
    auto floats = [&](size_t i) { return a[i].as<const float>(); };
    switch (c.what) {
        case 'p': {  // packed
            Packed p;
            tawny_describe(&p, a[0], a[1], a[2], a[3], a[4], a[5], n[0], n[1], (int32_t)n[2], (int32_t)n[3]);
            Memory y((size_t)(n[5] * n[0] * value_size((int32_t)n[4])));
            return !tawny_packed_at(&p, a[6], a[7], y.at, (int32_t)n[4], n[5], 1) && compare(c, 8, y, (int32_t)n[4]);
        }
        case 'e': {  // expand
            Memory y((size_t)(n[0] * n[1] * value_size((int32_t)n[4])));
            return !tawny_expand(a[0], a[1], a[2], a[3], a[4], a[5], n[0], n[1], (int32_t)n[2], (int32_t)n[3], 0, (n[0] + 3) / 4, y.at,
                                 (int32_t)n[4], n[1], 1) &&
                   compare(c, 6, y, (int32_t)n[4]);
        }
        case 'd': {  // dense
            Memory y((size_t)(n[4] * n[0] * value_size((int32_t)n[3])));
            return !tawny_dense(a[0], n[0], n[1], (int32_t)n[2], 0, a[1], a[2], y.at, (int32_t)n[3], n[4], 1) &&
                   compare(c, 3, y, (int32_t)n[3]);
        }
        case 'n':  // norm
        case 's': {  // swish
            Memory y((size_t)(n[0] * value_size((int32_t)n[1])));
            if (c.what == 'n') k.norm(floats(0), floats(1), n[0], 1e-5f, y.at, (int32_t)n[1]);
            else k.swish(floats(0), floats(1), n[0], y.at, (int32_t)n[1]);
            return compare(c, 2, y, (int32_t)n[1]);
        }
        case 'a': {  // attend
            int32_t kind = (int32_t)n[5];
            Memory y((size_t)(n[0] * n[2] * value_size(kind))), scores((size_t)(n[0] * n[3] * 4));
            Attention attention = {floats(0), a[1], a[2], scores.as<float>(), y.at,  n[0], n[1],
                                   n[2],      n[3], n[4], n[3],               0.25f, kind};
            k.attend(&attention, 0, n[0]);
            return compare(c, 3, y, kind);
        }
        case 'h': {  // half of each row removed
            Memory removed((size_t)(n[0] * n[1] * 4)), paid((size_t)n[0] * 8);
            memset(paid.at, 0, paid.bytes);
            int32_t error = tawny_remove_half(floats(0), floats(1), floats(2), removed.as<float>(), paid.as<double>(), n[0], n[1],
                                              n[1], n[1], 1);
            for (int64_t r = 0; r < n[0]; r++)
                if (paid.as<double>()[r] != a[5].as<double>()[r]) return false;
            return !error && compare(c, 3, removed, F32);
        }
        case 'r':    // ALPS: the right side
        case 'u': {  // the update and what it counts
            int32_t kind = (int32_t)n[1];
            Memory y((size_t)(n[0] * (c.what == 'r' ? value_size(kind) : 4))), counts(a.back().bytes);
            Pass pass = {floats(0), floats(1), a[2], y.at, a[3].as<const uint8_t>(), nullptr, n[0], 0.5f, 0.5f, 0.25f,
                         0.4375f, 0.625f, (int32_t)n[2], kind};
            if (c.what == 'r') return k.admm_right(&pass, 0, n[0]), compare(c, 4, y, kind);
            memcpy(y.at, a[0], y.bytes);
            memset(counts.at, 0, counts.bytes);
            k.admm_update(&pass, 0, n[0], counts.as<int64_t>());
            return compare(c, 4, y, F32) && !memcmp(counts.at, a.back(), counts.bytes);
        }
        case 'c': {  // the support, and how much of it changed
            Memory seen((size_t)n[0]);
            memcpy(seen.at, a[2], seen.bytes);
            Pass pass = {floats(0), nullptr, nullptr, nullptr, a[1].as<const uint8_t>(), seen.at, n[0], 0.5f, 0, 0, 0, 0, 0, F32};
            return k.admm_support(&pass, 0, n[0]) == n[1] && !memcmp(seen.at, a[3], seen.bytes);
        }
    }
    return false;
}

}  // namespace

int main(int count, char** arguments) {
    FILE* file = count > 1 ? fopen(arguments[1], "rb") : nullptr;
    if (!file) return fprintf(stderr, "the file of cases is missing\n"), 2;
    const struct { int32_t level; const Kernels* table; } kernels[] = {{0, tawny_portable()}, {6, tawny_neon()}};
    if (tawny_supported() != (1 << kernels[0].level | 1 << kernels[1].level))
        return fprintf(stderr, "the library does not offer portable code and NEON\n"), 2;
    int passed[2] = {}, cases = 0;
    bool wrong = false, refused = true;  // the last case has a wrong answer, as its name says
    for (;; cases += !wrong) {
        Case c;
        if (!read(file, c)) break;
        quiet = wrong = c.name.rfind("wrong ", 0) == 0;
        if (wrong) c.what = c.name[6];
        for (int k = 0; k < 2; k++) {
            if (tawny_choose(kernels[k].level)) return fprintf(stderr, "%s cannot be chosen\n", kernels[k].table->name), 2;
            bool same = run(c, *kernels[k].table);
            if (wrong) refused = refused && !same;
            else passed[k] += same;
            if (same == wrong) printf("%s: %s %s\n", kernels[k].table->name, c.name.c_str(), wrong ? "passed" : "failed");
        }
    }
    for (int k = 0; k < 2; k++) printf("%s: %d of %d cases pass\n", kernels[k].table->name, passed[k], cases);
    if (!wrong) printf("the file ends before the case that must fail\n");
    return wrong && refused && cases && passed[0] == cases && passed[1] == cases ? 0 : 1;
}
