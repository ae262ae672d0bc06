// Everything that the sweep includes: before an instruction set is chosen, so that nothing shared is built for it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "problem.h"
#include "storage.h"
#include "update.h"
