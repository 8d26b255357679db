// AVX-512F and no more: survivors are widened to float32, 16 at a time, and expanded with vpexpandd. Bytes are AVX2's.
#include "admm.h"
#include "avx2.h"
#include "avx512.h"
#include "between.h"
#include "fit.h"
#include "greedy.h"

namespace {

using G = Generic<Avx512>;
using N = Both<Avx512, Avx2>;
using B = Between<Avx512>;
using R = Greedy<Avx512>;
using A = Admm<Avx512>;
const Kernels table = {"avx512f", N::form, N::prepare, N::packed, N::expand, G::dense, G::dense_transposed, G::stream, B::norm, B::swish, B::attend,
                       R::scratch, R::remove_half, A::right, A::update, A::support, Fitting<Avx512>::fit};

}  // namespace

extern "C" const Kernels* tawny_avx512f() { return &table; }
