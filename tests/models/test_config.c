/* config.json and GGUF metadata: verdicts over the malformed set, sizes against the tensors of real files, writing back. */
#include "tests/support.h"

#include "base/file.h"
#include "base/gguf.h"
#include "base/json.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/safetensors.h"
#include "models/config.h"

static void count_line(tp_log_level level, const char *text, void *user)
{
    (void)text;
    if (level == TP_LOG_INFO) ++*(int *)user;
}

static tp_status parse(tp_ctx *ctx, const char *text, tp_model_config *config)
{
    tp_json_doc *doc = NULL;
    tp_json_options options = {.name = "config.json"};
    TP_TRY(tp_json_parse(ctx, text, strlen(text), &options, &doc));
    tp_status status = tp_config_from_json(ctx, doc, config);
    tp_json_free(doc);
    return status;
}

/* A llama of 4 heads with more members. */
static tp_status parse_llama(tp_ctx *ctx, const char *members, tp_model_config *config)
{
    char text[2048];
    snprintf(text, sizeof text,
             "{\"model_type\": \"llama\", \"hidden_size\": 64, \"intermediate_size\": 128, \"num_hidden_layers\": 2, "
             "\"num_attention_heads\": 4, \"vocab_size\": 160, \"max_position_embeddings\": 256%s%s}",
             members[0] != '\0' ? ", " : "", members);
    return parse(ctx, text, config);
}

/* ---- golden verdicts ---- */

static tp_status read_gguf(tp_ctx *ctx, const char *path, tp_model_config *config)
{
    tp_gguf *file = NULL;
    TP_TRY(tp_gguf_open(ctx, path, &file));
    tp_status status = tp_config_from_gguf(ctx, file, config);
    tp_gguf_close(file);
    return status;
}

static bool is_text(const tp_json *record, const char *key, const char *text)
{
    return tp_span_is(tp_json_string(tp_json_get(record, key)), text);
}

static void every_verdict_holds(void **state)
{
    char path[1024], root[256];
    tp_ctx ctx;
    tp_json_doc *index;
    int judged = 0;
    (void)state;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_json_read(&ctx, golden_path(path, sizeof path, "bad/index.json"), 16 << 20, &index));
    const tp_json *cases = tp_json_get(tp_json_root(index), "cases");
    for (size_t i = 0; i < tp_json_count(cases); i++) {
        const tp_json *record = tp_json_at(cases, i);
        tp_span name = tp_json_string(tp_json_get(record, "path"));
        bool json = name.len > 7 && memcmp(name.data, "config/", 7) == 0;
        bool gguf = name.len > 5 && memcmp(name.data, "gguf/", 5) == 0 && is_text(record, "level", "model");
        if (!json && !gguf) continue;
        snprintf(root, sizeof root, "bad/%.*s", (int)name.len, name.data);
        if (!tp_path_exists(golden_path(path, sizeof path, root))) continue; /* the repository holds a subset */
        tp_model_config config = {0};
        tp_status status = json ? tp_config_read(&ctx, path, &config) : read_gguf(&ctx, path, &config);
        bool accepted = status == TP_OK;
        if (is_text(record, "verdict", "accept") != accepted)
            fail_msg("%s: %s (%s)", path, accepted ? "accepted" : tp_status_name(status), ctx.message);
        if (!accepted && tp_status_exit_code(status) != 3)
            fail_msg("%s: exit %d (%s)", path, tp_status_exit_code(status), ctx.message);
        if (!accepted && strstr(ctx.message, "\n") != NULL) fail_msg("%s: control characters in the message", path);
        tp_config_free(&config);
        tp_ctx_clear(&ctx);
        judged++;
    }
    tp_json_free(index);
    if (judged < 10) fail_msg("only %d cases", judged);
}

/* ---- sizes of real models ---- */

static bool is_buffer(const char *name)
{
    return tp_ends_with(name, ".attn.bias") || tp_ends_with(name, ".attn.masked_bias");
}

/* Elements of all tensors in a folder's safetensors. */
static int64_t count_elements(tp_ctx *ctx, const char *folder)
{
    char path[1200];
    int64_t total = 0;
    for (int shard = 0; shard < 10; shard++) {
        snprintf(path, sizeof path, shard == 0 ? "%s/model.safetensors" : "%s/model-0000%d-of-00005.safetensors", folder,
                 shard);
        if (!tp_path_exists(path)) continue;
        tp_safetensors *file;
        assert_ok(ctx, tp_safetensors_open(ctx, path, &file));
        for (size_t i = 0; i < tp_safetensors_count(file); i++) {
            const tp_entry *e = tp_safetensors_at(file, i);
            if (!is_buffer(e->name)) total += (int64_t)(e->bytes / tp_dtype_bytes(e->dtype));
        }
        tp_safetensors_close(file);
    }
    return total;
}

static const char *const models[] = {
    "llama",      "llama-half", "llama-legacy", "llama-linear", "llama-sharded", "llama-teacher", "llama-tied-biased",
    "llama-yarn", "mistral",    "qwen2",        "qwen3",        "gpt2",          "gpt2-bare"};

static void parameters_are_those_of_the_files(void **state)
{
    char path[1024], relative[128];
    tp_ctx ctx;
    int seen = 0;
    (void)state;
    tp_ctx_init(&ctx);
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        tp_model_config config;
        snprintf(relative, sizeof relative, "models/%s/config.json", models[i]);
        if (!tp_path_exists(golden_path(path, sizeof path, relative))) continue;
        assert_ok(&ctx, tp_config_read(&ctx, path, &config));
        path[strlen(path) - strlen("/config.json")] = '\0';
        assert_int_equal(tp_config_parameters(&config), count_elements(&ctx, path));
        tp_config_free(&config);
        seen++;
    }
    assert_true(seen >= 8);
}

/* SmolLM2-135M: 134,515,008 parameters with its tied head, 106,168,320 of them in linears of blocks. */
static void counts_of_a_published_model(void **state)
{
    tp_ctx ctx;
    tp_model_config c;
    (void)state;
    tp_ctx_init(&ctx);
    assert_ok(
        &ctx,
        parse(&ctx,
              "{\"model_type\": \"llama\", \"hidden_size\": 576, \"intermediate_size\": 1536, \"num_hidden_layers\": 30, "
              "\"num_attention_heads\": 9, \"num_key_value_heads\": 3, \"vocab_size\": 49152, \"tie_word_embeddings\": true}",
              &c));
    assert_int_equal(tp_config_parameters(&c), 134515008);
    assert_int_equal(tp_config_linear_weights(&c), 106168320 + 49152 * 576);
    tp_config_free(&c);
}

/* ---- writing ---- */

static void assert_same(const tp_model_config *a, const tp_model_config *b)
{
    assert_int_equal(a->family, b->family);
    assert_string_equal(a->model_type, b->model_type);
    assert_string_equal(a->architecture, b->architecture);
    const int64_t x[] = {a->vocab_size,   a->hidden_size,   a->intermediate_size,
                         a->n_layers,     a->n_heads,       a->n_kv_heads,
                         a->head_dim,     a->max_positions, a->window,
                         a->bos_id,       a->pad_id,        a->n_eos,
                         a->tied,         a->qkv_bias,      a->o_bias,
                         a->mlp_bias,     a->qk_norm,       a->scale_by_layer,
                         a->activation,   a->dtype,         a->rope.type,
                         a->rope.truncate};
    const int64_t y[] = {b->vocab_size,   b->hidden_size,   b->intermediate_size,
                         b->n_layers,     b->n_heads,       b->n_kv_heads,
                         b->head_dim,     b->max_positions, b->window,
                         b->bos_id,       b->pad_id,        b->n_eos,
                         b->tied,         b->qkv_bias,      b->o_bias,
                         b->mlp_bias,     b->qk_norm,       b->scale_by_layer,
                         b->activation,   b->dtype,         b->rope.type,
                         b->rope.truncate};
    assert_memory_equal(x, y, sizeof x);
    assert_memory_equal(a->eos_ids, b->eos_ids, sizeof *a->eos_ids * (size_t)a->n_eos);
    const double u[] = {a->norm_eps,
                        a->initializer_range,
                        a->rope.theta,
                        a->rope.factor,
                        a->rope.beta_fast,
                        a->rope.beta_slow,
                        a->rope.attention_factor,
                        a->rope.mscale,
                        a->rope.mscale_all_dim,
                        a->rope.low_freq_factor,
                        a->rope.high_freq_factor};
    const double v[] = {b->norm_eps,
                        b->initializer_range,
                        b->rope.theta,
                        b->rope.factor,
                        b->rope.beta_fast,
                        b->rope.beta_slow,
                        b->rope.attention_factor,
                        b->rope.mscale,
                        b->rope.mscale_all_dim,
                        b->rope.low_freq_factor,
                        b->rope.high_freq_factor};
    assert_memory_equal(u, v, sizeof u);
    assert_true((a->slides == NULL) == (b->slides == NULL));
    if (a->slides != NULL) assert_memory_equal(a->slides, b->slides, (size_t)a->n_layers);
    if (a->rope.type == TP_ROPE_LONGROPE)
        assert_memory_equal(a->rope.factors, b->rope.factors, sizeof(float) * (size_t)a->head_dim);
}

static void assert_round_trip(tp_ctx *ctx, tp_model_config *config)
{
    tp_buf text;
    tp_model_config again, copy;
    tp_buf_init(&text, 0);
    tp_config_write_json(config, &text);
    assert_ok(ctx, tp_buf_status(ctx, &text, "config"));
    if (parse(ctx, text.data, &again) != TP_OK) fail_msg("%s\n%s", ctx->message, text.data);
    assert_same(config, &again);
    assert_ok(ctx, tp_config_copy(ctx, config, &copy));
    assert_same(config, &copy);
    tp_config_free(&copy);
    tp_config_free(&again);
    tp_config_free(config);
    tp_buf_free(&text);
}

static void written_configurations_read_back(void **state)
{
    static const char *const members[] = {
        "",
        "\"dtype\": \"float16\", \"eos_token_id\": [2, 5], \"attention_bias\": true, \"mlp_bias\": true, \"head_dim\": 32",
        "\"rope_parameters\": {\"rope_type\": \"linear\", \"factor\": 2.5, \"rope_theta\": 7000.0}",
        "\"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 2}",
        "\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 8, \"original_max_position_embeddings\": 64, \"beta_fast\": 4.0, "
        "\"mscale\": 1.0, "
        "\"mscale_all_dim\": 0.5, \"truncate\": false}",
        "\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, "
        "\"original_max_position_embeddings\": 32}",
        "\"rope_parameters\": {\"rope_type\": \"longrope\", \"rope_theta\": 1e4, \"original_max_position_embeddings\": 12, "
        "\"short_factor\": "
        "[1,1.05,1.1,1.15,1.2,1.25,1.3,1.35], \"long_factor\": [1.5,1.9,2.3,2.7,3,3.4,3.8,4.2]}"};
    char path[1024], relative[128];
    tp_ctx ctx;
    tp_model_config config;
    (void)state;
    tp_ctx_init(&ctx);
    for (size_t i = 0; i < sizeof members / sizeof *members; i++) {
        assert_ok(&ctx, parse_llama(&ctx, members[i], &config));
        assert_round_trip(&ctx, &config);
    }
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        snprintf(relative, sizeof relative, "models/%s/config.json", models[i]);
        if (!tp_path_exists(golden_path(path, sizeof path, relative))) continue;
        assert_ok(&ctx, tp_config_read(&ctx, path, &config));
        assert_round_trip(&ctx, &config);
    }
}

/* ---- single rules ---- */

static void unsupported_things_are_named(void **state)
{
    static const struct {
        const char *members, *word;
    } cases[] = {
        {"\"hidden_act\": \"relu\"", "relu"},
        {"\"rope_scaling\": {\"rope_type\": \"mrope\", \"factor\": 2}", "mrope"},
        {"\"partial_rotary_factor\": 0.5", "partial_rotary_factor"},
        {"\"rope_parameters\": {\"full_attention\": {\"rope_type\": \"default\"}}", "layer type"},
        {"\"quantization_config\": {\"quant_method\": \"bitsandbytes\", \"load_in_4bit\": true}", "bitsandbytes"},
        {"\"quantization_config\": {\"quant_method\": \"gptq\", \"bits\": 4}", "gptq"},
        {"\"quantization_config\": {\"quant_method\": \"awq\"}", "awq"},
        {"\"torch_dtype\": \"float8\"", "float8"},
        {"\"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 10000.0, \"partial_rotary_factor\": 0.25}",
         "partial_rotary_factor"},
    };
    tp_ctx ctx;
    tp_model_config config;
    (void)state;
    tp_ctx_init(&ctx);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        tp_status status = parse_llama(&ctx, cases[i].members, &config);
        if (status != TP_UNSUPPORTED || strstr(ctx.message, cases[i].word) == NULL ||
            strncmp(ctx.message, "config.json:1:", 14) != 0)
            fail_msg("%s: %s: %s", cases[i].members, tp_status_name(status), ctx.message);
        tp_ctx_clear(&ctx);
    }
    tp_status status = parse(&ctx, "{\"model_type\": \"gemma\"}", &config);
    assert_int_equal(status, TP_UNSUPPORTED);
    assert_non_null(strstr(ctx.message, "gemma"));
    assert_non_null(strstr(ctx.message, "gpt2"));
}

static void code_in_a_folder_gets_one_note(void **state)
{
    tp_ctx ctx;
    tp_model_config config;
    int notes = 0;
    tp_log log = {TP_LOG_INFO, count_line, &notes};
    (void)state;
    tp_ctx_init(&ctx);
    ctx.log = &log;
    assert_ok(&ctx, parse_llama(&ctx, "\"auto_map\": {\"AutoModel\": \"x.Y\"}, \"trust_remote_code\": true", &config));
    assert_int_equal(notes, 1);
    tp_config_free(&config);
}

static void windows_and_layers(void **state)
{
    static const char base[] = "\"hidden_size\": 64, \"intermediate_size\": 128, \"num_hidden_layers\": 3, "
                               "\"num_attention_heads\": 4, \"vocab_size\": 160";
    static const struct {
        const char *type, *members;
        int64_t window;
        unsigned char slides[3];
    } cases[] = {
        {"mistral", "\"sliding_window\": 5", 5, {1, 1, 1}},
        {"mistral", "\"sliding_window\": null", 0, {0}},
        {"qwen2", "\"sliding_window\": 6, \"use_sliding_window\": true, \"max_window_layers\": 1", 6, {0, 1, 1}},
        {"qwen2", "\"sliding_window\": 6, \"use_sliding_window\": false, \"max_window_layers\": 1", 0, {0}},
        {"qwen2", "\"sliding_window\": 6, \"use_sliding_window\": true, \"max_window_layers\": 3", 0, {0}},
        {"qwen3",
         "\"sliding_window\": 6, \"use_sliding_window\": true, \"max_window_layers\": 0, \"layer_types\": [\"full_attention\", "
         "\"sliding_attention\", "
         "\"full_attention\"]",
         6,
         {0, 1, 0}},
    };
    char text[1024];
    tp_ctx ctx;
    tp_model_config c;
    (void)state;
    tp_ctx_init(&ctx);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(text, sizeof text, "{\"model_type\": \"%s\", %s, %s}", cases[i].type, base, cases[i].members);
        assert_ok(&ctx, parse(&ctx, text, &c));
        assert_int_equal(c.window, cases[i].window);
        if (c.window > 0)
            assert_memory_equal(c.slides, cases[i].slides, 3);
        else
            assert_null(c.slides);
        tp_config_free(&c);
    }
    snprintf(
        text, sizeof text,
        "{\"model_type\": \"qwen2\", %s, \"layer_types\": [\"full_attention\", \"chunked_attention\", \"full_attention\"]}",
        base);
    assert_status(&ctx, TP_UNSUPPORTED, parse(&ctx, text, &c));
    snprintf(text, sizeof text, "{\"model_type\": \"qwen2\", %s, \"layer_types\": [\"full_attention\"]}", base);
    assert_status(&ctx, TP_FORMAT, parse(&ctx, text, &c));
}

static void limits_are_inclusive(void **state)
{
    static const struct {
        const char *members;
        bool ok;
    } cases[] = {
        {"\"head_dim\": 262144", true}, /* 4 heads: 2^20 */
        {"\"head_dim\": 262146", false},
        {"\"head_dim\": null", true},
        {"\"rope_theta\": 0.0001", false},
        {"\"eos_token_id\": [1,2,3,4,5,6,7,8]", true},
        {"\"eos_token_id\": [1,2,3,4,5,6,7,8,9]", false},
        {"\"eos_token_id\": null, \"pad_token_id\": -1", true},
        {"\"rope_scaling\": {\"factor\": 2}", false},
        {"\"rope_scaling\": {\"type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4, \"high_freq_factor\": 4, "
         "\"original_max_position_embeddings\": 8}",
         false},
    };
    tp_ctx ctx;
    tp_model_config config;
    (void)state;
    tp_ctx_init(&ctx);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        tp_status status = parse_llama(&ctx, cases[i].members, &config);
        if ((status == TP_OK) != cases[i].ok) fail_msg("%s: %s (%s)", cases[i].members, tp_status_name(status), ctx.message);
        if (status == TP_OK) tp_config_free(&config);
        tp_ctx_clear(&ctx);
    }
}

/* ---- GGUF ---- */

static void gguf_says_the_same_as_its_folder(void **state)
{
    char path[1024];
    tp_ctx ctx;
    tp_model_config a, b;
    (void)state;
    tp_ctx_init(&ctx);
    assert_ok(
        &ctx,
        parse(&ctx, /* the config.json that the file was made from */
              "{\"model_type\": \"llama\", \"dtype\": \"bfloat16\", \"bos_token_id\": 1, \"eos_token_id\": 2, \"hidden_size\": "
              "256, "
              "\"head_dim\": 16, \"intermediate_size\": 64, \"max_position_embeddings\": 512, \"num_attention_heads\": 4, "
              "\"num_hidden_layers\": 2, \"num_key_value_heads\": 2, \"rms_norm_eps\": 1e-05, \"tie_word_embeddings\": true, "
              "\"vocab_size\": 384}",
              &a));
    assert_ok(&ctx, read_gguf(&ctx, golden_path(path, sizeof path, "gguf/tiny_q4_0.gguf"), &b));
    assert_true(a.norm_eps > b.norm_eps * 0.9999999 && a.norm_eps < b.norm_eps * 1.0000001); /* an f32 there */
    b.norm_eps = a.norm_eps;
    b.pad_id = a.pad_id; /* the converter invents one */
    assert_same(&a, &b);
    tp_config_free(&a);
    tp_config_free(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_verdict_holds),
        cmocka_unit_test(parameters_are_those_of_the_files),
        cmocka_unit_test(counts_of_a_published_model),
        cmocka_unit_test(written_configurations_read_back),
        cmocka_unit_test(unsupported_things_are_named),
        cmocka_unit_test(code_in_a_folder_gets_one_note),
        cmocka_unit_test(windows_and_layers),
        cmocka_unit_test(limits_are_inclusive),
        cmocka_unit_test(gguf_says_the_same_as_its_folder),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
