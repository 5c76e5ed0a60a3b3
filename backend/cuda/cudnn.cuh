/* Attention by cuDNN 9, where it is installed and faster than our own kernels: opened at run time, never needed.
 *
 * What follows of its C API (cudnn_graph.h) is what we use, under the values that it has there: the header itself is not part
 * of the CUDA toolkit. */
#ifndef TP_BACKEND_CUDA_CUDNN_CUH
#define TP_BACKEND_CUDA_CUDNN_CUH

#include "backend/cuda/cuda.cuh"

typedef void *tp_dnn_descriptor;

enum tp_dnn_status { TP_DNN_OK = 0 };
enum tp_dnn_type { TP_DNN_FLOAT = 0, TP_DNN_F16 = 2, TP_DNN_INT32 = 4, TP_DNN_BF16 = 9, TP_DNN_BOOLEAN = 11 };
enum tp_dnn_pointwise {
    TP_DNN_ADD = 0,
    TP_DNN_MUL = 1,
    TP_DNN_DIV = 6,
    TP_DNN_SUB = 9,
    TP_DNN_EXP = 13,
    TP_DNN_LOG = 15,
    TP_DNN_IDENTITY = 21,
    TP_DNN_GREATER_EQUAL = 303,
    TP_DNN_GREATER = 302,
    TP_DNN_LESS = 304,
    TP_DNN_BOTH = 400,
    TP_DNN_INDEX = 501,
    TP_DNN_SELECT = 601
};
enum tp_dnn_reduction { TP_DNN_SUM = 0, TP_DNN_MAX = 3 };
enum { TP_DNN_HEURISTIC_A = 3, TP_DNN_KNOB_KERNEL = 24 };

/* Kinds of descriptors. */
enum tp_dnn_kind {
    TP_DNN_POINTWISE = 0,
    TP_DNN_ENGINE_CONFIG = 3,
    TP_DNN_HEURISTIC = 4,
    TP_DNN_PLAN = 5,
    TP_DNN_KNOB_CHOICE = 7,
    TP_DNN_OP_POINTWISE = 13,
    TP_DNN_GRAPH = 15,
    TP_DNN_VARIANTS = 16,
    TP_DNN_TENSOR = 17,
    TP_DNN_MATMUL = 18,
    TP_DNN_OP_MATMUL = 19,
    TP_DNN_REDUCTION = 21,
    TP_DNN_OP_REDUCTION = 22,
    TP_DNN_OP_RESHAPE = 31
};

/* Types of attributes. */
enum tp_dnn_value {
    TP_DNN_V_HANDLE = 0,
    TP_DNN_V_TYPE = 1,
    TP_DNN_V_BOOLEAN = 2,
    TP_DNN_V_INT64 = 3,
    TP_DNN_V_FLOAT = 4,
    TP_DNN_V_POINTER = 6,
    TP_DNN_V_HEURISTIC = 8,
    TP_DNN_V_KNOB = 9,
    TP_DNN_V_POINTWISE = 14,
    TP_DNN_V_DESCRIPTOR = 15,
    TP_DNN_V_REDUCTION = 18
};

/* Attributes. */
enum tp_dnn_attribute {
    TP_DNN_POINTWISE_MODE = 0,
    TP_DNN_POINTWISE_TYPE = 1,
    TP_DNN_POINTWISE_AXIS = 9,
    TP_DNN_HEURISTIC_MODE = 200,
    TP_DNN_HEURISTIC_GRAPH = 201,
    TP_DNN_HEURISTIC_RESULTS = 202,
    TP_DNN_CONFIG_KNOBS = 302,
    TP_DNN_PLAN_HANDLE = 400,
    TP_DNN_PLAN_CONFIG = 401,
    TP_DNN_PLAN_WORKSPACE = 402,
    TP_DNN_KNOB_TYPE = 600,
    TP_DNN_KNOB_VALUE = 601,
    TP_DNN_OP_POINTWISE_HOW = 750,
    TP_DNN_OP_POINTWISE_X = 751,
    TP_DNN_OP_POINTWISE_B = 752,
    TP_DNN_OP_POINTWISE_Y = 753,
    TP_DNN_OP_POINTWISE_T = 758,
    TP_DNN_GRAPH_HANDLE = 800,
    TP_DNN_GRAPH_OPS = 801,
    TP_DNN_TENSOR_ALIGNMENT = 900,
    TP_DNN_TENSOR_TYPE = 901,
    TP_DNN_TENSOR_SIZES = 902,
    TP_DNN_TENSOR_STRIDES = 903,
    TP_DNN_TENSOR_ID = 906,
    TP_DNN_TENSOR_VIRTUAL = 907,
    TP_DNN_TENSOR_BY_VALUE = 908,
    TP_DNN_TENSOR_STARTS = 913,
    TP_DNN_VARIANTS_IDS = 1000,
    TP_DNN_VARIANTS_POINTERS = 1001,
    TP_DNN_VARIANTS_WORKSPACE = 1003,
    TP_DNN_MATMUL_TYPE = 1500,
    TP_DNN_OP_MATMUL_A = 1520,
    TP_DNN_OP_MATMUL_B = 1521,
    TP_DNN_OP_MATMUL_C = 1522,
    TP_DNN_OP_MATMUL_HOW = 1523,
    TP_DNN_OP_MATMUL_ROWS = 1525,
    TP_DNN_OP_MATMUL_COLUMNS = 1526,
    TP_DNN_OP_MATMUL_SUM = 1527,
    TP_DNN_REDUCTION_HOW = 1600,
    TP_DNN_REDUCTION_TYPE = 1601,
    TP_DNN_OP_REDUCTION_X = 1610,
    TP_DNN_OP_REDUCTION_Y = 1611,
    TP_DNN_OP_REDUCTION_HOW = 1612,
    TP_DNN_OP_RESHAPE_X = 2200,
    TP_DNN_OP_RESHAPE_Y = 2201
};

/* The library's functions, under their names without the prefix. */
typedef struct tp_dnn {
    size_t (*GetVersion)(void);
    int (*Create)(void **handle);
    int (*Destroy)(void *handle);
    int (*SetStream)(void *handle, cudaStream_t stream);
    int (*BackendCreateDescriptor)(int kind, tp_dnn_descriptor *descriptor);
    int (*BackendDestroyDescriptor)(tp_dnn_descriptor descriptor);
    int (*BackendFinalize)(tp_dnn_descriptor descriptor);
    int (*BackendSetAttribute)(tp_dnn_descriptor descriptor, int attribute, int value, int64_t n, const void *values);
    int (*BackendGetAttribute)(tp_dnn_descriptor descriptor, int attribute, int value, int64_t n, int64_t *got, void *values);
    int (*BackendExecute)(void *handle, tp_dnn_descriptor plan, tp_dnn_descriptor variants);
    void *library, *handle;
} tp_dnn;

/* What a plan is made for. Zeroed before it is filled, for it is compared byte by byte. Rows of a sequence lie one behind the
 * other, sequences `apart` rows from each other; packed ones directly behind each other, up to `batch` of them, of up to
 * `length` rows each, and a call says where they begin. */
typedef struct tp_dnn_shape {
    int64_t batch, length, heads, kv_heads, head_dim, q_apart, k_apart;
    int64_t q_ld, k_ld, v_ld, out_ld, dout_ld, dq_ld, dk_ld, dv_ld; /* the last four: of a gradient */
    int64_t window;                                                 /* 0: none */
    int32_t causal, f16, packed, gradient;
    int32_t any_order; /* of a gradient: dq is added up in f32 as blocks come by */
} tp_dnn_shape;

/* The arrays of a call, numbers of which are the ids of their tensors. */
enum {
    TP_DNN_Q = 1,
    TP_DNN_K,
    TP_DNN_V,
    TP_DNN_OUT,
    TP_DNN_LSE,   /* rows of `heads` numbers */
    TP_DNN_SCALE, /* in host memory, as the next three */
    TP_DNN_MASKED,
    TP_DNN_WINDOW,
    TP_DNN_ONE,
    TP_DNN_DOUT,
    TP_DNN_DQ,
    TP_DNN_DK,
    TP_DNN_DV,
    TP_DNN_DELTA, /* [batch, heads, length] */
    TP_DNN_SUMS,  /* [batch, heads, length, head_dim], f32, if in any order */
    TP_DNN_Q_STARTS, /* int32 [batch + 1], if packed: in elements of the array; so are the next four */
    TP_DNN_K_STARTS,
    TP_DNN_V_STARTS,
    TP_DNN_OUT_STARTS,
    TP_DNN_LSE_STARTS,
    TP_DNN_Q_LENGTHS, /* int32 [batch], in rows; 0 behind the last */
    TP_DNN_K_LENGTHS,
    TP_DNN_IDS
};

/* cudnn_graph.cu: a plan, and the bytes of workspace that it takes; NULL if this version has none for the shape. */
tp_dnn_descriptor tp_dnn_plan(const tp_dnn *dnn, const tp_dnn_shape *shape, int64_t *workspace);

/* cudnn.cu: whether cuDNN took the call. If not, nothing happened: it is not installed, has no plan for the shape, or is not
 * faster there. */
bool tp_dnn_attention(tp_ctx *ctx, const tp_attention_args *a);
bool tp_dnn_attention_backward(tp_ctx *ctx, const tp_attention_backward_args *b);

#endif
