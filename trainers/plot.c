/* loss.svg: the curve of a run as one self-contained picture.
 *
 * Rows of metrics.jsonl become two curves. Every curve is drawn through the least and the largest value of each half pixel, so
 * that the picture of ten steps and of ten million has the same bounded size, and no spike is lost between two pixels. A loss
 * that is not finite (null in the file) leaves a gap and a mark on the axis. Numbers are put together from integers, because
 * printf's decimal point depends on the locale of the program around us. */
#include "trainers/metrics.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"

#define WIDTH        900
#define HEIGHT       540
#define LEFT         74
#define RIGHT        (WIDTH - 30)
#define TOP          96
#define BOTTOM       (HEIGHT - 62)
#define CELLS        2  /* per pixel */
#define MAX_MARKERS  60 /* more held-out points than this are a line without dots */
#define LINE_BYTES   4096
#define PIECE_BYTES  65536
#define TRAIN_COLOUR "#a3c6e6"
#define MEAN_COLOUR  "#1b62a5"
#define HELD_COLOUR  "#d1551a"
#define SKIP_COLOUR  "#b3261e"

struct row {
    double step;
    float loss; /* NaN: skipped */
    float mean; /* of the losses around; NaN where it is not drawn */
};

struct series {
    struct row *rows; /* by ascending step */
    size_t n, capacity;
};

struct plot {
    struct series train, held_out;
    size_t n_skipped, n_above; /* losses that are not finite; that lie above the picture */
    double first, last;        /* steps at the sides */
    double low, high;          /* losses at the bottom and the top */
    double step_tick, loss_tick;
};

/* ---- reading ---- */

/* A row that does not go forward is left out: the file is not ours, or damaged. */
static tp_status add_row(tp_ctx *ctx, struct series *s, double step, double loss)
{
    if (s->n > 0 && !(step > s->rows[s->n - 1].step)) return TP_OK;
    TP_TRY(tp_grow(ctx, &s->rows, &s->capacity, s->n + 1, sizeof *s->rows));
    s->rows[s->n++] = (struct row){step, (float)loss, NAN};
    return TP_OK;
}

static double number_or_nan(const tp_json *value)
{
    double number;
    return tp_json_f64(value, &number) ? number : NAN;
}

/* Lines that are no rows of ours say nothing. */
static tp_status read_line(tp_ctx *ctx, const char *text, size_t n, struct plot *plot)
{
    tp_ctx ignored;
    tp_json_doc *doc;
    tp_json_options options = {.name = "metrics.jsonl"};
    tp_ctx_init(&ignored);
    tp_status status = tp_json_parse(&ignored, text, n, &options, &doc);
    if (status == TP_NOMEM) return tp_fail(ctx, status, "%s", ignored.message);
    if (status != TP_OK) return TP_OK;
    const tp_json *root = tp_json_root(doc), *loss = tp_json_get(root, "loss"), *eval = tp_json_get(root, "eval_loss");
    double step = number_or_nan(tp_json_get(root, "step"));
    if (step >= 0 && step <= 1e15) {
        if (loss != NULL) status = add_row(ctx, &plot->train, step, number_or_nan(loss));
        if (eval != NULL && status == TP_OK) status = add_row(ctx, &plot->held_out, step, number_or_nan(eval));
    }
    tp_json_free(doc);
    return status;
}

/* In pieces: the log of a long run is larger than what this process should hold. A line that is cut off or too long is no row.
 */
static tp_status read_rows(tp_ctx *ctx, tp_file *file, char *buffer, struct plot *plot)
{
    uint64_t size = tp_file_size(file), at = 0;
    while (at < size) {
        size_t n = size - at < PIECE_BYTES ? (size_t)(size - at) : PIECE_BYTES, used = 0;
        TP_TRY(tp_file_pread(ctx, file, at, buffer, n));
        for (char *end; (end = memchr(buffer + used, '\n', n - used)) != NULL; used = (size_t)(end - buffer) + 1) {
            size_t length = (size_t)(end - buffer) - used;
            if (length <= LINE_BYTES) TP_TRY(read_line(ctx, buffer + used, length, plot));
        }
        at += used > 0 ? used : n;
    }
    return TP_OK;
}

static tp_status read_file(tp_ctx *ctx, const char *folder, struct plot *plot)
{
    char *path = tp_path_join(ctx, folder, "metrics.jsonl");
    char *buffer = tp_alloc_raw(ctx, PIECE_BYTES, 1);
    tp_file *file = NULL;
    tp_status status = path != NULL && buffer != NULL ? tp_file_open(ctx, path, &file) : TP_NOMEM;
    if (status == TP_OK) {
        status = read_rows(ctx, file, buffer, plot);
        tp_file_close(file);
    }
    tp_free(buffer);
    tp_free(path);
    return status;
}

/* ---- what to show ---- */

/* Mean over the losses around a row, a twenty-fifth of the run wide. Made for as many rows as the picture can tell apart; sums
 * are taken afresh for each, so that one enormous loss does not stay behind as a rounding error. */
static void fill_means(struct series *s)
{
    size_t reach = s->n / 50 > 2 ? s->n / 50 : 2, stride = s->n / (CELLS * (RIGHT - LEFT)) + 1;
    for (size_t i = 0; i < s->n; i += stride) {
        size_t begin = i > reach ? i - reach : 0, end = s->n - i > reach ? i + reach + 1 : s->n, n = 0;
        double sum = 0;
        for (size_t j = begin; j < end; j++) {
            if (!isfinite(s->rows[j].loss)) continue;
            sum += s->rows[j].loss;
            n++;
        }
        if (n > 0) s->rows[i].mean = (float)(sum / (double)n);
    }
}

static int ascending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void widen(double value, double *low, double *high)
{
    if (!isfinite(value)) return;
    if (!(*low <= value)) *low = value;
    if (!(*high >= value)) *high = value;
}

/* Every mean and held-out loss, and all training losses but the highest half per cent where those tower above the rest: one
 * spike must not flatten the curve. */
static tp_status find_range(tp_ctx *ctx, struct plot *plot)
{
    double low = NAN, high = NAN;
    size_t n = 0;
    float *sorted = tp_alloc_raw(ctx, plot->train.n, sizeof *sorted);
    if (sorted == NULL) return TP_NOMEM;
    for (size_t i = 0; i < plot->train.n; i++) {
        const struct row *r = &plot->train.rows[i];
        widen(r->mean, &low, &high);
        if (isfinite(r->loss)) sorted[n++] = r->loss;
    }
    plot->n_skipped = plot->train.n - n;
    qsort(sorted, n, sizeof *sorted, ascending);
    if (n > 0) {
        widen(sorted[0], &low, &high);
        widen(sorted[n - 1 - n / 200], &low, &high);
        if (sorted[n - 1] <= high + 0.3 * (high - low)) widen(sorted[n - 1], &low, &high);
    }
    for (size_t i = 0; i < plot->held_out.n; i++) widen(plot->held_out.rows[i].loss, &low, &high);
    tp_free(sorted);
    plot->low = low;
    plot->high = high;
    return TP_OK;
}

/* 1, 2 or 5 times a power of ten, so that about `ticks` of them make the range. */
static double nice_tick(double range, double ticks)
{
    double rough = range / ticks, power = pow(10, floor(log10(rough))), digit = rough / power;
    return power * (digit <= 1 ? 1 : digit <= 2 ? 2 : digit <= 5 ? 5 : 10);
}

static void find_axes(struct plot *plot)
{
    double room = fmax(1e-6, 0.02 * fabs(plot->high));
    if (!(plot->high - plot->low >= room)) { /* a flat curve */
        plot->low -= room;
        plot->high += room;
    }
    if (plot->low > 0 && plot->low < 0.3 * plot->high) plot->low = 0;
    plot->loss_tick = nice_tick(plot->high - plot->low, 7);
    plot->low = floor(plot->low / plot->loss_tick) * plot->loss_tick;
    plot->high = ceil(plot->high / plot->loss_tick) * plot->loss_tick;

    plot->first = 0;
    plot->last = 1;
    if (plot->train.n > 0) plot->last = fmax(plot->last, plot->train.rows[plot->train.n - 1].step);
    if (plot->held_out.n > 0) plot->last = fmax(plot->last, plot->held_out.rows[plot->held_out.n - 1].step);
    plot->step_tick = fmax(1, nice_tick(plot->last, 9));
    for (size_t i = 0; i < plot->train.n; i++) plot->n_above += plot->train.rows[i].loss > plot->high;
}

static double x_of(const struct plot *plot, double step)
{
    return LEFT + (RIGHT - LEFT) * (step - plot->first) / (plot->last - plot->first);
}

/* Far above and below are cut, so that any value has a place; the clip path hides what is outside. */
static double y_of(const struct plot *plot, double loss)
{
    double y = BOTTOM - (BOTTOM - TOP) * (loss - plot->low) / (plot->high - plot->low);
    return y < -HEIGHT ? -HEIGHT : y > 2 * HEIGHT ? 2 * HEIGHT : y;
}

/* ---- text and numbers ---- */

static void put_fixed(tp_buf *out, double value, int decimals)
{
    long long scale = 1;
    for (int i = 0; i < decimals; i++) scale *= 10;
    if (!(fabs(value) * (double)scale < 1e15)) {
        tp_json_write_f64(out, value, 4);
        return;
    }
    long long units = llround(value * (double)scale), whole = llabs(units) / scale, rest = llabs(units) % scale;
    tp_buf_printf(out, "%s%lld", units < 0 ? "-" : "", whole);
    if (decimals > 0) tp_buf_printf(out, ".%0*lld", decimals, rest);
}

static void put_coordinate(tp_buf *out, double value)
{
    put_fixed(out, value, 1);
}

/* 1200, 20k, 1.5M. */
static void put_step(tp_buf *out, double step)
{
    double unit = step >= 1e6 ? 1e6 : step >= 1e4 ? 1e3 : 1;
    tp_json_write_f64(out, step / unit, 6);
    if (unit > 1) tp_buf_char(out, unit > 1e3 ? 'M' : 'k');
}

static int decimals_of(double tick)
{
    int n = (int)ceil(-log10(tick) - 1e-9);
    return n < 0 ? 0 : n > 12 ? 12 : n;
}

/* <text x y ...>: what stands between is the caller's. */
static void begin_text(tp_buf *out, double x, double y, const char *attributes)
{
    tp_buf_text(out, "<text x=\"");
    put_coordinate(out, x);
    tp_buf_text(out, "\" y=\"");
    put_coordinate(out, y);
    tp_buf_printf(out, "\" %s>", attributes);
}

static void put_line(tp_buf *out, double x1, double y1, double x2, double y2, const char *attributes)
{
    tp_buf_text(out, "<path d=\"M");
    put_coordinate(out, x1);
    tp_buf_char(out, ' ');
    put_coordinate(out, y1);
    tp_buf_char(out, 'L');
    put_coordinate(out, x2);
    tp_buf_char(out, ' ');
    put_coordinate(out, y2);
    tp_buf_printf(out, "\" %s/>\n", attributes);
}

/* ---- the frame ---- */

static void write_loss_axis(const struct plot *plot, tp_buf *out)
{
    int64_t first = llround(plot->low / plot->loss_tick), last = llround(plot->high / plot->loss_tick);
    for (int64_t i = first; i <= last; i++) {
        double value = (double)i * plot->loss_tick, y = y_of(plot, value);
        put_line(out, LEFT, y, RIGHT, y, i == first ? "stroke=\"#8a9099\"" : "stroke=\"#e4e7eb\"");
        begin_text(out, LEFT - 10, y + 4.5, "text-anchor=\"end\"");
        put_fixed(out, value, decimals_of(plot->loss_tick));
        tp_buf_text(out, "</text>\n");
    }
    tp_buf_printf(out, "<text transform=\"translate(22 %d) rotate(-90)\" text-anchor=\"middle\">loss per token</text>\n",
                  (TOP + BOTTOM) / 2);
}

static void write_step_axis(const struct plot *plot, tp_buf *out)
{
    for (int64_t i = 0; (double)i * plot->step_tick <= plot->last; i++) {
        double step = (double)i * plot->step_tick, x = x_of(plot, step);
        put_line(out, x, BOTTOM, x, BOTTOM + 6, "stroke=\"#8a9099\"");
        begin_text(out, x, BOTTOM + 23, "text-anchor=\"middle\"");
        put_step(out, step);
        tp_buf_text(out, "</text>\n");
    }
    begin_text(out, (LEFT + RIGHT) / 2, HEIGHT - 16, "text-anchor=\"middle\"");
    tp_buf_text(out, "step</text>\n");
}

/* ---- curves ---- */

/* A path under way: the pixel cell being gathered and whether the pen is down. */
struct pen {
    const struct plot *plot;
    tp_buf *out;
    bool down, moved; /* moved: a line was drawn since the pen went down */
    double cell;
    bool gathering;
    struct row least, largest; /* .loss is what is drawn */
};

static void draw_to(struct pen *pen, const struct row *r)
{
    tp_buf_char(pen->out, pen->down ? 'L' : 'M');
    put_coordinate(pen->out, x_of(pen->plot, r->step));
    tp_buf_char(pen->out, ' ');
    put_coordinate(pen->out, y_of(pen->plot, r->loss));
    pen->moved = pen->down;
    pen->down = true;
}

static void finish_cell(struct pen *pen)
{
    if (!pen->gathering) return;
    bool rising = pen->least.step <= pen->largest.step;
    draw_to(pen, rising ? &pen->least : &pen->largest);
    if (pen->least.step != pen->largest.step) draw_to(pen, rising ? &pen->largest : &pen->least);
    pen->gathering = false;
}

/* A point with gaps on both sides becomes a dot: a line of no length with round ends. */
static void lift(struct pen *pen)
{
    finish_cell(pen);
    if (pen->down && !pen->moved) tp_buf_text(pen->out, "h0");
    pen->down = pen->moved = false;
}

static void trace(const struct plot *plot, const struct series *s, bool means, tp_buf *out)
{
    struct pen pen = {.plot = plot, .out = out};
    double gap = -1; /* cell that holds a gap */
    for (size_t i = 0; i < s->n; i++) {
        struct row r = s->rows[i];
        double cell = floor(CELLS * x_of(plot, r.step));
        if (!isfinite(r.loss)) {
            if (pen.gathering && pen.cell == cell) continue; /* narrower than the line */
            gap = cell;
            continue;
        }
        if (means) {
            if (!isfinite(r.mean)) continue;
            r.loss = r.mean;
        }
        if (pen.gathering && pen.cell != cell) finish_cell(&pen);
        if (gap >= 0 && gap != cell) lift(&pen);
        gap = -1;
        if (!pen.gathering) pen.least = pen.largest = r;
        if (r.loss < pen.least.loss) pen.least = r;
        if (r.loss > pen.largest.loss) pen.largest = r;
        pen.gathering = true;
        pen.cell = cell;
    }
    lift(&pen);
}

static void write_curve(const struct plot *plot, const struct series *s, bool means, const char *id, const char *attributes,
                        tp_buf *out)
{
    tp_buf_printf(
        out,
        "<path id=\"%s\" clip-path=\"url(#area)\" fill=\"none\" stroke-linecap=\"round\" stroke-linejoin=\"round\" %s d=\"", id,
        attributes);
    trace(plot, s, means, out);
    tp_buf_text(out, "\"/>\n");
}

static void write_markers(const struct plot *plot, tp_buf *out)
{
    const struct series *s = &plot->held_out;
    if (s->n > MAX_MARKERS) return;
    for (size_t i = 0; i < s->n; i++) {
        if (!isfinite(s->rows[i].loss)) continue;
        tp_buf_text(out, "<circle cx=\"");
        put_coordinate(out, x_of(plot, s->rows[i].step));
        tp_buf_text(out, "\" cy=\"");
        put_coordinate(out, y_of(plot, s->rows[i].loss));
        tp_buf_text(out, "\" r=\"4\" fill=\"" HELD_COLOUR "\" stroke=\"#ffffff\" stroke-width=\"1.5\"/>\n");
    }
}

/* Marks on the axis, at most one a pixel. */
static void write_skipped(const struct plot *plot, tp_buf *out)
{
    double last = -1;
    if (plot->n_skipped == 0) return;
    tp_buf_text(out, "<path id=\"skipped\" stroke=\"" SKIP_COLOUR "\" stroke-width=\"1.5\" d=\"");
    for (size_t i = 0; i < plot->train.n; i++) {
        double x = round(x_of(plot, plot->train.rows[i].step));
        if (isfinite(plot->train.rows[i].loss) || x == last) continue;
        tp_buf_printf(out, "M%d %dv-9", (int)x, BOTTOM);
        last = x;
    }
    tp_buf_text(out, "\"/>\n");
}

/* ---- title and legend ---- */

static const struct row *last_finite(const struct series *s)
{
    for (size_t i = s->n; i > 0; i--)
        if (isfinite(s->rows[i - 1].loss)) return &s->rows[i - 1];
    return NULL;
}

static const struct row *best_of(const struct series *s)
{
    const struct row *best = NULL;
    for (size_t i = 0; i < s->n; i++)
        if (isfinite(s->rows[i].loss) && (best == NULL || s->rows[i].loss < best->loss)) best = &s->rows[i];
    return best;
}

static void write_summary(const struct plot *plot, tp_buf *out)
{
    const struct row *last = last_finite(&plot->train), *best = best_of(&plot->held_out);
    if (plot->train.n > 0) {
        long long steps = (long long)plot->train.rows[plot->train.n - 1].step;
        tp_buf_printf(out, "%lld step%s", steps, steps == 1 ? "" : "s");
    }
    if (last != NULL) {
        tp_buf_text(out, ", last training loss ");
        put_fixed(out, last->loss, 4);
    }
    if (best != NULL) {
        tp_buf_text(out, plot->train.n > 0 ? ", best held-out loss " : "best held-out loss ");
        put_fixed(out, best->loss, 4);
        tp_buf_printf(out, " at step %lld", (long long)best->step);
    }
    if (plot->n_above > 0) tp_buf_printf(out, "; %zu above the picture", plot->n_above);
}

static double write_key(tp_buf *out, double x, const char *sample, const char *text)
{
    tp_buf_text(out, "<path d=\"M");
    put_coordinate(out, x);
    tp_buf_printf(out, " 77h26\" %s/>\n", sample);
    begin_text(out, x + 34, 81.5, "");
    tp_buf_printf(out, "%s</text>\n", text);
    return x + 58 + 6.3 * (double)strlen(text);
}

static void write_legend(const struct plot *plot, tp_buf *out)
{
    double x = LEFT;
    if (plot->train.n > 0) {
        x = write_key(out, x, "stroke=\"" TRAIN_COLOUR "\" stroke-width=\"1.5\"", "training loss");
        x = write_key(out, x, "stroke=\"" MEAN_COLOUR "\" stroke-width=\"2.5\"", "running mean");
    }
    if (plot->held_out.n > 0) x = write_key(out, x, "stroke=\"" HELD_COLOUR "\" stroke-width=\"2.5\"", "held-out loss");
    if (plot->n_skipped > 0)
        write_key(out, x, "stroke=\"" SKIP_COLOUR "\" stroke-width=\"5\" stroke-dasharray=\"1.5 4\"", "skipped steps");
}

static void write_curves(const struct plot *plot, tp_buf *out)
{
    write_loss_axis(plot, out);
    write_step_axis(plot, out);
    write_curve(plot, &plot->train, false, "training", "stroke=\"" TRAIN_COLOUR "\" stroke-width=\"1.2\"", out);
    write_curve(plot, &plot->train, true, "mean", "stroke=\"" MEAN_COLOUR "\" stroke-width=\"2.4\"", out);
    write_curve(plot, &plot->held_out, false, "held-out", "stroke=\"" HELD_COLOUR "\" stroke-width=\"2.2\"", out);
    write_markers(plot, out);
    write_skipped(plot, out);
    write_legend(plot, out);
}

static void write_picture(struct plot *plot, tp_buf *out)
{
    bool any = isfinite(plot->low);
    if (any) find_axes(plot);
    tp_buf_printf(out,
                  "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" role=\"img\" "
                  "font-family=\"system-ui, 'Segoe UI', "
                  "Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#3c434c\">\n<title>Training loss</title>\n<desc>",
                  WIDTH, HEIGHT, WIDTH, HEIGHT);
    write_summary(plot, out);
    tp_buf_printf(
        out, "</desc>\n<defs><clipPath id=\"area\"><rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\"/></clipPath></defs>\n",
        LEFT - 4, TOP - 4, RIGHT - LEFT + 8, BOTTOM - TOP + 8);
    tp_buf_printf(out, "<rect width=\"%d\" height=\"%d\" fill=\"#ffffff\"/>\n", WIDTH, HEIGHT);
    begin_text(out, LEFT, 33, "font-size=\"19\" font-weight=\"600\" fill=\"#161a1f\"");
    tp_buf_text(out, "Training loss</text>\n");
    begin_text(out, LEFT, 55, "fill=\"#6a727c\"");
    write_summary(plot, out);
    tp_buf_text(out, "</text>\n");
    if (any)
        write_curves(plot, out);
    else
        tp_buf_printf(out, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\" font-size=\"15\">no losses were recorded</text>\n",
                      WIDTH / 2, HEIGHT / 2);
    tp_buf_text(out, "</svg>\n");
}

static tp_status save(tp_ctx *ctx, const char *folder, const tp_buf *picture)
{
    TP_TRY(tp_buf_status(ctx, picture, "loss.svg"));
    char *path = tp_path_join(ctx, folder, "loss.svg");
    tp_status status = path != NULL ? tp_file_write(ctx, path, picture->data, picture->len) : TP_NOMEM;
    tp_free(path);
    return status;
}

tp_status tp_plot_loss(tp_ctx *ctx, const char *folder)
{
    struct plot plot = {0};
    tp_buf picture;
    tp_buf_init(&picture, 0);
    tp_status status = read_file(ctx, folder, &plot);
    if (status == TP_OK) {
        fill_means(&plot.train);
        status = find_range(ctx, &plot);
    }
    if (status == TP_OK) {
        write_picture(&plot, &picture);
        status = save(ctx, folder, &picture);
    }
    tp_buf_free(&picture);
    tp_free(plot.train.rows);
    tp_free(plot.held_out.rows);
    return status;
}
