// The rules and reductions by number: the order is that of CODES and REDUCTIONS in fused_margin/rules.py.
#pragma once

namespace fused_margin {

enum class RuleCode { identity, hard, curricular, clip, filter, gauss, circle, power };
enum class Reduction { logsumexp, softplus };

}  // namespace fused_margin
