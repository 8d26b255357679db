// AVX-512 with VBMI2 and VNNI, without BF16 (Ice Lake, Tiger Lake, Rocket Lake). All but integers is AVX-512F's.
#include "avx512vnni.h"

namespace {

void prepare(int32_t form, const void* x, int32_t kind, int64_t tokens, int64_t cols, void* data, float* scales) {
    if (form == FORM_I16) prepare_integers(x, kind, tokens, cols, data, scales);
    else tawny_avx512f()->prepare(form, x, kind, tokens, cols, data, scales);
}

void packed(const Packed* p, const Input* x, const Output* out, int64_t from, int64_t to, void* tile) {
    if (x->form == FORM_I16) multiply_integers(*p, *x, *out, from, to);
    else tawny_avx512f()->packed(p, x, out, from, to, tile);
}

void expand(const Packed* p, int64_t from, int64_t to, void* out, int32_t kind, int64_t stride) {
    if (p->scales) N::expand(*p, from, to, out, kind, stride);
    else tawny_avx512f()->expand(p, from, to, out, kind, stride);
}

}  // namespace

extern "C" const Kernels* tawny_avx512vnni() {
    static const Kernels table = [] {
        Kernels made = *tawny_avx512f();
        made.name = "avx512vnni", made.prepare = prepare, made.packed = packed, made.expand = expand;
        return made;
    }();
    return &table;
}
