// Builds the sweep in a namespace of its own for the instruction set FM_ISA; included once by each sweep_*.cpp.

#include "../rules.h"
#include "../update.h"

#define FM_JOIN_(a, b) a##b
#define FM_JOIN(a, b) FM_JOIN_(a, b)

namespace fused_margin {
namespace {
namespace FM_ISA {
#include "vec.h"
#include "product.h"
#include "tiles.h"
#include "load.h"
#include "sweep.h"
#include "forward.h"
#include "update_row.h"
#include "backward.h"
#include "rate.h"
}  // namespace FM_ISA
}  // namespace

const Kernels& FM_JOIN(kernels_, FM_ISA)() {
  static const Kernels kernels{&FM_ISA::forward<float>,
                               &FM_ISA::forward<double>,
                               &FM_ISA::backward<float>,
                               &FM_ISA::backward<double>,
                               &FM_ISA::step<float>,
                               &FM_ISA::step<double>,
                               &FM_ISA::update_rows<float>,
                               &FM_ISA::update_rows<double>,
                               &FM_ISA::multiply_repeatedly,
                               FM_TILES == 2 ? FM_ISA::kMostPieces : 0,
                               FM_TILES ? 1 : 0};
  return kernels;
}

}  // namespace fused_margin
