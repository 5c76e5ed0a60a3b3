/* Rows are appended with one write each, so a killed run leaves at most one torn line at the end, which opening cuts off. */
#include "trainers/metrics.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "base/mem.h"

#define LOG_MAX_BYTES  ((size_t)1 << 30)
#define METRICS_DIGITS 9 /* significant digits: exact for f32 */

struct tp_metrics {
    int metrics, timing, samples; /* file descriptors; -1: not open, or lost */
    bool progress, terminal, line_open;
    double last_line; /* when the progress was last shown */
    double smooth;    /* running mean of the loss for the progress line */
    bool any;
    int64_t evaluated; /* step of the held-out row that metrics.jsonl ended with when it was opened; -1: none */
    int64_t sampled;   /* step of the last row of samples.jsonl; -1: none */
    size_t n_sampled;  /* rows of that step */
};

double tp_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double tp_cpu_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

uint64_t tp_resident_bytes(void)
{
    char text[128];
    int fd = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0) return 0;
    text[n] = '\0';
    const char *second = strchr(text, ' ');
    return second != NULL ? strtoull(second, NULL, 10) * (uint64_t)sysconf(_SC_PAGESIZE) : 0;
}

uint64_t tp_peak_resident_bytes(void)
{
    struct rusage usage;
    return getrusage(RUSAGE_SELF, &usage) == 0 ? (uint64_t)usage.ru_maxrss * 1024 : 0;
}

/* ---- the files ---- */

/* What a file ended with when it was opened. */
struct tail {
    int64_t step;  /* of the last row; -1: there is none */
    size_t rows;   /* at the end that are of this step */
    bool held_out; /* the last one is of held-out loss */
};

/* Bytes of `text` up to the last complete row whose step is at most `step`. */
static size_t kept_length(tp_ctx *ctx, const char *name, const char *text, size_t n, int64_t step, struct tail *tail)
{
    size_t kept = 0;
    while (kept < n) {
        const char *end = memchr(text + kept, '\n', n - kept);
        if (end == NULL) break;
        size_t length = (size_t)(end - text) - kept;
        tp_json_doc *doc = NULL;
        tp_json_options options = {.name = name};
        int64_t row_step = INT64_MAX;
        bool held_out = false;
        if (tp_json_parse(ctx, text + kept, length, &options, &doc) == TP_OK) {
            (void)tp_json_i64(tp_json_get(tp_json_root(doc), "step"), &row_step);
            held_out = tp_json_get(tp_json_root(doc), "eval_loss") != NULL;
        } else
            tp_ctx_clear(ctx); /* a torn or foreign line ends what is kept */
        tp_json_free(doc);
        if (row_step > step) break;
        *tail = (struct tail){row_step, row_step == tail->step ? tail->rows + 1 : 1, held_out};
        kept += length + 1;
    }
    return kept;
}

static tp_status open_log(tp_ctx *ctx, const char *folder, const char *name, int64_t step, int *fd, struct tail *tail)
{
    char *path = tp_path_join(ctx, folder, name), *text = NULL;
    size_t n = 0, kept = 0;
    *tail = (struct tail){.step = -1};
    if (path == NULL) return TP_NOMEM;
    tp_status status = TP_OK;
    if (step > 0 && tp_path_exists(path)) {
        status = tp_file_read(ctx, path, LOG_MAX_BYTES, &text, &n);
        if (status == TP_OK) kept = kept_length(ctx, path, text, n, step, tail);
        tp_free(text);
    }
    if (status == TP_OK) {
        *fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0666);
        if (*fd < 0 || ftruncate(*fd, (off_t)kept) != 0) status = tp_fail(ctx, TP_IO_WRITE, "%s: %s", path, strerror(errno));
    }
    tp_free(path);
    return status;
}

tp_status tp_metrics_open(tp_ctx *ctx, const char *folder, int64_t step, bool progress, tp_metrics **result)
{
    tp_metrics *m = tp_alloc(ctx, 1, sizeof *m);
    if (m == NULL) return TP_NOMEM;
    m->metrics = m->timing = m->samples = -1;
    m->evaluated = m->sampled = -1;
    m->progress = progress;
    m->terminal = isatty(STDERR_FILENO) == 1;
    struct tail tail;
    tp_status status = open_log(ctx, folder, "metrics.jsonl", step, &m->metrics, &tail);
    if (status == TP_OK && tail.held_out) m->evaluated = tail.step;
    if (status == TP_OK) status = open_log(ctx, folder, "timing.jsonl", step, &m->timing, &tail);
    if (status != TP_OK) {
        tp_metrics_close(m);
        return status;
    }
    *result = m;
    return TP_OK;
}

tp_status tp_metrics_open_samples(tp_ctx *ctx, tp_metrics *m, const char *folder, int64_t step)
{
    struct tail tail;
    TP_TRY(open_log(ctx, folder, "samples.jsonl", step, &m->samples, &tail));
    m->sampled = tail.step;
    m->n_sampled = tail.rows;
    return TP_OK;
}

void tp_metrics_close(tp_metrics *m)
{
    if (m == NULL) return;
    if (m->line_open) fputc('\n', stderr);
    if (m->metrics >= 0) close(m->metrics);
    if (m->timing >= 0) close(m->timing);
    if (m->samples >= 0) close(m->samples);
    tp_free(m);
}

static void append(tp_ctx *ctx, int *fd, const tp_buf *row, const char *name)
{
    if (*fd < 0) return;
    size_t done = 0;
    while (!row->failed && done < row->len) {
        ssize_t n = write(*fd, row->data + done, row->len - done);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) break;
        done += (size_t)n;
    }
    if (!row->failed && done == row->len) return;
    tp_warn(ctx, "%s: %s; the run goes on without it", name, row->failed ? "out of memory" : strerror(errno));
    close(*fd);
    *fd = -1;
}

static void put(tp_buf *row, const char *key, double value)
{
    tp_buf_printf(row, ", \"%s\": ", key);
    tp_json_write_f64(row, value, METRICS_DIGITS);
}

static void write_rows(tp_ctx *ctx, tp_metrics *m, const tp_step_report *r)
{
    tp_buf row;
    tp_buf_init(&row, 0);
    tp_buf_printf(&row, "{\"step\": %lld", (long long)r->step);
    put(&row, "loss", r->loss);
    put(&row, "grad_norm", r->grad_norm);
    put(&row, "learning_rate", r->learning_rate);
    if (r->loss_scale > 0) put(&row, "loss_scale", r->loss_scale);
    tp_buf_printf(&row, ", \"labels\": %lld, \"tokens\": %lld}\n", (long long)r->labels, (long long)r->tokens);
    append(ctx, &m->metrics, &row, "metrics.jsonl");
    tp_buf_clear(&row);
    tp_buf_printf(&row, "{\"step\": %lld", (long long)r->step);
    put(&row, "seconds", r->seconds);
    put(&row, "cpu_seconds", r->cpu_seconds);
    put(&row, "tokens_per_second", r->seconds > 0 ? (double)r->tokens / r->seconds : 0);
    tp_buf_printf(&row, ", \"peak_bytes\": %llu", (unsigned long long)tp_peak_resident_bytes());
    if (r->replayed >= 0) tp_buf_printf(&row, ", \"replayed\": %lld", (long long)r->replayed);
    tp_buf_text(&row, "}\n");
    append(ctx, &m->timing, &row, "timing.jsonl");
    tp_buf_free(&row);
}

void tp_metrics_start(tp_ctx *ctx, tp_metrics *m, int64_t step, double seconds)
{
    tp_buf row;
    tp_buf_init(&row, 0);
    tp_buf_printf(&row, "{\"step\": %lld", (long long)step);
    put(&row, "start_seconds", seconds);
    tp_buf_text(&row, "}\n");
    append(ctx, &m->timing, &row, "timing.jsonl");
    tp_buf_free(&row);
}

void tp_metrics_eval(tp_ctx *ctx, tp_metrics *m, int64_t step, double eval_loss)
{
    tp_buf row;
    tp_buf_init(&row, 0);
    tp_buf_printf(&row, "{\"step\": %lld", (long long)step);
    put(&row, "eval_loss", eval_loss);
    tp_buf_text(&row, "}\n");
    if (step != m->evaluated)
        append(ctx, &m->metrics, &row, "metrics.jsonl"); /* else the row is there: killed after writing it */
    tp_buf_free(&row);
    if (m->progress) tp_metrics_say(m, "step %lld: held-out loss %.4f", (long long)step, eval_loss);
}

/* ---- the progress line ---- */

static void format_duration(double seconds, char out[24])
{
    int64_t s = seconds > 0 && seconds < 1e8 ? (int64_t)(seconds + 0.5) : 0;
    if (s >= 3600)
        snprintf(out, 24, "%lld:%02lld:%02lld", (long long)(s / 3600), (long long)(s / 60 % 60), (long long)(s % 60));
    else
        snprintf(out, 24, "%lld:%02lld", (long long)(s / 60), (long long)(s % 60));
}

#define BAR_CELLS 24

static void show_progress(tp_metrics *m, const tp_step_report *r)
{
    char left[24], memory[32], bar[BAR_CELLS + 1];
    int filled = r->steps > 0 ? (int)(BAR_CELLS * r->step / r->steps) : 0;
    for (int i = 0; i < BAR_CELLS; i++) bar[i] = i < filled ? '#' : '.';
    bar[BAR_CELLS] = '\0';
    format_duration(r->seconds_left, left);
    fprintf(stderr, "%s[%s] step %lld/%lld  loss %.4f  %.0f tokens/s  %s left  %s%s", m->terminal ? "\r\x1b[K" : "", bar,
            (long long)r->step, (long long)r->steps, m->smooth, r->seconds > 0 ? (double)r->tokens / r->seconds : 0.0, left,
            tp_format_bytes(r->resident_bytes, memory), m->terminal ? "" : "\n");
    fflush(stderr);
    m->line_open = m->terminal;
}

void tp_metrics_step(tp_ctx *ctx, tp_metrics *m, const tp_step_report *r, bool log)
{
    if (log) write_rows(ctx, m, r);
    if (isfinite(r->loss)) m->smooth = m->any ? 0.9 * m->smooth + 0.1 * r->loss : r->loss;
    m->any = m->any || isfinite(r->loss);
    double now = tp_now(), pause = m->terminal ? 0.1 : 10;
    if (!m->progress || (now - m->last_line < pause && r->step != r->steps)) return;
    m->last_line = now;
    show_progress(m, r);
}

void tp_metrics_say(tp_metrics *m, const char *format, ...)
{
    va_list args;
    if (m->line_open) fputs("\r\x1b[K", stderr);
    m->line_open = false;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
}

/* ---- samples ---- */

/* As JSON strings: what a model writes may hold line ends and the escape codes of terminals. */
static void say_sample(tp_metrics *m, int64_t step, const char *prompt, const char *text, size_t n)
{
    tp_buf line;
    tp_buf_init(&line, 0);
    tp_json_write_string(&line, prompt, strlen(prompt));
    tp_buf_text(&line, ": ");
    tp_json_write_string(&line, text, n);
    if (!line.failed) tp_metrics_say(m, "step %lld, %s", (long long)step, tp_buf_cstr(&line));
    tp_buf_free(&line);
}

size_t tp_metrics_sampled(const tp_metrics *m, int64_t step)
{
    return m->sampled == step ? m->n_sampled : 0;
}

void tp_metrics_sample(tp_ctx *ctx, tp_metrics *m, int64_t step, const char *prompt, const char *text, size_t n)
{
    tp_buf row;
    tp_buf_init(&row, 0);
    tp_buf_printf(&row, "{\"step\": %lld, \"prompt\": ", (long long)step);
    tp_json_write_string(&row, prompt, strlen(prompt));
    tp_buf_text(&row, ", \"text\": ");
    tp_json_write_string(&row, text, n);
    tp_buf_text(&row, "}\n");
    append(ctx, &m->samples, &row, "samples.jsonl");
    if (m->progress) say_sample(m, step, prompt, text, n);
    tp_buf_free(&row);
    m->n_sampled = m->sampled == step ? m->n_sampled + 1 : 1;
    m->sampled = step;
}
