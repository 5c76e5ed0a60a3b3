/* Opening models: what is used in place and what is converted, tied heads, and every way in which a folder can be wrong. */
#include "tests/support.h"

#include <math.h>
#include <unistd.h>

#include "backend/backend.h"
#include "base/gguf.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/safetensors.h"
#include "models/model.h"
#include "tests/failing_memory.h"
#include "tests/scratch.h"

/* ---- a context with a device ---- */

struct bench {
    tp_ctx ctx;
    tp_log log;
    int notes;
    char last_note[512];
    scratch files;
};

static void keep_line(tp_log_level level, const char *text, void *user)
{
    struct bench *b = user;
    if (level != TP_LOG_INFO) return;
    b->notes++;
    snprintf(b->last_note, sizeof b->last_note, "%s", text);
}

static void bench_begin(struct bench *b, const char *device)
{
    memset(b, 0, sizeof *b);
    tp_ctx_init(&b->ctx);
    b->log = (tp_log){TP_LOG_INFO, keep_line, b};
    assert_ok(&b->ctx, tp_device_open(&b->ctx, device, 2, &b->ctx.device));
    b->ctx.log = &b->log;
    scratch_begin(&b->files);
}

static void bench_end(struct bench *b)
{
    tp_device_close(b->ctx.device);
    scratch_end(&b->files);
}

/* ---- a small folder, whose parts tests change ---- */

static const char config_text[] =
    "{\"model_type\": \"llama\", \"hidden_size\": 8, \"intermediate_size\": 12, \"num_hidden_layers\": 1, "
    "\"num_attention_heads\": 2, \"vocab_size\": 10, \"tie_word_embeddings\": %s}";

#define N_TENSORS 12
struct tensor {
    const char *name;
    int rank;
    int64_t shape[2];
};
static const struct tensor tensors[N_TENSORS] = {
    {"model.embed_tokens.weight", 2, {10, 8}},
    {"model.layers.0.input_layernorm.weight", 1, {8}},
    {"model.layers.0.post_attention_layernorm.weight", 1, {8}},
    {"model.layers.0.self_attn.q_proj.weight", 2, {8, 8}},
    {"model.layers.0.self_attn.k_proj.weight", 2, {8, 8}},
    {"model.layers.0.self_attn.v_proj.weight", 2, {8, 8}},
    {"model.layers.0.self_attn.o_proj.weight", 2, {8, 8}},
    {"model.layers.0.mlp.gate_proj.weight", 2, {12, 8}},
    {"model.layers.0.mlp.up_proj.weight", 2, {12, 8}},
    {"model.layers.0.mlp.down_proj.weight", 2, {8, 12}},
    {"model.norm.weight", 1, {8}},
    {"lm_head.weight", 2, {10, 8}},
};

/* What a test does to the folder: a tensor left out, renamed, or given other values; NULL and 0: as it is. */
struct folder {
    bool tied;
    tp_dtype dtype;
    const char *leave_out;
    const char *extra;        /* one more tensor [3] */
    const char *odd;          /* this tensor */
    int64_t odd_rows;         /* gets this many rows, */
    bool odd_nan, odd_is_f64; /* a NaN as value 5, another dtype */
    bool head_is_embedding;   /* same bytes */
    bool without_prefix;
};

static float value_at(size_t tensor, int64_t i)
{
    return 0.01f * (float)(tensor + 1) * (float)(i % 17 - 8);
}

static int64_t elements(const tp_named_array *a)
{
    return a->shape[0] * (a->rank == 2 ? a->shape[1] : 1);
}

static void *make_values(const tp_named_array *a, size_t number, bool nan)
{
    int64_t n = elements(a);
    float *values = malloc((size_t)n * sizeof *values);
    void *stored = malloc((size_t)n * 8);
    for (int64_t i = 0; i < n; i++) values[i] = nan && i == 5 ? NAN : value_at(number, i);
    tp_convert_from_f32(a->dtype, values, (size_t)n, stored);
    free(values);
    return stored;
}

/* Arrays of the folder's tensors; returns how many. Data is malloc'ed. */
static size_t make_arrays(const struct folder *f, tp_named_array *out)
{
    size_t n = 0;
    for (size_t i = 0; i < N_TENSORS; i++) {
        const struct tensor *t = &tensors[i];
        bool odd = f->odd != NULL && strcmp(f->odd, t->name) == 0;
        if ((f->tied && i == N_TENSORS - 1 && !f->head_is_embedding && f->leave_out == NULL) ||
            (f->leave_out != NULL && strcmp(f->leave_out, t->name) == 0))
            continue;
        tp_named_array *a = &out[n++];
        *a = (tp_named_array){.name = t->name,
                              .dtype = odd && f->odd_is_f64 ? TP_F64 : f->dtype,
                              .rank = t->rank,
                              .shape = {t->shape[0], t->shape[1]}};
        if (f->without_prefix && tp_starts_with(t->name, "model.")) a->name += strlen("model.");
        if (odd && f->odd_rows > 0) a->shape[0] = f->odd_rows;
        a->data = make_values(a, i == N_TENSORS - 1 && f->head_is_embedding ? 0 : i, odd && f->odd_nan);
    }
    if (f->extra == NULL) return n;
    out[n] = (tp_named_array){.name = f->extra, .dtype = f->dtype, .rank = 1, .shape = {3}};
    out[n].data = make_values(&out[n], n, false);
    return n + 1;
}

static void save_arrays(struct bench *b, const char *name, const tp_named_array *arrays, size_t n)
{
    assert_ok(&b->ctx, tp_safetensors_save(&b->ctx, scratch_path(&b->files, name), arrays, n, NULL));
}

static void free_arrays(const tp_named_array *arrays, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        void *data;
        memcpy(&data, &arrays[i].data, sizeof data);
        free(data);
    }
}

static void write_text(struct bench *b, const char *name, const char *text)
{
    assert_ok(&b->ctx, tp_file_write(&b->ctx, scratch_path(&b->files, name), text, strlen(text)));
}

static void write_config(struct bench *b, bool tied)
{
    char text[512];
    snprintf(text, sizeof text, config_text, tied ? "true" : "false");
    write_text(b, "config.json", text);
}

static void make_folder(struct bench *b, const struct folder *f)
{
    tp_named_array arrays[N_TENSORS + 1];
    write_config(b, f->tied);
    size_t n = make_arrays(f, arrays);
    save_arrays(b, "model.safetensors", arrays, n);
    free_arrays(arrays, n);
}

static tp_status open_with(struct bench *b, const char *path, tp_dtype precision, bool check, tp_model **model)
{
    tp_model_options options = {.precision = precision, .check_weights = check};
    return tp_model_open(&b->ctx, path, &options, model);
}

/* The open has to fail so, with both words in the message. */
static void assert_refused(struct bench *b, const char *path, tp_status expected, const char *word, const char *other)
{
    tp_model *model;
    tp_status status = open_with(b, path, TP_F32, true, &model);
    if (status != expected || strstr(b->ctx.message, word) == NULL || strstr(b->ctx.message, other) == NULL)
        fail_msg("expected %s with \"%s\" and \"%s\", got %s: %s", tp_status_name(expected), word, other,
                 tp_status_name(status), b->ctx.message);
    assert_null(model);
    tp_ctx_clear(&b->ctx);
}

/* ---- what a good folder gives ---- */

static void assert_matrix(const tp_matrix *w, size_t tensor, int64_t rows, int64_t cols, tp_dtype precision)
{
    assert_int_equal(w->rows, rows);
    assert_int_equal(w->cols, cols);
    size_t row_bytes = (size_t)tp_format_row_bytes(w->format, cols);
    for (int64_t r = 0; r < rows; r++) {
        float got[64];
        tp_formats[w->format].decode((const char *)w->data + (size_t)r * row_bytes, 0, cols, got);
        for (int64_t c = 0; c < cols; c++) {
            float wanted = value_at(tensor, r * cols + c);
            if (precision == TP_BF16) wanted = tp_bf16_to_f32(tp_f32_to_bf16(wanted));
            if (precision == TP_F16) wanted = tp_f16_to_f32(tp_f32_to_f16(wanted));
            if (got[c] != wanted)
                fail_msg("%zu [%lld, %lld]: %g, expected %g", tensor, (long long)r, (long long)c, (double)got[c],
                         (double)wanted);
        }
    }
}

static void every_tensor_reaches_its_place(void **state)
{
    struct bench b;
    tp_model *m;
    static const tp_dtype dtypes[] = {TP_F32, TP_BF16, TP_F16};
    (void)state;
    for (int prefix = 0; prefix < 2; prefix++)
        for (int d = 0; d < 3; d++) {
            bench_begin(&b, "cpu");
            make_folder(&b, &(struct folder){.dtype = dtypes[d], .without_prefix = prefix != 0});
            assert_ok(&b.ctx, open_with(&b, b.files.folder, TP_F32, true, &m));
            const tp_block *k = &m->blocks[0];
            assert_matrix(&m->embedding, 0, 10, 8, dtypes[d]);
            assert_matrix(&k->q.weight, 3, 8, 8, dtypes[d]);
            assert_matrix(&k->k.weight, 4, 8, 8, dtypes[d]);
            assert_matrix(&k->v.weight, 5, 8, 8, dtypes[d]);
            assert_matrix(&k->o.weight, 6, 8, 8, dtypes[d]);
            assert_matrix(&k->gate.weight, 7, 12, 8, dtypes[d]);
            assert_matrix(&k->up.weight, 8, 12, 8, dtypes[d]);
            assert_matrix(&k->down.weight, 9, 8, 12, dtypes[d]);
            assert_matrix(&m->head.weight, 11, 10, 8, dtypes[d]);
            assert_matrix(&(tp_matrix){.format = TP_FORMAT_F32, .data = k->norm2.data, .rows = 1, .cols = 8}, 2, 1, 8,
                          dtypes[d]);
            assert_null(k->norm1_bias.data);
            assert_null(k->q.bias.data);
            assert_int_equal(m->n_linears, 8);
            assert_string_equal(m->linears[0]->path, "model.layers.0.self_attn.q_proj");
            assert_string_equal(m->linears[7]->path, "lm_head");
            assert_true(m->linears[7]->is_head);
            assert_int_equal(m->linears[6]->layer, 0);
            assert_ptr_equal(tp_model_find(m, "model.layers.0.mlp.down_proj"), &k->down);
            assert_int_equal(strlen(m->fingerprint), 64);
            assert_int_equal(b.notes, 0);
            tp_model_free(m);
            bench_end(&b);
        }
}

/* bf16 and f16 compute: F32 is held rounded in memory of our own, the same values with and without a mapping. */
static void narrow_compute_narrows(void **state)
{
    struct bench b;
    tp_model *m;
    (void)state;
    bench_begin(&b, "cpu");
    make_folder(&b, &(struct folder){.dtype = TP_F32});
    for (int mapped = 0; mapped < 2; mapped++) {
        setenv("TAPEFT_NO_MMAP", mapped ? "0" : "1", 1);
        for (int f16 = 0; f16 < 2; f16++) {
            tp_dtype precision = f16 ? TP_F16 : TP_BF16;
            assert_ok(&b.ctx, open_with(&b, b.files.folder, precision, true, &m));
            assert_int_equal(m->embedding.format, tp_format_of(precision));
            assert_matrix(&m->embedding, 0, 10, 8, precision);
            assert_matrix(&m->blocks[0].down.weight, 9, 8, 12, precision);
            assert_int_equal(m->weight_bytes, 2 * (2 * 80 + 4 * 64 + 3 * 96) + 3 * 64 * 4);
            tp_model_free(m);
        }
        assert_ok(&b.ctx, open_with(&b, b.files.folder, TP_F32, true, &m));
        assert_int_equal(m->embedding.format, TP_FORMAT_F32);
        assert_matrix(&m->embedding, 0, 10, 8, TP_F32);
        assert_ok(&b.ctx, tp_model_check(&b.ctx, m));
        tp_model_free(m);
    }
    unsetenv("TAPEFT_NO_MMAP");
    bench_end(&b);
}

/* Long tensors go through the vector loops and several pieces: every f16 or bf16 there is, and f32 values around every rounding
 * tie, to bf16 and to f16. */
static void narrowing_is_round_to_nearest_even(void **state)
{
    enum { V = 1 << 18, D = 8 };
    struct bench b;
    tp_model *m;
    char text[512];
    tp_named_array arrays[N_TENSORS];
    (void)state;
    for (int d = 0; d < 4; d++) {
        tp_dtype precision = d < 2 ? TP_BF16 : TP_F16, other = d < 2 ? TP_F16 : TP_BF16, dtype = d % 2 == 0 ? TP_F32 : other;
        bench_begin(&b, "cpu");
        struct folder f = {.tied = true, .dtype = dtype};
        size_t n = make_arrays(&f, arrays);
        uint32_t *wide = malloc((size_t)V * D * 4);
        uint16_t *half = (uint16_t *)wide;
        for (uint32_t i = 0; i < (uint32_t)V * D; i++) {
            if (dtype != TP_F32)
                half[i] = (uint16_t)i;
            else if (precision == TP_BF16)
                wide[i] = i * 0x7fff3u + (i % 3) * 0x8000u;
            else
                wide[i] = (i * 0x7fff3u & 0xffffe000u) + (i % 3) * 0x1000u + i % 2;
        }
        free_arrays(arrays, 1);
        arrays[0].shape[0] = V;
        arrays[0].data = wide;
        save_arrays(&b, "model.safetensors", arrays, n);
        snprintf(text, sizeof text,
                 "{\"model_type\": \"llama\", \"hidden_size\": 8, \"intermediate_size\": 12, \"num_hidden_layers\": 1, "
                 "\"num_attention_heads\": 2, \"vocab_size\": %d, \"tie_word_embeddings\": true}",
                 V);
        write_text(&b, "config.json", text);
        assert_ok(&b.ctx, open_with(&b, b.files.folder, precision, false, &m));
        const uint16_t *got = m->embedding.data;
        for (uint32_t i = 0; i < (uint32_t)V * D; i++) {
            float x =
                dtype == TP_F16 ? tp_f16_to_f32(half[i]) : tp_f32_from_bits(dtype == TP_F32 ? wide[i] : half[i] * 0x10000u);
            uint16_t wanted = precision == TP_BF16 ? tp_f32_to_bf16(x) : tp_f32_to_f16(x);
            if (got[i] != wanted)
                fail_msg("%s %#x: %#x, expected %#x", tp_dtype_name(dtype), dtype == TP_F32 ? wide[i] : half[i], got[i],
                         wanted);
        }
        tp_model_free(m);
        free_arrays(arrays, n);
        bench_end(&b);
    }
}

/* ---- tied embeddings ---- */

static void tied_heads(void **state)
{
    struct bench b;
    tp_model *m;
    (void)state;
    bench_begin(&b, "cpu");
    make_folder(&b, &(struct folder){.dtype = TP_F32, .tied = true});
    assert_ok(&b.ctx, open_with(&b, b.files.folder, TP_F32, true, &m));
    assert_ptr_equal(m->head.weight.data, m->embedding.data);
    assert_int_equal(m->n_linears, 7);
    tp_model_free(m);
    make_folder(&b, &(struct folder){.dtype = TP_F32, .tied = true, .head_is_embedding = true}); /* a copy is no other head */
    assert_ok(&b.ctx, open_with(&b, b.files.folder, TP_F32, true, &m));
    assert_ptr_equal(m->head.weight.data, m->embedding.data);
    assert_int_equal(b.notes, 0);
    tp_model_free(m);
    make_folder(&b, &(struct folder){.dtype = TP_F32,
                                     .tied = true,
                                     .leave_out = "model.embed_tokens.weight"}); /* only lm_head: it is the embedding */
    assert_ok(&b.ctx, open_with(&b, b.files.folder, TP_F32, true, &m));
    assert_matrix(&m->embedding, 11, 10, 8, TP_F32);
    assert_ptr_equal(m->head.weight.data, m->embedding.data);
    tp_model_free(m);
    make_folder(&b,
                &(struct folder){.dtype = TP_F32, .tied = true, .leave_out = "nothing"}); /* another head: the file's counts */
    assert_ok(&b.ctx, open_with(&b, b.files.folder, TP_F32, true, &m));
    assert_matrix(&m->embedding, 0, 10, 8, TP_F32);
    assert_matrix(&m->head.weight, 11, 10, 8, TP_F32);
    assert_int_equal(m->n_linears, 8);
    assert_int_equal(b.notes, 1);
    tp_model_free(m);
    bench_end(&b);
}

/* ---- wrong folders ---- */

static void wrong_tensors_are_named(void **state)
{
    struct bench b;
    tp_model *m;
    (void)state;
    bench_begin(&b, "cpu");
    const char *dir = b.files.folder;
    make_folder(&b, &(struct folder){.dtype = TP_F32, .leave_out = "model.layers.0.mlp.up_proj.weight"});
    assert_refused(&b, dir, TP_FORMAT, "1 tensor is missing", "model.layers.0.mlp.up_proj.weight");
    make_folder(&b, &(struct folder){.dtype = TP_F32, .leave_out = "lm_head.weight"});
    assert_refused(&b, dir, TP_FORMAT, "missing", "lm_head.weight");
    make_folder(&b, &(struct folder){.dtype = TP_F32, .odd = "model.layers.0.self_attn.k_proj.weight", .odd_rows = 4});
    assert_refused(&b, dir, TP_SHAPE, "model.layers.0.self_attn.k_proj.weight: shape [4, 8]", "needs [8, 8]");
    make_folder(&b, &(struct folder){.dtype = TP_F32, .odd = "model.norm.weight", .odd_rows = 9});
    assert_refused(&b, dir, TP_SHAPE, "model.norm.weight: shape [9]", "needs [8]");
    make_folder(&b, &(struct folder){.dtype = TP_F32, .odd = "model.layers.0.self_attn.q_proj.weight", .odd_is_f64 = true});
    assert_refused(&b, dir, TP_UNSUPPORTED, "model.layers.0.self_attn.q_proj.weight", "F64");
    make_folder(&b, &(struct folder){.dtype = TP_F32, .extra = "model.layers.7.strange"});
    assert_ok(&b.ctx, open_with(&b, dir, TP_F32, true, &m));
    assert_int_equal(b.notes, 1);
    assert_non_null(strstr(b.last_note, "model.layers.7.strange"));
    tp_model_free(m);
    make_folder(&b, &(struct folder){.dtype = TP_F32, .extra = "model.layers.0.self_attn.rotary_emb.inv_freq"});
    assert_ok(&b.ctx, open_with(&b, dir, TP_F32, true, &m));
    assert_int_equal(b.notes, 1);
    tp_model_free(m);
    bench_end(&b);
}

/* Finite, but not in f16. */
static void values_beyond_f16_are_found(void **state)
{
    struct bench b;
    tp_model *m;
    float *values;
    tp_named_array arrays[N_TENSORS];
    (void)state;
    bench_begin(&b, "cpu");
    struct folder f = {.dtype = TP_F32};
    make_folder(&b, &f);
    size_t n = make_arrays(&f, arrays);
    memcpy(&values, &arrays[0].data, sizeof values);
    values[13] = 65519; /* the last that rounds to 65504 */
    save_arrays(&b, "model.safetensors", arrays, n);
    assert_ok(&b.ctx, open_with(&b, b.files.folder, TP_F16, true, &m));
    tp_model_free(m);
    values[13] = -65520;
    save_arrays(&b, "model.safetensors", arrays, n);
    assert_int_equal(open_with(&b, b.files.folder, TP_F16, true, &m), TP_NUMERIC);
    assert_non_null(strstr(b.ctx.message, "model.embed_tokens.weight: value 13 is outside the range of fp16"));
    tp_ctx_clear(&b.ctx);
    assert_ok(&b.ctx, open_with(&b, b.files.folder, TP_BF16, true, &m));
    tp_model_free(m);
    free_arrays(arrays, n);
    bench_end(&b);
}

/* N10: found where the check is asked for, in place, while converting, and in vectors. */
static void values_that_are_not_finite_are_found(void **state)
{
    static const char *const odd[] = {"model.layers.0.mlp.gate_proj.weight", "model.layers.0.input_layernorm.weight",
                                      "lm_head.weight"};
    static const tp_dtype dtypes[] = {TP_F32, TP_BF16, TP_F16};
    struct bench b;
    tp_model *m;
    (void)state;
    bench_begin(&b, "cpu");
    for (int i = 0; i < 3; i++)
        for (int d = 0; d < 3; d++) {
            make_folder(&b, &(struct folder){.dtype = dtypes[d], .odd = odd[i], .odd_nan = true});
            assert_refused(&b, b.files.folder, TP_NUMERIC, odd[i], "value 5 is not finite");
            assert_status(&b.ctx, TP_NUMERIC, open_with(&b, b.files.folder, TP_BF16, true, &m));
            assert_ok(&b.ctx, open_with(&b, b.files.folder, TP_F32, false, &m));
            tp_model_free(m);
        }
    bench_end(&b);
}

static void missing_files(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b, "cpu");
    const char *dir = b.files.folder;
    assert_refused(&b, scratch_path(&b.files, "nowhere"), TP_IO_READ, "nowhere", "no such");
    assert_refused(&b, dir, TP_IO_READ, "config.json", dir);
    write_text(&b, "adapter_config.json", "{}");
    assert_refused(&b, dir, TP_INVALID, "adapter", "base model");
    write_config(&b, false);
    assert_refused(&b, dir, TP_IO_READ, "model.safetensors", "index");
    write_text(&b, "pytorch_model.bin", "x");
    assert_refused(&b, dir, TP_UNSUPPORTED, "pickle", "save_pretrained");
    bench_end(&b);
}

/* ---- S15: the index of shards ---- */

/* Two shards with the first half and the second half of the tensors, and an index that puts each into the file that
 * `file_of` names for its shard. */
static void make_shards(struct bench *b, const char *first, const char *second, size_t moved)
{
    tp_named_array arrays[N_TENSORS + 1];
    tp_buf text;
    struct folder f = {.dtype = TP_F32};
    write_config(b, false);
    size_t n = make_arrays(&f, arrays), half = n / 2;
    save_arrays(b, "a.safetensors", arrays, half);
    save_arrays(b, "b.safetensors", arrays + half, n - half);
    tp_buf_init(&text, 0);
    tp_buf_text(&text, "{\"weight_map\": {");
    for (size_t i = 0; i < n; i++)
        tp_buf_printf(&text, "%s\"%s\": \"%s\"", i > 0 ? ", " : "", arrays[i].name,
                      (i < half) != (i == moved) ? first : second);
    tp_buf_text(&text, "}}");
    write_text(b, "model.safetensors.index.json", tp_buf_cstr(&text));
    tp_buf_free(&text);
    free_arrays(arrays, n);
}

static void shards_and_their_index(void **state)
{
    struct bench b;
    tp_model *m;
    char other[600], elsewhere[700];
    const size_t none = 1000;
    (void)state;
    bench_begin(&b, "cpu");
    const char *dir = b.files.folder;
    make_shards(&b, "a.safetensors", "b.safetensors", none);
    assert_ok(&b.ctx, open_with(&b, dir, TP_F32, true, &m));
    assert_matrix(&m->blocks[0].down.weight, 9, 8, 12, TP_F32);
    assert_matrix(&m->embedding, 0, 10, 8, TP_F32);
    tp_model_free(m);
    make_shards(&b, "a.safetensors", "b.safetensors", 1); /* one tensor said to be in the other shard */
    assert_refused(&b, dir, TP_FORMAT, "index.json:1:", "model.layers.0.input_layernorm.weight");
    make_shards(&b, "a.safetensors", "missing.safetensors", none);
    assert_refused(&b, dir, TP_IO_READ, "missing.safetensors", "index");
    make_shards(&b, "a.safetensors", "../b.safetensors", none);
    assert_refused(&b, dir, TP_FORMAT, "../b.safetensors", "index");
    snprintf(other, sizeof other, "%s/b.safetensors", dir);
    make_shards(&b, "a.safetensors", other, none);
    assert_refused(&b, dir, TP_FORMAT, "b.safetensors", "index");
    make_shards(&b, "a.safetensors", "b.safetensors", none);
    snprintf(elsewhere, sizeof elsewhere, "%s-elsewhere.safetensors", dir);
    assert_int_equal(rename(other, elsewhere), 0);
    assert_int_equal(symlink(elsewhere, other), 0);
    assert_refused(&b, dir, TP_FORMAT, "b.safetensors", "leads out");
    assert_int_equal(unlink(other), 0);
    assert_int_equal(unlink(elsewhere), 0);
    write_text(&b, "model.safetensors.index.json", "{\"weight_map\": {\"model.norm.weight\": 3}}");
    assert_refused(&b, dir, TP_FORMAT, "weight_map", "index.json:1:");
    write_text(&b, "model.safetensors.index.json", "{\"metadata\": {}}");
    assert_refused(&b, dir, TP_FORMAT, "weight_map", "index.json:1:");
    bench_end(&b);
}

static void a_tensor_in_two_shards(void **state)
{
    struct bench b;
    tp_named_array arrays[N_TENSORS + 1];
    struct folder f = {.dtype = TP_F32};
    (void)state;
    bench_begin(&b, "cpu");
    make_shards(&b, "a.safetensors", "b.safetensors", 1000);
    size_t n = make_arrays(&f, arrays);
    save_arrays(&b, "b.safetensors", arrays + n / 2 - 1, n - n / 2 + 1);
    free_arrays(arrays, n);
    assert_refused(&b, b.files.folder, TP_FORMAT, "another shard", tensors[N_TENSORS / 2 - 1].name);
    bench_end(&b);
}

/* ---- changes, fingerprints, plans ---- */

static void a_file_that_changes_is_noticed(void **state)
{
    struct bench b;
    tp_model *m;
    (void)state;
    bench_begin(&b, "cpu");
    make_folder(&b, &(struct folder){.dtype = TP_F32});
    assert_ok(&b.ctx, open_with(&b, b.files.folder, TP_F32, true, &m));
    assert_ok(&b.ctx, tp_model_check(&b.ctx, m));
    assert_int_equal(truncate(scratch_path(&b.files, "model.safetensors"), 1000), 0);
    assert_status(&b.ctx, TP_IO_READ, tp_model_check(&b.ctx, m));
    tp_model_free(m);
    bench_end(&b);
}

static void fingerprint_of(struct bench *b, const struct folder *f, tp_dtype precision, char out[65])
{
    tp_model *m;
    make_folder(b, f);
    assert_ok(&b->ctx, open_with(b, b->files.folder, precision, false, &m));
    memcpy(out, m->fingerprint, 65);
    tp_model_free(m);
}

static void fingerprints_tell_models_apart(void **state)
{
    struct bench b;
    char a[65], same[65], values[65], dtype[65];
    (void)state;
    bench_begin(&b, "cpu");
    fingerprint_of(&b, &(struct folder){.dtype = TP_F32}, TP_F32, a);
    fingerprint_of(&b, &(struct folder){.dtype = TP_F32}, TP_BF16, same);
    fingerprint_of(&b, &(struct folder){.dtype = TP_F32, .odd = "model.norm.weight", .odd_nan = true}, TP_F32, values);
    fingerprint_of(&b, &(struct folder){.dtype = TP_BF16}, TP_F32, dtype);
    assert_string_equal(a, same);
    assert_string_not_equal(a, values);
    assert_string_not_equal(a, dtype);
    bench_end(&b);
}

/* The dry backend sees the same bytes, from files and from the configuration alone, without reading values. */
static void plans_have_the_right_size(void **state)
{
    struct bench b, dry;
    tp_model *real, *planned, *shape;
    (void)state;
    for (int d = 0; d < 2; d++) {
        tp_dtype precision = d == 0 ? TP_F32 : TP_BF16;
        tp_model_options options = {.precision = precision, .check_weights = true};
        bench_begin(&b, "cpu");
        bench_begin(&dry, "dry");
        make_folder(&b, &(struct folder){.dtype = TP_F32, .odd = "lm_head.weight", .odd_nan = true});
        assert_ok(&b.ctx, open_with(&b, b.files.folder, precision, false, &real));
        assert_ok(&dry.ctx, open_with(&dry, b.files.folder, precision, true, &planned));
        assert_ok(&dry.ctx, tp_model_from_config(&dry.ctx, &real->config, &options, &shape));
        assert_int_equal(planned->weight_bytes, real->weight_bytes);
        assert_int_equal(shape->weight_bytes, real->weight_bytes);
        assert_int_equal(shape->n_linears, real->n_linears);
        assert_int_equal(shape->blocks[0].up.weight.format, real->blocks[0].up.weight.format);
        assert_non_null(shape->norm.data);
        tp_model_free(shape);
        assert_status(&b.ctx, TP_UNSUPPORTED, tp_model_from_config(&b.ctx, &real->config, &options, &shape));
        assert_null(shape);
        tp_model_free(real);
        tp_model_free(planned);
        bench_end(&b);
        bench_end(&dry);
    }
}

/* ---- GGUF ---- */

/* tiny_q4_0.gguf with `n` bytes changed at `skip` bytes behind the first occurrence of `mark`. */
static const char *patched_gguf(struct bench *b, const char *mark, size_t skip, const char *bytes, size_t n)
{
    char path[1024];
    char *data;
    size_t size;
    assert_ok(&b->ctx, tp_file_read(&b->ctx, golden_path(path, sizeof path, "gguf/tiny_q4_0.gguf"), 16 << 20, &data, &size));
    char *at = memmem(data, size, mark, strlen(mark));
    assert_non_null(at);
    memcpy(at + strlen(mark) + skip, bytes, n);
    assert_ok(&b->ctx, tp_file_write(&b->ctx, scratch_path(&b->files, "patched.gguf"), data, size));
    tp_free(data);
    return b->files.path;
}

static void gguf_files_we_cannot_run_are_refused(void **state)
{
    struct bench b;
    tp_model *m;
    (void)state;
    bench_begin(&b, "cpu");
    assert_ok(&b.ctx,
              open_with(&b, patched_gguf(&b, "general.architecture", 12, "l", 1), TP_F32, true, &m)); /* nothing changed */
    tp_model_free(m);
    /* A matrix's type stands behind the count of dimensions and two of them; IQ4_NL has the size of Q4_0. */
    assert_refused(&b, patched_gguf(&b, "blk.0.ffn_up.weight", 4 + 2 * 8, "\x14", 1), TP_UNSUPPORTED, "blk.0.ffn_up.weight",
                   "IQ4_NL");
    assert_refused(&b, patched_gguf(&b, "general.architecture", 12, "x", 1), TP_UNSUPPORTED, "xlama", "available: llama");
    assert_refused(&b, patched_gguf(&b, "blk.0.ffn_u", 0, "q", 1), TP_FORMAT, "missing", "blk.0.ffn_up.weight");
    assert_refused(&b, patched_gguf(&b, "llama.feed_forward_length", 4, "\x60", 1), TP_SHAPE,
                   "blk.0.ffn_gate.weight: shape [64, 256]", "[96, 256]");
    bench_end(&b);
}

/* S of block 3 of a Q4_0 matrix is made infinite in the file. */
static void gguf_scales_are_checked(void **state)
{
    struct bench b;
    tp_gguf *file;
    tp_model *m;
    char path[1024], infinity[2] = {0, 0x7c};
    char *data;
    size_t size;
    (void)state;
    bench_begin(&b, "cpu");
    golden_path(path, sizeof path, "gguf/tiny_q4_0.gguf");
    assert_ok(&b.ctx, tp_gguf_open(&b.ctx, path, &file));
    const tp_gguf_tensor *t = tp_gguf_tensor_find(file, "blk.1.attn_k.weight");
    assert_non_null(t);
    assert_int_equal(t->type, TP_GGML_Q4_0);
    assert_ok(&b.ctx, tp_file_read(&b.ctx, path, 16 << 20, &data, &size));
    memcpy(data + t->offset + 3 * 18, infinity, 2);
    assert_ok(&b.ctx, tp_file_write(&b.ctx, scratch_path(&b.files, "infinite.gguf"), data, size));
    tp_gguf_close(file);
    tp_free(data);
    assert_refused(&b, b.files.path, TP_NUMERIC, "blk.1.attn_k.weight", "block 3");
    assert_ok(&b.ctx, open_with(&b, b.files.path, TP_BF16, false, &m));
    assert_true(m->blocks[1].k.weight.round_bf16);
    tp_model_free(m);
    bench_end(&b);
}

/* Rows of q and k lie in ggml's order; the matrix says so, and its logical rows are those of the folder. */
static void gguf_rows_are_put_back(void **state)
{
    struct bench b;
    tp_model *hf, *gguf;
    char path[1024];
    float x[256], y[256];
    (void)state;
    if (!tp_path_exists(golden_path(path, sizeof path, "gguf/tiny_hf"))) skip(); /* the repository holds a subset */
    bench_begin(&b, "cpu");
    assert_ok(&b.ctx, open_with(&b, path, TP_F32, true, &hf));
    assert_ok(&b.ctx, open_with(&b, golden_path(path, sizeof path, "gguf/tiny_bf16.gguf"), TP_F32, true, &gguf));
    assert_int_equal(gguf->n_linears, hf->n_linears);
    for (size_t i = 0; i < hf->n_linears; i++) {
        const tp_matrix *a = &hf->linears[i]->weight, *c = &gguf->linears[i]->weight;
        assert_string_equal(hf->linears[i]->path, gguf->linears[i]->path);
        assert_int_equal(a->rows, c->rows);
        assert_true((c->rope_pairs > 0) ==
                    (strstr(hf->linears[i]->path, "q_proj") != NULL || strstr(hf->linears[i]->path, "k_proj") != NULL));
        for (int64_t r = 0; r < a->rows; r++) {
            tp_formats[a->format].decode((const char *)a->data + (size_t)(r * tp_format_row_bytes(a->format, a->cols)), 0,
                                         a->cols, x);
            tp_formats[c->format].decode((const char *)c->data +
                                             (size_t)(tp_matrix_stored_row(c, r) * tp_format_row_bytes(c->format, c->cols)),
                                         0, c->cols, y);
            if (memcmp(x, y, (size_t)a->cols * sizeof *x) != 0)
                fail_msg("%s: row %lld differs", hf->linears[i]->path, (long long)r);
        }
    }
    tp_model_free(hf);
    tp_model_free(gguf);
    bench_end(&b);
}

/* ---- memory ---- */

static tp_status open_and_free(struct bench *b)
{
    tp_model *m = NULL;
    tp_status status = open_with(b, b->files.folder, TP_BF16, true, &m);
    tp_model_free(m);
    return status;
}

static void every_allocation_may_fail(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b, "cpu");
    make_folder(&b, &(struct folder){.dtype = TP_F32, .extra = "strange"});
    assert_survives_failing_memory(&b.ctx, open_and_free(&b));
    make_shards(&b, "a.safetensors", "b.safetensors", 1000);
    assert_int_equal(unlink(scratch_path(&b.files, "model.safetensors")), 0);
    assert_survives_failing_memory(&b.ctx, open_and_free(&b));
    bench_end(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_tensor_reaches_its_place),
        cmocka_unit_test(narrow_compute_narrows),
        cmocka_unit_test(narrowing_is_round_to_nearest_even),
        cmocka_unit_test(tied_heads),
        cmocka_unit_test(wrong_tensors_are_named),
        cmocka_unit_test(values_that_are_not_finite_are_found),
        cmocka_unit_test(values_beyond_f16_are_found),
        cmocka_unit_test(missing_files),
        cmocka_unit_test(shards_and_their_index),
        cmocka_unit_test(a_tensor_in_two_shards),
        cmocka_unit_test(a_file_that_changes_is_noticed),
        cmocka_unit_test(fingerprints_tell_models_apart),
        cmocka_unit_test(plans_have_the_right_size),
        cmocka_unit_test(gguf_files_we_cannot_run_are_refused),
        cmocka_unit_test(gguf_scales_are_checked),
        cmocka_unit_test(gguf_rows_are_put_back),
        cmocka_unit_test(every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
