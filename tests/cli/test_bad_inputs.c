/* Every file of golden/bad through the command line: verdict and exit class of its record, what the message must name, one
 * clean last line on stderr, and outputs that stay as they were. The readers' own tests look at the same files from inside. */
#include "tests/support.h"

#include <unistd.h>

#include "base/json.h"
#include "base/mem.h"
#include "base/safetensors.h"
#include "tests/cli/process.h"
#include "tests/scratch.h"

struct bench {
    scratch s;
    tp_ctx ctx;
    tp_json_doc *index;
    char log[1024], outputs[1024], old_file[1100]; /* outputs: a folder with one file that no refusal may touch */
    char model[1024], ids[1024], texts[1024];      /* a small model of our own, token ids and rows of text for it */
    int judged;
};

static const char *kept(struct bench *b, const char *name, char *out, size_t size)
{
    snprintf(out, size, "%.500s/%.200s", b->s.folder, name);
    return out;
}

static void write_file(const char *path, const char *text)
{
    assert_int_equal(tp_file_write(NULL, path, text, strlen(text)), TP_OK);
}

static void copy_file(const char *from, const char *to)
{
    char *bytes;
    size_t n;
    assert_int_equal(tp_file_read(NULL, from, (size_t)64 << 20, &bytes, &n), TP_OK);
    assert_int_equal(tp_file_write(NULL, to, bytes, n), TP_OK);
    tp_free(bytes);
}

/* Vocabulary of golden/chat's tokenizer, and room for the longest row there is. */
static const char config[] =
    "{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", \"hidden_size\": 64, \"intermediate_size\": 128,\n"
    " \"num_hidden_layers\": 2, \"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"vocab_size\": 460,\n"
    " \"max_position_embeddings\": 16777216, \"rms_norm_eps\": 1e-06, \"rope_theta\": 10000.0, \"hidden_act\": \"silu\",\n"
    " \"tie_word_embeddings\": false, \"bos_token_id\": 1, \"eos_token_id\": 2}\n";

static void bench_begin(struct bench *b)
{
    char path[1024], from[1024];
    *b = (struct bench){.judged = 0};
    tp_ctx_init(&b->ctx);
    scratch_begin(&b->s);
    kept(b, "log", b->log, sizeof b->log);
    kept(b, "outputs", b->outputs, sizeof b->outputs);
    kept(b, "outputs/old.safetensors", b->old_file, sizeof b->old_file);
    kept(b, "model", b->model, sizeof b->model);
    kept(b, "ids.safetensors", b->ids, sizeof b->ids);
    kept(b, "texts.jsonl", b->texts, sizeof b->texts);
    assert_int_equal(tp_folder_make(NULL, b->outputs), TP_OK);
    write_file(b->old_file, "not to be touched");
    const int64_t ids[] = {1, 2, 3, 4};
    const tp_named_array array = {.name = "input_ids", .dtype = TP_I64, .rank = 2, .shape = {1, 4}, .data = ids};
    assert_ok(&b->ctx, tp_safetensors_save(&b->ctx, b->ids, &array, 1, NULL));
    write_file(b->texts, "{\"text\": \"a b  c\"}\n");
    write_file(kept(b, "config.json", path, sizeof path), config);
    check_exit(b->log, run_tapeft(b->log, "init", path, "--out", b->model, "--dtype", "fp32"), 0);
    copy_file(golden_path(from, sizeof from, "chat/tokenizer.json"), kept(b, "model/tokenizer.json", path, sizeof path));
    assert_ok(&b->ctx, tp_json_read(&b->ctx, golden_path(from, sizeof from, "bad/index.json"), (size_t)16 << 20, &b->index));
}

static void bench_end(struct bench *b)
{
    print_message("%d runs\n", b->judged);
    tp_json_free(b->index);
    scratch_end(&b->s);
}

static bool is_text(const tp_json *record, const char *key, const char *text)
{
    return tp_span_is(tp_json_string(tp_json_get(record, key)), text);
}

/* No byte of the output may steer a terminal. */
static void check_manners(struct bench *b, const char *what, const char *text, size_t n)
{
    if (n == 0 || text[n - 1] != '\n') fail_msg("%s: the output does not end in a line", what);
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text[i];
        if ((c < 0x20 && c != '\n') || c == 0x7F) fail_msg("%s: byte 0x%02x in the output %s", what, c, b->log);
    }
    for (size_t i = 0; i < n;) {
        uint32_t codepoint;
        int length = tp_utf8_decode(text + i, n - i, &codepoint);
        if (length <= 0 || (codepoint >= 0x80 && codepoint < 0xA0))
            fail_msg("%s: malformed or control characters in the output at byte %zu", what, i);
        i += (size_t)length;
    }
}

/* Judges one run whose output is in the log: `loads` is the exit status that stands for "accepted". */
static void judge(struct bench *b, const tp_json *record, const char *what, int status, int loads, const char *before)
{
    char *text, wanted[64];
    size_t n;
    int64_t number;
    assert_ok(&b->ctx, tp_file_read(&b->ctx, b->log, (size_t)64 << 20, &text, &n));
    bool refuse = is_text(record, "verdict", "refuse"), accept = is_text(record, "verdict", "accept");
    int class = tp_json_i64(tp_json_get(record, "class"), &number) ? (int)number : 3;
    if (refuse && status != class) fail_msg("%s: exit status %d, expected %d:\n%s", what, status, class, text);
    if (accept && status != loads) fail_msg("%s: exit status %d, expected %d:\n%s", what, status, loads, text);
    if (!refuse && !accept && status != loads && status != 2 && status != 3)
        fail_msg("%s: exit status %d:\n%s", what, status, text);
    if (status != 0) {
        check_manners(b, what, text, n);
        const char *last = text;
        for (const char *p = text; p + 1 < text + n; p++)
            if (*p == '\n') last = p + 1;
        if (strncmp(last, "tapeft: ", 8) != 0 || strlen(last) < 12) fail_msg("%s: the last line is \"%s\"", what, last);
        char *after = describe_folder(b->outputs);
        if (strcmp(before, after) != 0) fail_msg("%s: outputs were touched:\n%s\n%s", what, before, after);
        free(after);
    }
    if (refuse && tp_json_i64(tp_json_get(record, "line"), &number)) {
        snprintf(wanted, sizeof wanted, ":%lld:", (long long)number);
        if (strstr(text, wanted) == NULL) fail_msg("%s: line %lld is not named:\n%s", what, (long long)number, text);
    }
    tp_span nearest = tp_json_string(tp_json_get(record, "nearest"));
    if (nearest.len > 0) {
        snprintf(wanted, sizeof wanted, "%.*s", (int)nearest.len, nearest.data);
        if (strstr(text, wanted) == NULL) fail_msg("%s: %s is not suggested:\n%s", what, wanted, text);
    }
    tp_free(text);
    b->judged++;
}

/* One command on one record. */
static void run_and_judge(struct bench *b, const tp_json *record, int loads, const char *const *arguments)
{
    char what[1400] = "";
    for (size_t i = 0; arguments[i] != NULL; i++)
        snprintf(what + strlen(what), sizeof what - strlen(what), "%s%.300s", i > 0 ? " " : "", arguments[i]);
    char *before = describe_folder(b->outputs);
    (void)unlink(b->log);
    judge(b, record, what, command_run(b->log, arguments), loads, before);
    free(before);
}
#define RUN(b, record, loads, ...) run_and_judge(b, record, loads, (const char *const[]){__VA_ARGS__, NULL})

/* Calls `check` for every record below `folder`. */
static void for_each(struct bench *b, const char *folder,
                     void (*check)(struct bench *b, const tp_json *record, const char *path))
{
    const tp_json *cases = tp_json_get(tp_json_root(b->index), "cases");
    for (size_t i = 0; i < tp_json_count(cases); i++) {
        char relative[300], path[1024];
        const tp_json *record = tp_json_at(cases, i);
        tp_span name = tp_json_string(tp_json_get(record, "path"));
        if (name.len <= strlen(folder) || memcmp(name.data, folder, strlen(folder)) != 0 || name.data[strlen(folder)] != '/')
            continue;
        snprintf(relative, sizeof relative, "bad/%.*s", (int)name.len, name.data);
        check(b, record, golden_path(path, sizeof path, relative));
    }
}

/* ---- one kind each ---- */

static void check_safetensors(struct bench *b, const tp_json *record, const char *path)
{
    RUN(b, record, 0, "inspect", path);
    RUN(b, record, 0, "inspect", path, "--tensors", "--json");
    /* the same file as token ids: whatever it holds, none of it is input_ids */
    if (is_text(record, "verdict", "refuse")) RUN(b, record, 0, "logits", b->model, "--in", path, "--out", b->old_file);
}

static void safetensors(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b);
    for_each(&b, "safetensors", check_safetensors);
    assert_true(b.judged > 150);
    bench_end(&b);
}

static void check_gguf(struct bench *b, const tp_json *record, const char *path)
{
    if (is_text(record, "level", "tokenizer")) {
        RUN(b, record, 0, "tokenize", path, "--in", b->texts);
        return;
    }
    if (!is_text(record, "level", "model")) RUN(b, record, 0, "inspect", path);
    if (is_text(record, "verdict", "refuse")) RUN(b, record, 0, "logits", path, "--in", b->ids, "--out", b->old_file);
}

static void gguf(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b);
    for_each(&b, "gguf", check_gguf);
    assert_true(b.judged > 60);
    bench_end(&b);
}

/* Paths in these recipes do not exist, so an accepted text is refused for its inputs, class 3. */
static void check_yaml(struct bench *b, const tp_json *record, const char *path)
{
    RUN(b, record, 3, "train", path, "--dry-run");
    RUN(b, record, 3, "plan", path);
}

static void yaml(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b);
    for_each(&b, "yaml", check_yaml);
    assert_true(b.judged > 150);
    bench_end(&b);
}

/* `init` makes a model of what is accepted, and that computes; what is refused is so beside good weights too. */
static void check_config(struct bench *b, const tp_json *record, const char *path)
{
    char made[1100], beside[1024], file[1100], out[1100];
    kept(b, "made", made, sizeof made);
    kept(b, "out.safetensors", out, sizeof out);
    RUN(b, record, 0, "init", path, "--out", made);
    if (is_text(record, "verdict", "accept")) {
        RUN(b, record, 0, "logits", made, "--in", b->ids, "--out", out);
        assert_int_equal(tp_folder_remove(NULL, made), TP_OK);
        return;
    }
    if (tp_path_exists(made)) fail_msg("%s: a refused configuration left a model", path);
    kept(b, "beside", beside, sizeof beside);
    assert_int_equal(tp_folder_make(NULL, beside), TP_OK);
    golden_path(file, sizeof file, "bad/adapter/base/model.safetensors");
    copy_file(file, kept(b, "beside/model.safetensors", out, sizeof out));
    copy_file(path, kept(b, "beside/config.json", out, sizeof out));
    RUN(b, record, 0, "logits", beside, "--in", b->ids, "--out", b->old_file);
}

static void configurations(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b);
    for_each(&b, "config", check_config);
    assert_true(b.judged > 80);
    bench_end(&b);
}

static void check_tokenizer(struct bench *b, const tp_json *record, const char *path)
{
    RUN(b, record, 0, "tokenize", path, "--in", b->texts);
}

static void tokenizers(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b);
    for_each(&b, "tokenizer", check_tokenizer);
    assert_true(b.judged > 40);
    bench_end(&b);
}

static void check_jsonl(struct bench *b, const tp_json *record, const char *path)
{
    char recipe[1024], model[1100], data[1100];
    kept(b, "rows.yaml", recipe, sizeof recipe);
    snprintf(model, sizeof model, "base_model=%.1000s", b->model);
    snprintf(data, sizeof data, "datasets.0.path=%.1000s", path);
    write_file(recipe,
               "base_model: x\ndatasets:\n  - {path: x}\nchat_template: chatml\nmax_seq_length: 16777216\nmax_dropped: 0\n"
               "output_dir: unset\n");
    RUN(b, record, 0, "preview", recipe, model, data, "--rows", "1");
}

static void rows(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b);
    for_each(&b, "jsonl", check_jsonl);
    assert_true(b.judged > 45);
    bench_end(&b);
}

static void check_adapter(struct bench *b, const tp_json *record, const char *path)
{
    char base[1024], out[1024];
    golden_path(base, sizeof base, "bad/adapter/base");
    if (strcmp(path, base) == 0) return;
    kept(b, "out.safetensors", out, sizeof out);
    bool refuse = is_text(record, "verdict", "refuse");
    RUN(b, record, 0, "logits", base, "--in", b->ids, "--out", refuse ? b->old_file : out, "--adapter", path);
}

static void adapters(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b);
    for_each(&b, "adapter", check_adapter);
    assert_true(b.judged > 40);
    bench_end(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(safetensors), cmocka_unit_test(gguf), cmocka_unit_test(yaml),     cmocka_unit_test(configurations),
        cmocka_unit_test(tokenizers),  cmocka_unit_test(rows), cmocka_unit_test(adapters),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
