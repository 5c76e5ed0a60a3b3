/* Recordings of micro-batches: which shapes are recorded and when, what happens where that fails, how batches are filled up;
 * and whole runs whose kernels are copied when they are called and called again from the copies, with other segments if need
 * be, which leave the same bytes as runs without: nothing else that a kernel was told may change from one micro-batch of a
 * shape to the next. The CPU's kernels stand in for a GPU's. */
#include "tests/support.h"

#include <stdlib.h>

#include "base/log.h"
#include "base/mem.h"
#include "base/safetensors.h"
#include "tests/trainers/training.h"
#include "trainers/replay.h"

/* ---- a device that records ---- */

struct call {
    int kernel;
    void *args, *more; /* more: host memory that args point to */
    struct call *next;
};

struct tp_graph {
    struct call *first, **last;
};

static struct tp_graph *open_graph; /* while it records */
static int begun, ended, launched, freed, turned;
static bool begin_fails, end_fails, launch_fails, turn_fails, nothing_fits;

static const size_t arg_bytes[] = {
#define TP_KERNEL(name, type) sizeof(type),
#include "backend/kernels.def"
#undef TP_KERNEL
};

static void *copy_of(const void *bytes, size_t n)
{
    void *copy = malloc(n > 0 ? n : 1);
    assert_non_null(copy);
    return memcpy(copy, bytes, n);
}

static void copy_segments(struct call *call, tp_attention_args *a)
{
    call->more = copy_of(a->segments, (size_t)a->n_segments * sizeof *a->segments);
    a->segments = call->more;
}

static tp_status note_call(int kernel, const void *args)
{
    struct call *call = calloc(1, sizeof *call);
    assert_non_null(call);
    call->kernel = kernel;
    call->args = copy_of(args, arg_bytes[kernel]);
    if (kernel == TP_KERNEL_attention) copy_segments(call, call->args);
    if (kernel == TP_KERNEL_attention_backward) copy_segments(call, &((tp_attention_backward_args *)call->args)->forward);
    if (kernel == TP_KERNEL_matmul) {
        tp_matmul_args *a = call->args;
        if (a->lowrank != NULL) a->lowrank = call->more = copy_of(a->lowrank, sizeof *a->lowrank);
    }
    *open_graph->last = call;
    open_graph->last = &call->next;
    return TP_OK;
}

#define TP_KERNEL(name, type)                                                                                                  \
    static tp_status fake_##name(tp_ctx *ctx, const void *args)                                                                \
    {                                                                                                                          \
        if (open_graph != NULL) return note_call(TP_KERNEL_##name, args);                                                      \
        return tp_cpu_backend.kernels[TP_KERNEL_##name](ctx, args);                                                            \
    }
#include "backend/kernels.def"
#undef TP_KERNEL

static tp_status fake_copy_in(tp_ctx *ctx, void *to, const void *from, size_t bytes)
{
    if (open_graph != NULL) return tp_fail(ctx, TP_DEVICE, "a copy while kernels are recorded");
    return tp_cpu_backend.copy_in(ctx, to, from, bytes);
}

static tp_status fake_copy_out(tp_ctx *ctx, void *to, const void *from, size_t bytes)
{
    if (open_graph != NULL) return tp_fail(ctx, TP_DEVICE, "a copy while kernels are recorded");
    return tp_cpu_backend.copy_out(ctx, to, from, bytes);
}

static void fake_free(tp_device *device, tp_graph *graph)
{
    (void)device;
    for (struct call *call = graph->first, *next; call != NULL; call = next) {
        next = call->next;
        free(call->args);
        free(call->more);
        free(call);
    }
    free(graph);
    freed++;
}

static tp_status fake_begin(tp_ctx *ctx)
{
    begun++;
    if (begin_fails) return tp_fail(ctx, TP_DEVICE, "no recording today");
    open_graph = calloc(1, sizeof *open_graph);
    assert_non_null(open_graph);
    open_graph->last = &open_graph->first;
    return TP_OK;
}

static tp_status fake_end(tp_ctx *ctx, tp_graph **graph)
{
    tp_graph *made = open_graph;
    open_graph = NULL;
    ended++;
    if (graph != NULL && !end_fails) {
        *graph = made;
        return TP_OK;
    }
    fake_free(NULL, made);
    freed--;
    return graph == NULL ? TP_OK : tp_fail(ctx, TP_NOMEM, "no memory for a recording");
}

static tp_status fake_launch(tp_ctx *ctx, tp_graph *graph)
{
    launched++;
    if (launch_fails) return tp_fail(ctx, TP_DEVICE, "it does not start");
    for (struct call *call = graph->first; call != NULL; call = call->next)
        TP_TRY(tp_cpu_backend.kernels[call->kernel](ctx, call->args));
    return TP_OK;
}

static tp_status fake_segments(tp_ctx *ctx, tp_graph *graph, const tp_segment *segments, int64_t n, bool *fits)
{
    turned++;
    *fits = !nothing_fits;
    if (turn_fails) return tp_fail(ctx, TP_DEVICE, "it does not turn");
    for (struct call *call = graph->first; call != NULL && *fits; call = call->next) {
        bool gradient = call->kernel == TP_KERNEL_attention_backward;
        if (!gradient && call->kernel != TP_KERNEL_attention) continue;
        tp_attention_args *a = gradient ? &((tp_attention_backward_args *)call->args)->forward : call->args;
        free(call->more);
        a->segments = segments;
        a->n_segments = n;
        copy_segments(call, a);
    }
    return TP_OK;
}

static void open_recorder(tp_ctx *ctx, tp_backend *fake)
{
    tp_ctx_init(ctx);
    assert_ok(ctx, tp_device_open(ctx, "cpu", 1, &ctx->device));
    *fake = tp_cpu_backend;
    fake->host_memory = false; /* as on a GPU: an arena that is not poisoned when a pass is over */
    fake->copy_in = fake_copy_in;
    fake->copy_out = fake_copy_out;
    fake->capture_begin = fake_begin;
    fake->capture_end = fake_end;
    fake->graph_launch = fake_launch;
    fake->graph_free = fake_free;
    fake->graph_segments = fake_segments;
    fake->recorded_call_bytes = 1;
#define TP_KERNEL(name, type) fake->kernels[TP_KERNEL_##name] = fake_##name;
#include "backend/kernels.def"
#undef TP_KERNEL
    ctx->device->backend = fake;
    begun = ended = launched = freed = turned = 0;
    begin_fails = end_fails = launch_fails = turn_fails = nothing_fits = false;
}

/* ---- which shapes are recorded ---- */

#define MOST 8

struct passes {
    int n;
    uint64_t trace;
    tp_status status; /* while it records */
};

static tp_status count_pass(void *state, const tp_batch *batch, uint64_t *trace)
{
    struct passes *passes = state;
    (void)batch;
    passes->n++;
    *trace = passes->trace;
    return open_graph != NULL ? passes->status : TP_OK;
}

struct bench {
    tp_ctx ctx;
    tp_backend fake;
    tp_replay *replay;
    tp_log log;
    int notes;
    struct passes passes;
};

static void count_note(tp_log_level level, const char *text, void *user)
{
    (void)level, (void)text;
    ++*(int *)user;
}

static void bench_begin(struct bench *b)
{
    *b = (struct bench){.notes = 0};
    open_recorder(&b->ctx, &b->fake);
    b->log = (tp_log){.level = TP_LOG_INFO, .sink = count_note, .user = &b->notes};
    b->ctx.log = &b->log;
    assert_ok(&b->ctx, tp_replay_open(&b->ctx, MOST, &b->replay));
}

static void bench_end(struct bench *b)
{
    tp_replay_close(b->replay);
    tp_device_close(b->ctx.device);
}

/* Runs a batch of n rows; what was called: passes (recorded ones too), and replays. */
static void check_run(struct bench *b, int64_t n, int passes, int launches)
{
    tp_segment segment = {0, n, 0, n};
    tp_batch batch = {.n = n, .segments = &segment, .n_segments = 1};
    int passes_before = b->passes.n, launches_before = launched;
    assert_ok(&b->ctx, tp_replay_run(&b->ctx, b->replay, &batch, false, count_pass, &b->passes));
    assert_int_equal(b->passes.n - passes_before, passes);
    assert_int_equal(launched - launches_before, launches);
}

static void test_second_time(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b);
    check_run(&b, 7, 1, 0);
    check_run(&b, 8, 1, 0);
    check_run(&b, 7, 1, 1); /* recorded, and launched */
    for (int i = 0; i < 5; i++) check_run(&b, 7, 0, 1);
    check_run(&b, 8, 1, 1);
    check_run(&b, 7, 0, 1);
    assert_int_equal(begun, 2);
    assert_int_equal(ended, 2);
    bench_end(&b);
    assert_int_equal(freed, 2);
}

/* Whatever differs, in the batch or in a segment, is another shape; the segments are the replay's own. */
static void test_whole_key(void **state)
{
    struct bench b;
    tp_segment segments[3] = {{0, 3, 0, 3}, {3, 4, 3, 4}, {7, 2, 7, 2}}, others[3];
    tp_batch batch = {.n = 9, .segments = segments, .n_segments = 3}, other;
    (void)state;
    for (size_t word = 0; word < sizeof batch + sizeof segments; word += sizeof(int64_t)) {
        bool in_batch = word < sizeof batch;
        if (in_batch && word == offsetof(tp_batch, segments)) continue;
        bench_begin(&b);
        for (int i = 0; i < 2; i++) assert_ok(&b.ctx, tp_replay_run(&b.ctx, b.replay, &batch, false, count_pass, &b.passes));
        assert_int_equal(launched, 1);
        memcpy(&other, &batch, sizeof other);
        memcpy(others, segments, sizeof others);
        char *bytes = in_batch ? (char *)&other + word : (char *)others + (word - sizeof batch);
        *bytes = (char)(word == offsetof(tp_batch, n_segments) ? 2 : *bytes + 1);
        other.segments = others;
        assert_ok(&b.ctx, tp_replay_run(&b.ctx, b.replay, &other, false, count_pass, &b.passes));
        assert_int_equal(launched, 1);
        memcpy(others, segments, sizeof others); /* equal segments elsewhere */
        other = batch;
        other.segments = others;
        assert_ok(&b.ctx, tp_replay_run(&b.ctx, b.replay, &other, false, count_pass, &b.passes));
        assert_int_equal(launched, 2);
        bench_end(&b);
    }
}

/* There are never more recordings than MOST, and further ones have to be paid for by replays. */
static void test_bounds(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b);
    for (int round = 0; round < 2; round++)
        for (int64_t n = 1; n <= MOST; n++) check_run(&b, n, 1, round);
    for (int i = 0; i < 3; i++) check_run(&b, 100, 1, 0); /* no place */
    assert_int_equal(begun, MOST);
    while (launched < 8 * MOST) check_run(&b, 1, 0, 1);
    check_run(&b, 100, 1, 1); /* in the place of 2, which was used longest ago */
    assert_int_equal(freed, 1);
    check_run(&b, 3, 0, 1);
    check_run(&b, 2, 1, 0);
    assert_int_equal(begun, MOST + 1);
    for (int64_t n = 1000; n < 1000 + 5 * TP_REPLAY_SHAPES; n++) check_run(&b, n, 1, 0); /* shapes that never come back */
    check_run(&b, 100, 0, 1);
    assert_int_equal(begun - freed, MOST);
    bench_end(&b);
    assert_int_equal(begun, freed);
}

/* A shape whose passes take different places. */
static void test_other_places(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b);
    check_run(&b, 7, 1, 0);
    b.passes.trace = 1;
    check_run(&b, 7, 2, 0); /* what was recorded is dropped, and the pass runs */
    check_run(&b, 7, 1, 0);
    check_run(&b, 8, 1, 0);
    check_run(&b, 8, 1, 1); /* others go on */
    assert_int_equal(b.notes, 1);
    bench_end(&b);
}

static void test_failures(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        struct bench b;
        bench_begin(&b);
        begin_fails = i == 0;
        b.passes.status = i == 1 ? TP_DEVICE : TP_OK;
        end_fails = i == 2;
        check_run(&b, 7, 1, 0);
        check_run(&b, 7, i == 0 ? 1 : 2, 0);
        assert_int_equal(b.ctx.status, TP_OK);
        for (int k = 0; k < 4; k++) check_run(&b, 7 + k % 2, 1, 0);
        assert_int_equal(begun, 1);
        assert_int_equal(b.notes, 1);
        bench_end(&b);
    }
    struct bench b;
    tp_batch batch = {.n = 1};
    tp_segment none;
    batch.segments = &none;
    bench_begin(&b);
    for (int i = 0; i < 2; i++) assert_ok(&b.ctx, tp_replay_run(&b.ctx, b.replay, &batch, false, count_pass, &b.passes));
    launch_fails = true; /* is no matter of recording */
    assert_status(&b.ctx, TP_DEVICE, tp_replay_run(&b.ctx, b.replay, &batch, false, count_pass, &b.passes));
    bench_end(&b);
}

/* Batches of one number of rows whose segments are no part of the shape: the recording is turned to them, or they run as they
 * are. */
static void check_segments(struct bench *b, int64_t first, int passes, int turns, int launches)
{
    tp_segment segments[2] = {{0, first, 0, first}, {first, 2, first, 2}};
    tp_batch batch = {.n = 9, .segments = segments, .n_segments = first > 4 ? 1 : 2, .max_position = first, .n_tokens = first};
    int passes_before = b->passes.n, launches_before = launched, turns_before = turned;
    assert_ok(&b->ctx, tp_replay_run(&b->ctx, b->replay, &batch, true, count_pass, &b->passes));
    assert_int_equal(b->passes.n - passes_before, passes);
    assert_int_equal(turned - turns_before, turns);
    assert_int_equal(launched - launches_before, launches);
}

static void test_any_segments(void **state)
{
    struct bench b;
    (void)state;
    bench_begin(&b);
    check_segments(&b, 3, 1, 0, 0);
    check_segments(&b, 4, 1, 0, 1); /* recorded with these */
    check_segments(&b, 4, 0, 0, 1);
    check_segments(&b, 5, 0, 1, 1);
    check_segments(&b, 5, 0, 0, 1);
    nothing_fits = true;
    check_segments(&b, 4, 1, 1, 0);
    check_segments(&b, 5, 0, 0, 1); /* as it was */
    nothing_fits = false;
    check_segments(&b, 3, 0, 1, 1);
    check_run(&b, 9, 1, 0); /* where segments count, it is another shape */
    assert_int_equal(tp_replay_count(b.replay), 6);
    turn_fails = true;
    check_segments(&b, 4, 1, 1, 0);
    assert_int_equal(b.notes, 1);
    assert_int_equal(b.ctx.status, TP_OK);
    check_segments(&b, 3, 1, 0, 0);
    bench_end(&b);
    assert_int_equal(begun, freed);
}

/* ---- filling up ---- */

static void fill_with(tp_ctx *ctx, tp_host_batch *batch, int64_t lengths[], int n, int64_t labels)
{
    *batch = (tp_host_batch){.n = 0};
    for (int i = 0; i < n; i++) batch->n += lengths[i];
    batch->capacity = (size_t)batch->n + 1;
    batch->ids = tp_alloc(ctx, batch->capacity, sizeof *batch->ids);
    batch->positions = tp_alloc(ctx, batch->capacity, sizeof *batch->positions);
    batch->label_rows = tp_alloc(ctx, batch->capacity, sizeof *batch->label_rows);
    batch->labels = tp_alloc(ctx, batch->capacity, sizeof *batch->labels);
    batch->segments = tp_alloc(ctx, batch->capacity, sizeof *batch->segments);
    for (int64_t i = 0, start = 0; i < n; start += lengths[i++]) {
        batch->segments[batch->n_segments++] = (tp_segment){start, lengths[i], start, lengths[i]};
        batch->n_tokens += lengths[i];
    }
    batch->n_labels = labels;
}

static void check_filled(int64_t lengths[], int n, int64_t labels, int64_t rows, int64_t filled_labels, bool any_segments)
{
    tp_ctx ctx;
    tp_host_batch batch;
    tp_buckets buckets = tp_buckets_for(2048, 1000);
    tp_ctx_init(&ctx);
    fill_with(&ctx, &batch, lengths, n, labels);
    int64_t n_before = batch.n;
    assert_ok(&ctx, tp_buckets_fill(&ctx, &buckets, &batch));
    assert_int_equal(batch.n, rows);
    assert_int_equal(batch.n_labels, filled_labels);
    assert_int_equal(batch.any_segments, any_segments);
    assert_int_equal(batch.n_tokens, n_before);
    assert_int_equal(batch.n_segments, n);
    for (int64_t i = 0; i < batch.n; i++) assert_true(batch.ids[i] == (i < n_before ? 0 : -1) && batch.positions[i] == 0);
    for (int64_t i = 0; i < batch.n_labels; i++)
        assert_true(batch.labels[i] == (i < labels ? 0 : -1) && batch.label_rows[i] == batch.labels[i]);
    tp_host_batch_free(&batch);
}

/* Steps of 192 rows and of 128 or 112 labels, up to the largest batch. */
static void test_filling(void **state)
{
    (void)state;
    check_filled((int64_t[]){100}, 1, 99, 192, 128, true);
    check_filled((int64_t[]){100, 93}, 2, 1, 384, 128, true);
    check_filled((int64_t[]){100, 92}, 2, 128, 192, 128, true);
    check_filled((int64_t[]){1000, 1047}, 2, 999, 2048, 1000, true);
    check_filled((int64_t[]){1024, 1024}, 2, 129, 2048, 256, false); /* comes again as it is */
    check_filled((int64_t[]){2048}, 1, 1000, 2048, 1000, false);
    check_filled((int64_t[]){1000, 1048}, 2, 1000, 2048, 1000, true);
    check_filled((int64_t[]){100, 50}, 2, 0, 150, 0, false); /* has no gradient and is left out */
}

/* ---- whole runs ---- */

#define BATCHES 12
#define ROWS    2
#define COLUMNS 12

/* Micro-batches of full rows, of other lengths each time, and with labels for a part. */
static void write_batches(tp_ctx *ctx, const char *path)
{
    int64_t ids[BATCHES * ROWS * COLUMNS], mask[BATCHES * ROWS * COLUMNS], labels[BATCHES * ROWS * COLUMNS];
    for (int64_t i = 0; i < BATCHES * ROWS * COLUMNS; i++) {
        int64_t batch = i / (ROWS * COLUMNS), row = i / COLUMNS % ROWS, column = i % COLUMNS;
        ids[i] = 3 + (i * 7919 + batch) % 60;
        mask[i] = !(batch % 3 == 1 && row == 1 && column >= 4 + batch / 3);
        labels[i] = mask[i] == 1 && !(batch % 3 == 2 && column < 4) ? ids[i] : -100;
    }
    tp_named_array arrays[] = {
        {.name = "attention_mask", .data = mask}, {.name = "input_ids", .data = ids}, {.name = "labels"}};
    arrays[2].data = labels;
    for (int i = 0; i < 3; i++) {
        arrays[i].dtype = TP_I64;
        arrays[i].rank = 3;
        arrays[i].shape[0] = BATCHES, arrays[i].shape[1] = ROWS, arrays[i].shape[2] = COLUMNS;
    }
    assert_ok(ctx, tp_safetensors_save(ctx, path, arrays, 3, NULL));
}

static void run(const char *text, const char *output, const char *more, bool records, tp_buf *bytes)
{
    static const char *const files[] = {"metrics.jsonl", "adapter/adapter_model.safetensors"};
    tp_ctx ctx;
    tp_backend fake;
    scratch s;
    tp_buf recipe;
    tp_train_options options = {.force = false};
    open_recorder(&ctx, &fake);
    scratch_begin(&s);
    tp_buf_init(&recipe, 0);
    if (!records) fake.capture_begin = NULL;
    write_batches(&ctx, scratch_path(&s, "batches.safetensors"));
    tp_buf_printf(&recipe, "%s%s\ndatasets:\n  - {path: %s, type: tokens}\noutput_dir: %s/%s\n", text, more, s.path, s.folder,
                  output);
    assert_ok(&ctx, train_recipe(&ctx, &s, tp_buf_cstr(&recipe), &options));
    for (int i = 0; i < 2; i++) {
        char path[1200], *content;
        size_t n;
        snprintf(path, sizeof path, "%s/%s/%s", s.folder, output, files[i]);
        assert_ok(&ctx, tp_file_read(&ctx, path, (size_t)1 << 26, &content, &n));
        tp_buf_append(bytes, content, n);
        tp_free(content);
    }
    tp_buf_free(&recipe);
    scratch_end(&s);
    tp_device_close(ctx.device);
}

static void check_same(const char *more)
{
    char base[1024], text[2000];
    tp_buf plain, replayed;
    golden_path(base, sizeof base, "models/llama");
    snprintf(text, sizeof text,
             "base_model: %s\nadapter: lora\nlora_r: 4\nlora_target_modules: all-linear\nshuffle: false\nmax_steps: 60\n",
             base);
    tp_buf_init(&plain, 0);
    tp_buf_init(&replayed, 0);
    run(text, "plain", more, false, &plain);
    assert_int_equal(launched, 0);
    run(text, "replayed", more, true, &replayed);
    assert_true(launched >= 40);
    assert_int_equal(begun, freed);
    assert_true(plain.len > 0 && plain.len == replayed.len);
    assert_memory_equal(plain.data, replayed.data, plain.len);
    tp_buf_free(&plain);
    tp_buf_free(&replayed);
}

static void test_runs(void **state)
{
    (void)state;
    check_same("precision: fp32\nlearning_rate: 0.01");
    check_same("precision: bf16\nlearning_rate: 0.01\nlr_scheduler: cosine");
    check_same("precision: fp32\nlearning_rate: 0.01\nlora_dropout: 0.1\ngradient_accumulation_steps: 4");
    check_same("precision: bf16\nlearning_rate: 0.01\nlora_dropout: 0.1\ngradient_checkpointing: full");
    check_same("precision: fp32\nlearning_rate: 1e-6\nspike_zscore: 0.5\noptimizer: sgd\nmomentum: 0.9");
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_second_time), cmocka_unit_test(test_whole_key),
                                       cmocka_unit_test(test_bounds),      cmocka_unit_test(test_other_places),
                                       cmocka_unit_test(test_failures),    cmocka_unit_test(test_any_segments),
                                       cmocka_unit_test(test_filling),     cmocka_unit_test(test_runs)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
