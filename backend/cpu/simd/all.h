/* Every vector kernel, for the instruction set of the file that includes this, as the table TP_SIMD_TABLE. */
#include "backend/cpu/simd.h"
#include "backend/cpu/simd/vec.h"
#include "backend/cpu/simd/rows.h"

#include "backend/cpu/simd/elementwise.c"
#include "backend/cpu/simd/dropout.c"
#include "backend/cpu/simd/activation.c"
#include "backend/cpu/simd/embedding.c"
#include "backend/cpu/simd/norm.c"
#include "backend/cpu/simd/rope.c"
#include "backend/cpu/simd/cross_entropy.c"
#include "backend/cpu/simd/optimizer.c"
#include "backend/cpu/simd/product.h"
#include "backend/cpu/simd/attention_few.c"
#include "backend/cpu/simd/attention.c"
#include "backend/cpu/simd/attention_backward.c"

#define X(name) .name = name,
const tp_simd TP_SIMD_TABLE = {TP_SIMD_KERNELS(X)};
#undef X
