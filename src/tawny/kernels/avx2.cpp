// AVX2, FMA and F16C.
#include "admm.h"
#include "avx2.h"
#include "between.h"
#include "fit.h"
#include "greedy.h"

namespace {

using G = Generic<Avx2>;
using N = Both<Avx2>;
using B = Between<Avx2>;
using R = Greedy<Avx2>;
using A = Admm<Avx2>;
const Kernels table = {"avx2", N::form, N::prepare, N::packed, N::expand, G::dense, G::dense_transposed, G::stream, B::norm, B::swish, B::attend,
                       R::scratch, R::remove_half, A::right, A::update, A::support, Fitting<Avx2>::fit};

}  // namespace

extern "C" const Kernels* tawny_avx2() { return &table; }
