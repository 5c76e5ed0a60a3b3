/* loss.svg: well-formed, everything in its place, gaps where steps were skipped, and bounded for any number of steps. */
#include "tests/support.h"

#include <ctype.h>
#include <math.h>

#include "base/file.h"
#include "tests/failing_memory.h"
#include "tests/scratch.h"
#include "trainers/metrics.h"

/* ---- reading SVG ---- */

static bool is_name(char c)
{
    return isalnum((unsigned char)c) || c == '-' || c == ':' || c == '_';
}

static const char *skip_name(const char *p, size_t *n)
{
    const char *start = p;
    while (is_name(*p)) p++;
    *n = (size_t)(p - start);
    if (*n == 0) fail_msg("a name is missing at \"%.30s\"", start);
    return p;
}

/* name="value" pairs up to > or />. */
static const char *skip_attributes(const char *p, bool *closes)
{
    size_t n;
    while (isspace((unsigned char)*p)) {
        while (isspace((unsigned char)*p)) p++;
        if (*p == '/' || *p == '>') break;
        p = skip_name(p, &n);
        if (p[0] != '=' || p[1] != '"') fail_msg("an attribute without value at \"%.30s\"", p);
        for (p += 2; *p != '"'; p++)
            if (*p == '\0' || *p == '<' || *p == '&') fail_msg("a broken attribute value at \"%.30s\"", p);
        p++;
    }
    *closes = *p == '/';
    p += *closes;
    if (*p != '>') fail_msg("a tag that does not end at \"%.30s\"", p);
    return p + 1;
}

/* XML as far as the picture uses it: elements, attributes, text; one root; every tag closed in order. */
static void assert_well_formed(const char *svg)
{
    const char *open[32];
    size_t lengths[32], depth = 0, roots = 0, n;
    for (const char *p = svg; *p != '\0';) {
        if (*p != '<') {
            if (*p == '&' || *p == '>' || (depth == 0 && !isspace((unsigned char)*p))) fail_msg("stray text at \"%.30s\"", p);
            p++;
        } else if (p[1] == '/') {
            const char *name = p + 2;
            p = skip_name(name, &n);
            if (depth == 0 || lengths[depth - 1] != n || memcmp(open[depth - 1], name, n) != 0)
                fail_msg("</%.*s> closes nothing", (int)n, name);
            depth--;
            assert_int_equal(*p, '>');
            p++;
        } else {
            bool closes;
            assert_true(depth < 32);
            roots += depth == 0;
            open[depth] = p + 1;
            p = skip_attributes(skip_name(p + 1, &lengths[depth]), &closes);
            depth += !closes;
        }
    }
    assert_int_equal(depth, 0);
    assert_int_equal(roots, 1);
}

static size_t count(const char *text, const char *what)
{
    size_t n = 0;
    for (; (text = strstr(text, what)) != NULL; text += strlen(what)) n++;
    return n;
}

/* The path data of the curve with this id; "" if it has none. */
static void curve(const char *svg, const char *id, char *out, size_t size)
{
    char key[64];
    snprintf(key, sizeof key, "<path id=\"%s\"", id);
    const char *p = strstr(svg, key);
    if (p == NULL) fail_msg("no curve %s", id);
    p = strstr(p, " d=\"") + 4;
    size_t n = strcspn(p, "\"");
    assert_true(n < size);
    memcpy(out, p, n);
    out[n] = '\0';
}

/* Number i of path data: x and y in turn. */
static double coordinate(const char *path, size_t i)
{
    for (;;) {
        path += strspn(path, "MLh ");
        if (*path == '\0') fail_msg("the path has fewer numbers");
        char *end;
        double value = strtod(path, &end);
        if (i-- == 0) return value;
        path = end;
    }
}

/* ---- fixture ---- */

struct plot {
    tp_ctx ctx;
    scratch s;
    tp_buf rows;
    char *svg;
};

static void begin(struct plot *p)
{
    tp_ctx_init(&p->ctx);
    scratch_begin(&p->s);
    tp_buf_init(&p->rows, 0);
    p->svg = NULL;
}

static void draw(struct plot *p)
{
    size_t n;
    tp_buf_append(&p->rows, "", 0);
    assert_ok(&p->ctx, tp_file_write(&p->ctx, scratch_path(&p->s, "metrics.jsonl"), tp_buf_cstr(&p->rows), p->rows.len));
    assert_ok(&p->ctx, tp_plot_loss(&p->ctx, p->s.folder));
    assert_ok(&p->ctx, tp_file_read(&p->ctx, scratch_path(&p->s, "loss.svg"), (size_t)1 << 24, &p->svg, &n));
    assert_int_equal(strlen(p->svg), n);
    assert_well_formed(p->svg);
    assert_null(strstr(p->svg, "nan"));
    assert_null(strstr(p->svg, "inf"));
}

static void end(struct plot *p)
{
    free(p->svg);
    tp_buf_free(&p->rows);
    scratch_end(&p->s);
}

static void add(struct plot *p, int step, double loss)
{
    if (isfinite(loss))
        tp_buf_printf(&p->rows, "{\"step\": %d, \"loss\": %.9g, \"grad_norm\": 1}\n", step, loss);
    else
        tp_buf_printf(&p->rows, "{\"step\": %d, \"loss\": null, \"grad_norm\": null}\n", step);
}

/* ---- tests ---- */

static void test_usual_run(void **state)
{
    struct plot p;
    char path[4096];
    (void)state;
    begin(&p);
    for (int i = 1; i <= 40; i++) {
        add(&p, i, 3 - 0.05 * i);
        if (i % 10 == 0) tp_buf_printf(&p.rows, "{\"step\": %d, \"eval_loss\": %g}\n", i, 2.9 - 0.03 * i);
    }
    draw(&p);
    curve(p.svg, "training", path, sizeof path);
    assert_int_equal(count(path, "M"), 1);
    assert_int_equal(count(path, "L"), 39);
    assert_true(coordinate(path, 1) < coordinate(path, 79)); /* it falls: y grows downwards */
    double first = coordinate(path, 0), last = coordinate(path, 78);
    curve(p.svg, "held-out", path, sizeof path);
    assert_int_equal(count(path, "L"), 3);
    assert_true(fabs(coordinate(path, 6) - last) < 0.11);                              /* step 40 in both */
    assert_true(fabs(coordinate(path, 0) - (first + (last - first) * 9 / 39)) < 0.11); /* step 10, linear in the step */
    assert_int_equal(count(p.svg, "<circle "), 4);
    assert_non_null(strstr(p.svg, "width=\"900\" height=\"540\""));
    assert_non_null(strstr(p.svg, "<rect width=\"900\" height=\"540\" fill=\"#ffffff\"/>"));
    assert_non_null(strstr(p.svg, "40 steps, last training loss 1.0000, best held-out loss 1.7000 at step 40"));
    assert_int_equal(count(p.svg, ">held-out loss<"), 1);
    assert_int_equal(count(p.svg, ">skipped steps<"), 0);
    end(&p);
}

/* Every step of these is its own stretch of the curve or a mark on the axis. */
static void test_gaps(void **state)
{
    struct plot p;
    char path[4096];
    (void)state;
    begin(&p);
    for (int i = 1; i <= 20; i++) add(&p, i, i == 5 || i == 6 || i == 12 || i == 14 ? NAN : 2 + 0.1 * (i % 3));
    draw(&p);
    curve(p.svg, "training", path, sizeof path);
    assert_int_equal(count(path, "M"), 4);  /* 1-4, 7-11, 13, 15-20 */
    assert_int_equal(count(path, "h0"), 1); /* 13 alone */
    assert_int_equal(count(path, "L"), 3 + 4 + 0 + 5);
    curve(p.svg, "skipped", path, sizeof path);
    assert_int_equal(count(path, "M"), 4);
    assert_int_equal(count(p.svg, ">skipped steps<"), 1);
    end(&p);
}

static void test_few_points(void **state)
{
    struct plot p;
    char path[4096];
    (void)state;
    begin(&p); /* one step */
    add(&p, 1, 2.5);
    draw(&p);
    curve(p.svg, "training", path, sizeof path);
    assert_int_equal(count(path, "M"), 1);
    assert_int_equal(count(path, "h0"), 1);
    assert_non_null(strstr(p.svg, "1 step, last training loss 2.5000"));
    end(&p);
    begin(&p); /* nothing */
    draw(&p);
    assert_non_null(strstr(p.svg, "no losses were recorded"));
    end(&p);
    begin(&p); /* nothing but what was skipped */
    add(&p, 1, NAN);
    add(&p, 2, NAN);
    draw(&p);
    assert_non_null(strstr(p.svg, "no losses were recorded"));
    end(&p);
    begin(&p); /* evaluation alone, the same loss twice */
    tp_buf_text(&p.rows, "{\"step\": 7, \"eval_loss\": 0}\n{\"step\": 9, \"eval_loss\": 0}\n");
    draw(&p);
    assert_int_equal(count(p.svg, "<circle "), 2);
    end(&p);
}

/* Torn, foreign and repeated lines draw nothing. */
static void test_foreign_lines(void **state)
{
    struct plot p;
    char path[4096];
    (void)state;
    begin(&p);
    add(&p, 1, 2);
    tp_buf_text(&p.rows, "hello\n\n[1, 2]\n{\"step\": \"x\", \"loss\": 1}\n{\"loss\": 9}\n{\"step\": -4, \"loss\": 9}\n");
    for (int i = 0; i < 5000; i++) tp_buf_text(&p.rows, "long ");
    tp_buf_text(&p.rows, "\n");
    for (int i = 0; i < 30000; i++) tp_buf_text(&p.rows, "longer than a piece ");
    tp_buf_text(&p.rows, "\n");
    add(&p, 2, 1.5);
    add(&p, 2, 7);
    add(&p, 1, 7);
    add(&p, 3, 1);
    tp_buf_text(&p.rows, "{\"step\": 4, \"lo");
    draw(&p);
    curve(p.svg, "training", path, sizeof path);
    assert_int_equal(count(path, "L"), 2);
    end(&p);
}

/* Ten thousand steps and one hundred thousand make pictures of about the same size, and no spike gets lost. */
static void test_size(void **state)
{
    size_t sizes[2];
    (void)state;
    for (int k = 0; k < 2; k++) {
        struct plot p;
        int n = k == 0 ? 10000 : 100000;
        begin(&p);
        for (int i = 1; i <= n; i++) {
            add(&p, i, i % (n / 5) == 0 ? NAN : i == n / 2 + 7 ? 40 : 2 + 0.4 * ((i * 7919) % 1000) / 1000.0);
            if (i % 50 == 0) tp_buf_printf(&p.rows, "{\"step\": %d, \"eval_loss\": 1.9}\n", i);
        }
        draw(&p);
        assert_int_equal(count(p.svg, "<circle "), 0); /* too many for dots */
        assert_non_null(strstr(p.svg, "1 above the picture"));
        sizes[k] = strlen(p.svg);
        end(&p);
    }
    print_message("%zu and %zu bytes\n", sizes[0], sizes[1]);
    assert_true(sizes[1] < 120000 && sizes[1] < sizes[0] * 3 / 2);
}

/* Any finite loss has its place. */
static void test_ranges(void **state)
{
    static const double lowest[] = {0, 1e-9, -5, 1e-30, 3e30, 11.999, 0.0001};
    (void)state;
    for (size_t i = 0; i < sizeof lowest / sizeof *lowest; i++)
        for (int k = 0; k < 3; k++) {
            struct plot p;
            double range = k == 0 ? 0 : k == 1 ? 1e-7 : 1e6;
            begin(&p);
            for (int step = 1; step <= 9; step++) add(&p, step, lowest[i] + range * step);
            draw(&p);
            assert_true(count(p.svg, "text-anchor=\"end\"") >= 3 && count(p.svg, "text-anchor=\"end\"") <= 15);
            end(&p);
        }
}

static void test_failures(void **state)
{
    struct plot p;
    (void)state;
    begin(&p);
    assert_status(&p.ctx, TP_IO_READ, tp_plot_loss(&p.ctx, p.s.folder));
    assert_false(tp_path_exists(scratch_path(&p.s, "loss.svg")));
    assert_ok(&p.ctx, tp_folder_make(&p.ctx, scratch_path(&p.s, "loss.svg"))); /* in the way */
    assert_ok(&p.ctx, tp_file_write(&p.ctx, scratch_path(&p.s, "metrics.jsonl"), "", 0));
    assert_status(&p.ctx, TP_IO_WRITE, tp_plot_loss(&p.ctx, p.s.folder));
    end(&p);
}

static void test_failing_memory(void **state)
{
    struct plot p;
    (void)state;
    begin(&p);
    for (int i = 1; i <= 20; i++) add(&p, i, i == 7 ? NAN : 2);
    draw(&p);
    assert_survives_failing_memory(&p.ctx, tp_plot_loss(&p.ctx, p.s.folder));
    end(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_usual_run),     cmocka_unit_test(test_gaps),           cmocka_unit_test(test_few_points),
        cmocka_unit_test(test_foreign_lines), cmocka_unit_test(test_size),           cmocka_unit_test(test_ranges),
        cmocka_unit_test(test_failures),      cmocka_unit_test(test_failing_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
