/* The list of formats: one line each. Layouts of the ggml blocks: github.com/ggml-org/ggml, docs/gguf.md. */
#include "backend/matrix.h"
#include "quant/decode.h"

const tp_format tp_formats[TP_FORMAT_COUNT] = {
    [TP_FORMAT_F32] = {"f32", 1, 4, true, TP_F32, tp_decode_f32},
    [TP_FORMAT_BF16] = {"bf16", 1, 2, true, TP_BF16, tp_decode_bf16},
    [TP_FORMAT_F16] = {"f16", 1, 2, true, TP_F16, tp_decode_f16},
    [TP_FORMAT_Q8_0] = {"q8_0", 32, 34, false, TP_F32, tp_decode_q8_0},
    [TP_FORMAT_Q4_0] = {"q4_0", 32, 18, false, TP_F32, tp_decode_q4_0},
    [TP_FORMAT_Q4_1] = {"q4_1", 32, 20, false, TP_F32, tp_decode_q4_1},
};
