/* metrics.jsonl and timing.jsonl: rows as promised, cut back on resume, and a full disk that does not stop a run. */
#include "tests/support.h"

#include <math.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "base/mem.h"
#include "tests/scratch.h"
#include "trainers/metrics.h"

struct fixture {
    tp_ctx ctx;
    tp_log log;
    scratch s;
    int warnings;
    char last[512];
};

static void count_warning(tp_log_level level, const char *text, void *user)
{
    struct fixture *f = user;
    f->warnings += level >= TP_LOG_WARN;
    snprintf(f->last, sizeof f->last, "%s", text);
}

static void begin(struct fixture *f)
{
    tp_ctx_init(&f->ctx);
    f->log = (tp_log){TP_LOG_INFO, count_warning, f};
    f->ctx.log = &f->log;
    f->warnings = 0;
    scratch_begin(&f->s);
}

static char *read_log(struct fixture *f, const char *name)
{
    char *text;
    size_t n;
    assert_ok(&f->ctx, tp_file_read(&f->ctx, scratch_path(&f->s, name), (size_t)1 << 20, &text, &n));
    return text;
}

static void assert_text(struct fixture *f, const char *name, const char *expected)
{
    char *text = read_log(f, name);
    assert_string_equal(text, expected);
    tp_free(text);
}

static tp_step_report report_of(int64_t step)
{
    return (tp_step_report){.step = step,
                            .steps = 10,
                            .loss = 2.5,
                            .grad_norm = 0.125,
                            .learning_rate = 1e-4,
                            .labels = 30,
                            .tokens = 64,
                            .seconds = 0.5,
                            .replayed = -1};
}

/* Steps first..last, an evaluation after every third. */
static void write_steps(struct fixture *f, int64_t cut, int64_t first, int64_t last)
{
    tp_metrics *m;
    assert_ok(&f->ctx, tp_metrics_open(&f->ctx, f->s.folder, cut, false, &m));
    for (int64_t step = first; step <= last; step++) {
        tp_step_report r = report_of(step);
        r.loss = 1.0 / (double)step;
        tp_metrics_step(&f->ctx, m, &r, true);
        if (step % 3 == 0) tp_metrics_eval(&f->ctx, m, step, 0.5);
    }
    tp_metrics_close(m);
}

static void test_rows(void **state)
{
    struct fixture f;
    tp_metrics *m;
    (void)state;
    begin(&f);
    assert_ok(&f.ctx, tp_metrics_open(&f.ctx, f.s.folder, 0, false, &m));
    tp_step_report r = report_of(1);
    r.loss = 1.0f / 3.0f;
    tp_metrics_step(&f.ctx, m, &r, true);
    r = report_of(2);
    tp_metrics_step(&f.ctx, m, &r, false); /* logging_steps leaves it out */
    r = report_of(3);
    r.loss = NAN;
    r.grad_norm = INFINITY;
    tp_metrics_step(&f.ctx, m, &r, true);
    tp_metrics_eval(&f.ctx, m, 3, 1.75);
    tp_metrics_eval(&f.ctx, m, 4, NAN);
    tp_metrics_close(m);
    assert_text(
        &f, "metrics.jsonl",
        "{\"step\": 1, \"loss\": 0.333333343, \"grad_norm\": 0.125, \"learning_rate\": 0.0001, \"labels\": 30, \"tokens\": "
        "64}\n"
        "{\"step\": 3, \"loss\": null, \"grad_norm\": null, \"learning_rate\": 0.0001, \"labels\": 30, \"tokens\": 64}\n"
        "{\"step\": 3, \"eval_loss\": 1.75}\n"
        "{\"step\": 4, \"eval_loss\": null}\n");
    char *timing = read_log(&f, "timing.jsonl");
    assert_true(tp_starts_with(timing, "{\"step\": 1, \"seconds\": 0.5, "));
    assert_non_null(strstr(timing, "\"tokens_per_second\": 128, \"peak_bytes\": "));
    assert_null(strstr(timing, "\"step\": 2"));
    tp_free(timing);
    scratch_end(&f.s);
}

/* Nine digits bring every f32 back. */
static void test_digits(void **state)
{
    struct fixture f;
    tp_metrics *m;
    (void)state;
    begin(&f);
    assert_ok(&f.ctx, tp_metrics_open(&f.ctx, f.s.folder, 0, false, &m));
    uint32_t bits = 0x3f800001u;
    for (int64_t step = 1; step <= 500; step++, bits += 9176731u) {
        tp_step_report r = report_of(step);
        float loss;
        memcpy(&loss, &bits, 4);
        r.loss = loss;
        tp_metrics_step(&f.ctx, m, &r, true);
    }
    tp_metrics_close(m);
    char *text = read_log(&f, "metrics.jsonl"), *line = text;
    bits = 0x3f800001u;
    for (int i = 0; i < 500; i++, bits += 9176731u, line = strchr(line, '\n') + 1) {
        tp_json_doc *doc;
        double value;
        float wanted;
        memcpy(&wanted, &bits, 4);
        assert_ok(&f.ctx, tp_json_parse(&f.ctx, line, strcspn(line, "\n"), &(tp_json_options){.name = "row"}, &doc));
        if (isfinite(wanted)) {
            assert_true(tp_json_f64(tp_json_get(tp_json_root(doc), "loss"), &value));
            assert_true((float)value == wanted);
        }
        tp_json_free(doc);
    }
    tp_free(text);
    scratch_end(&f.s);
}

/* Going on from a step gives the bytes of a run that never stopped. */
static void test_cut_back(void **state)
{
    struct fixture whole;
    (void)state;
    begin(&whole);
    write_steps(&whole, 0, 1, 9);
    char *expected = read_log(&whole, "metrics.jsonl");
    for (int64_t reached = 1; reached <= 9; reached++)
        for (int64_t from = 0; from <= reached; from++) {
            struct fixture f;
            begin(&f);
            write_steps(&f, 0, 1, reached);
            write_steps(&f, from, from + 1, 9);
            assert_text(&f, "metrics.jsonl", expected);
            scratch_end(&f.s);
        }
    tp_free(expected);
    scratch_end(&whole.s);
}

/* A kill inside a write: whatever is left of the last row goes. */
static void test_torn_row(void **state)
{
    struct fixture f;
    (void)state;
    begin(&f);
    write_steps(&f, 0, 1, 9);
    char *expected = read_log(&f, "metrics.jsonl");
    size_t all = strlen(expected), kept = (size_t)(strstr(expected, "{\"step\": 5") - expected);
    for (size_t n = kept + 1; n < kept + 60; n++) { /* torn inside the row of step 5 */
        assert_ok(&f.ctx, tp_file_write(&f.ctx, scratch_path(&f.s, "metrics.jsonl"), expected, n));
        write_steps(&f, 4, 5, 9);
        assert_text(&f, "metrics.jsonl", expected);
    }
    static const char *const foreign[] = {"nonsense\n", "{\"no\": 1}\n", "\n", "[]\n", "{\"step\": 4.5}\n"};
    for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++) {
        char *text = malloc(all + 64);
        int n = snprintf(text, all + 64, "%.*s%s%s", (int)kept, expected, foreign[i], expected + kept);
        assert_ok(&f.ctx, tp_file_write(&f.ctx, scratch_path(&f.s, "metrics.jsonl"), text, (size_t)n));
        write_steps(&f, 4, 5, 9);
        assert_text(&f, "metrics.jsonl", expected);
        free(text);
    }
    tp_free(expected);
    scratch_end(&f.s);
}

static void test_fresh_start(void **state)
{
    struct fixture f;
    (void)state;
    begin(&f);
    write_steps(&f, 0, 1, 9);
    write_steps(&f, 0, 1, 0); /* nothing, from the beginning */
    assert_text(&f, "metrics.jsonl", "");
    assert_text(&f, "timing.jsonl", "");
    scratch_end(&f.s);
}

/* Each log is warned about once, the run goes on, and what was written before stays. */
static void test_full_disk(void **state)
{
    struct fixture f;
    struct rlimit before, small;
    (void)state;
    begin(&f);
    write_steps(&f, 0, 1, 9);
    char *expected = read_log(&f, "metrics.jsonl");
    tp_metrics *m;
    assert_ok(&f.ctx, tp_metrics_open(&f.ctx, f.s.folder, 0, false, &m));
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    small = (struct rlimit){300, before.rlim_max};
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    for (int64_t step = 1; step <= 9; step++) {
        tp_step_report r = report_of(step);
        r.loss = 1.0 / (double)step;
        tp_metrics_step(&f.ctx, m, &r, true);
    }
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    signal(SIGXFSZ, handler);
    tp_metrics_close(m);
    assert_int_equal(f.warnings, 2);
    assert_true(strstr(f.last, "jsonl") != NULL && strstr(f.last, "goes on") != NULL);
    assert_int_equal(f.ctx.status, TP_OK);
    char *text = read_log(&f, "metrics.jsonl");
    assert_true(strlen(text) <= 300 && strlen(text) > 100);
    assert_memory_equal(text, expected, strlen(text));
    tp_free(text);
    write_steps(&f, 2, 3, 9); /* and a resumed run repairs it */
    assert_text(&f, "metrics.jsonl", expected);
    tp_free(expected);
    scratch_end(&f.s);
}

/* Neither follows a link out of the folder nor starts without its logs. */
static void test_cannot_open(void **state)
{
    struct fixture f;
    tp_metrics *m;
    (void)state;
    begin(&f);
    assert_int_equal(symlink("/dev/full", scratch_path(&f.s, "timing.jsonl")), 0);
    assert_status(&f.ctx, TP_IO_WRITE, tp_metrics_open(&f.ctx, f.s.folder, 0, false, &m));
    assert_int_equal(unlink(f.s.path), 0);
    assert_int_equal(unlink(scratch_path(&f.s, "metrics.jsonl")), 0);
    assert_ok(&f.ctx, tp_folder_make(&f.ctx, scratch_path(&f.s, "metrics.jsonl")));
    assert_status(&f.ctx, TP_IO_WRITE, tp_metrics_open(&f.ctx, f.s.folder, 0, false, &m));
    assert_status(&f.ctx, TP_IO_WRITE, tp_metrics_open(&f.ctx, scratch_path(&f.s, "absent"), 0, false, &m));
    scratch_end(&f.s);
}

static void test_process(void **state)
{
    (void)state;
    uint64_t before = tp_resident_bytes();
    size_t n = (size_t)64 << 20;
    char *memory = malloc(n);
    for (size_t i = 0; i < n; i += 4096) ((volatile char *)memory)[i] = 1;
    uint64_t after = tp_resident_bytes(), peak = tp_peak_resident_bytes();
    free(memory);
    assert_true(before > 0 && after >= before + n / 2);
    assert_true(peak >= before + n / 2);
    double start = tp_now();
    assert_true(tp_now() >= start && start > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows),        cmocka_unit_test(test_digits),      cmocka_unit_test(test_cut_back),
        cmocka_unit_test(test_torn_row),    cmocka_unit_test(test_fresh_start), cmocka_unit_test(test_full_disk),
        cmocka_unit_test(test_cannot_open), cmocka_unit_test(test_process),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
