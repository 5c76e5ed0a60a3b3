/* tapeft inspect PATH --diff OTHER: settings that differ, tensors that only one has or that have other shapes, and how far the
 * values of the rest are apart. Both sides are what `inspect --json` says of them, so any two kinds can be compared. */
#include <math.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"
#include "base/map.h"
#include "base/mem.h"
#include "cli/command.h"
#include "cli/inspect.h"

#define PIECE ((size_t)1 << 14) /* elements that are compared at once */
#define SHOWN ((size_t)60)      /* bytes of a setting, for people */

struct side {
    const char *path;
    tp_inspection found;
    tp_json_doc *doc;
    const tp_json *tensors;
    tp_map *names; /* of tensors: their numbers */
    tp_file *file; /* the one that was read last */
};

/* How far apart the values of one tensor are, or of all. */
struct distance {
    bool differs;
    double largest;            /* |a - b|; not a number if one of them is none and the other is another */
    double squares, squares_b; /* sums of (a - b)^2 and b^2 */
};

struct report {
    tp_ctx *ctx;
    struct side a, b;
    bool json, each, any;
    size_t settings, only_a, only_b, shapes, values, same;
    tp_span place; /* name of the tensor with the largest difference */
    struct distance all;
    tp_buf out, text_a, text_b;
};

static tp_status open_side(tp_ctx *ctx, const char *path, struct side *side)
{
    side->path = path;
    TP_TRY(tp_cli_inspect(ctx, path, &side->found));
    tp_json_options options = {.name = path, .allow_duplicates = true};
    TP_TRY(tp_json_parse(ctx, side->found.json.data, side->found.json.len, &options, &side->doc));
    side->tensors = tp_json_get(tp_json_root(side->doc), "tensors");
    side->names = tp_map_new(ctx, true);
    if (side->names == NULL) return TP_NOMEM;
    for (size_t i = 0; i < tp_json_count(side->tensors); i++) {
        tp_span name = tp_json_string(tp_json_get(tp_json_at(side->tensors, i), "name"));
        TP_TRY(tp_map_put(ctx, side->names, name, (int64_t)i, NULL));
    }
    return TP_OK;
}

static void close_side(struct side *side)
{
    tp_file_close(side->file);
    tp_map_free(side->names);
    tp_json_free(side->doc);
    tp_cli_inspection_free(&side->found);
}

/* ---- settings ---- */

/* Whether both texts are the same; without memory both are empty, and the report fails as a whole. */
static bool same_text(const struct report *r)
{
    size_t n = r->text_a.len;
    return n == r->text_b.len && (n == 0 || memcmp(r->text_a.data, r->text_b.data, n) == 0);
}

/* The value's text, cut for people; "-" if there is none. */
static void write_value(const struct report *r, const tp_json *value, const tp_buf *text, tp_buf *out)
{
    if (value == NULL)
        tp_buf_text(out, r->json ? "null" : "-");
    else if (r->json || text->len <= SHOWN)
        tp_buf_append(out, text->data, text->len);
    else
        tp_buf_printf(out, "%.*s...", (int)tp_utf8_valid_prefix(text->data, SHOWN), text->data);
}

static void put_setting(struct report *r, const char *group, tp_span key, const tp_json *a, const tp_json *b)
{
    tp_buf_clear(&r->text_a);
    tp_buf_clear(&r->text_b);
    tp_json_write(&r->text_a, a, 0);
    tp_json_write(&r->text_b, b, 0);
    if (a != NULL && b != NULL && same_text(r)) return;
    if (r->json) {
        tp_buf_printf(&r->out, "%s{\"group\": \"%s\", \"key\": ", r->settings > 0 ? ", " : "", group);
        tp_json_write_string(&r->out, key.data, key.len);
        tp_buf_text(&r->out, ", \"here\": ");
    } else {
        tp_buf_printf(&r->out, "%s %.*s: ", group, (int)key.len, key.data);
    }
    write_value(r, a, &r->text_a, &r->out);
    tp_buf_text(&r->out, r->json ? ", \"there\": " : " | ");
    write_value(r, b, &r->text_b, &r->out);
    tp_buf_text(&r->out, r->json ? "}" : "\n");
    r->settings++;
}

static void compare_group(struct report *r, const char *group)
{
    const tp_json *a = tp_json_get(tp_json_root(r->a.doc), group), *b = tp_json_get(tp_json_root(r->b.doc), group);
    for (size_t i = 0; i < tp_json_count(a); i++) {
        tp_span key = tp_json_key_at(a, i);
        put_setting(r, group, key, tp_json_at(a, i), tp_json_get_span(b, key));
    }
    for (size_t i = 0; i < tp_json_count(b); i++)
        if (tp_json_get_span(a, tp_json_key_at(b, i)) == NULL)
            put_setting(r, group, tp_json_key_at(b, i), NULL, tp_json_at(b, i));
}

static void compare_settings(struct report *r)
{
    static const char *const kinds[] = {"kind", "format", "version"}, *const groups[] = {"config", "state", "metadata"};
    const tp_json *a = tp_json_root(r->a.doc), *b = tp_json_root(r->b.doc);
    if (r->json) tp_buf_text(&r->out, "{\"settings\": [");
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        const tp_json *ours = tp_json_get(a, kinds[i]), *theirs = tp_json_get(b, kinds[i]);
        if (ours != NULL || theirs != NULL) put_setting(r, "file", tp_span_of(kinds[i]), ours, theirs);
    }
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) compare_group(r, groups[i]);
    if (r->json) tp_buf_char(&r->out, ']');
}

/* ---- values ---- */

static tp_status read_piece(tp_ctx *ctx, struct side *side, const tp_tensor_place *place, uint64_t at, size_t n, void *bytes)
{
    if (side->file == NULL || strcmp(tp_file_path(side->file), place->path) != 0) {
        tp_file_close(side->file);
        side->file = NULL;
        TP_TRY(tp_file_open(ctx, place->path, &side->file));
    }
    return tp_file_pread(ctx, side->file, place->offset + at, bytes, n);
}

static void measure(const float *a, const float *b, size_t n, struct distance *d)
{
    for (size_t i = 0; i < n; i++) {
        double apart = fabs((double)a[i] - (double)b[i]);
        if (!(apart <= d->largest)) d->largest = apart;
        d->squares += apart * apart;
    }
}

static void add_squares(const float *b, size_t n, struct distance *d)
{
    for (size_t i = 0; i < n; i++) d->squares_b += (double)b[i] * (double)b[i];
}

/* Room for a piece of both tensors, as it lies in the file and as f32. */
struct pieces {
    unsigned char a[PIECE * sizeof(double)], b[PIECE * sizeof(double)];
    float x[PIECE], y[PIECE];
};

/* Two tensors of one shape. Where a type cannot be converted, all that can be said is whether the bytes are the same. */
static tp_status compare_pieces(struct report *r, const tp_tensor_place *a, const tp_tensor_place *b, struct pieces *p,
                                struct distance *d)
{
    bool convert = a->dtype != TP_DTYPE_COUNT && b->dtype != TP_DTYPE_COUNT;
    size_t a_bytes = convert ? tp_dtype_bytes(a->dtype) : 1, b_bytes = convert ? tp_dtype_bytes(b->dtype) : 1;
    *d = (struct distance){.differs = a->dtype != b->dtype || a->bytes != b->bytes, .largest = convert ? 0 : NAN};
    if (d->differs && !convert) return TP_OK;
    uint64_t count = a->bytes / a_bytes;
    for (uint64_t at = 0; at < count; at += PIECE) {
        size_t n = count - at < PIECE ? (size_t)(count - at) : PIECE;
        TP_TRY(read_piece(r->ctx, &r->a, a, at * a_bytes, n * a_bytes, p->a));
        TP_TRY(read_piece(r->ctx, &r->b, b, at * b_bytes, n * b_bytes, p->b));
        bool same = a->dtype == b->dtype && memcmp(p->a, p->b, n * a_bytes) == 0;
        d->differs |= !same;
        if (!convert) continue;
        tp_convert_to_f32(a->dtype, p->a, n, p->x);
        tp_convert_to_f32(b->dtype, p->b, n, p->y);
        add_squares(p->y, n, d);
        if (!same) measure(p->x, p->y, n, d);
    }
    return TP_OK;
}

static tp_status compare_values(struct report *r, const tp_tensor_place *a, const tp_tensor_place *b, struct distance *d)
{
    struct pieces *pieces = tp_alloc_raw(r->ctx, 1, sizeof *pieces);
    tp_status status = pieces != NULL ? compare_pieces(r, a, b, pieces, d) : TP_NOMEM;
    tp_free(pieces);
    return status;
}

static double relative(const struct distance *d)
{
    return d->squares_b > 0 ? sqrt(d->squares / d->squares_b) : d->squares > 0 ? INFINITY : 0;
}

static void put_distance(struct report *r, const struct distance *d)
{
    tp_buf_text(&r->out, r->json ? "\"largest\": " : "largest difference ");
    tp_json_write_f64(&r->out, d->largest, r->json ? 17 : 3);
    tp_buf_text(&r->out, r->json ? ", \"relative\": " : ", relative ");
    tp_json_write_f64(&r->out, relative(d), r->json ? 17 : 3);
}

/* ---- tensors ---- */

static void put_name(struct report *r, const char *separator, tp_span name)
{
    if (!r->json) {
        tp_buf_printf(&r->out, "  %.*s: ", (int)name.len, name.data);
        return;
    }
    tp_buf_text(&r->out, separator);
    tp_buf_text(&r->out, "{\"name\": ");
    tp_json_write_string(&r->out, name.data, name.len);
}

static void put_shape(struct report *r, const char *key, const tp_json *tensor)
{
    if (r->json) tp_buf_printf(&r->out, ", \"%s\": {\"dtype\": ", key);
    tp_span dtype = tp_json_string(tp_json_get(tensor, "dtype"));
    if (r->json)
        tp_json_write_string(&r->out, dtype.data, dtype.len);
    else
        tp_buf_append(&r->out, dtype.data, dtype.len);
    tp_buf_text(&r->out, r->json ? ", \"shape\": " : " ");
    tp_json_write(&r->out, tp_json_get(tensor, "shape"), 0);
    if (r->json) tp_buf_char(&r->out, '}');
}

static bool same_member(const tp_json *a, const tp_json *b, const char *key, struct report *r)
{
    tp_buf_clear(&r->text_a);
    tp_buf_clear(&r->text_b);
    tp_json_write(&r->text_a, tp_json_get(a, key), 0);
    tp_json_write(&r->text_b, tp_json_get(b, key), 0);
    return same_text(r);
}

/* What differs between two tensors of one name. */
struct comparison {
    const tp_json *a, *b;
    bool same_shape, same_type;
    struct distance d; /* of values, if the shapes are the same */
};

static void count(struct report *r, const struct comparison *c, tp_span name)
{
    bool first = !isnan(r->all.largest) && !(c->d.largest <= r->all.largest);
    r->shapes += !c->same_shape || !c->same_type;
    r->values += c->same_shape && c->same_type;
    if (!c->same_shape) return;
    r->all.squares += c->d.squares;
    r->all.squares_b += c->d.squares_b;
    if (!first) return;
    r->all.largest = c->d.largest;
    r->place = name;
}

static void put_comparison(struct report *r, const struct comparison *c, tp_span name)
{
    put_name(r, r->any ? ", " : "", name);
    r->any = true;
    if (!c->same_shape || !c->same_type) {
        put_shape(r, "here", c->a);
        if (!r->json) tp_buf_text(&r->out, " | ");
        put_shape(r, "there", c->b);
    }
    if (c->same_shape) {
        if (r->json || !c->same_type) tp_buf_text(&r->out, ", ");
        put_distance(r, &c->d);
    }
    tp_buf_text(&r->out, r->json ? "}" : "\n");
}

static tp_status compare_tensor(struct report *r, size_t i, size_t j)
{
    struct comparison c = {.a = tp_json_at(r->a.tensors, i), .b = tp_json_at(r->b.tensors, j)};
    tp_span name = tp_json_string(tp_json_get(c.a, "name"));
    c.same_shape = same_member(c.a, c.b, "shape", r);
    c.same_type = same_member(c.a, c.b, "dtype", r);
    if (c.same_shape) TP_TRY(compare_values(r, &r->a.found.places[i], &r->b.found.places[j], &c.d));
    if (c.same_shape && c.same_type && !c.d.differs) {
        r->same++;
        r->all.squares_b += c.d.squares_b;
        return TP_OK;
    }
    count(r, &c, name);
    if (r->json || r->each || !c.same_shape) put_comparison(r, &c, name);
    return TP_OK;
}

/* Names that `other` does not have. */
static size_t put_missing(struct report *r, const char *key, const char *label, const struct side *side,
                          const struct side *other)
{
    size_t n = 0;
    if (r->json) tp_buf_printf(&r->out, ", \"%s\": [", key);
    for (size_t i = 0; i < tp_map_count(side->names); i++) {
        tp_span name;
        int64_t number;
        tp_map_at(side->names, i, &name, &number);
        if (tp_map_get(other->names, name, &number)) continue;
        if (r->json) {
            if (n > 0) tp_buf_text(&r->out, ", ");
            tp_json_write_string(&r->out, name.data, name.len);
        } else {
            tp_buf_printf(&r->out, "%s %.*s\n", label, (int)name.len, name.data);
        }
        n++;
    }
    if (r->json) tp_buf_char(&r->out, ']');
    return n;
}

static tp_status compare_tensors(struct report *r)
{
    r->only_a = put_missing(r, "only_here", "only here:", &r->a, &r->b);
    r->only_b = put_missing(r, "only_there", "only there:", &r->b, &r->a);
    if (r->json) tp_buf_text(&r->out, ", \"tensors\": [");
    for (size_t i = 0; i < tp_map_count(r->a.names); i++) {
        tp_span name;
        int64_t ours, theirs;
        tp_map_at(r->a.names, i, &name, &ours);
        if (tp_map_get(r->b.names, name, &theirs)) TP_TRY(compare_tensor(r, (size_t)ours, (size_t)theirs));
    }
    if (r->json) tp_buf_char(&r->out, ']');
    return TP_OK;
}

static void conclude(struct report *r)
{
    bool identical = r->settings + r->only_a + r->only_b + r->shapes + r->values == 0;
    if (r->json) {
        tp_buf_printf(&r->out, ", \"same_tensors\": %zu, ", r->same);
        put_distance(r, &r->all);
        tp_buf_printf(&r->out, ", \"identical\": %s}\n", identical ? "true" : "false");
    } else if (identical) {
        tp_buf_printf(&r->out, "identical: %zu tensors\n", r->same);
    } else {
        tp_buf_printf(&r->out, "%zu tensors are the same, %zu have other values, %zu another type or shape", r->same, r->values,
                      r->shapes);
        if (r->place.len > 0) {
            tp_buf_text(&r->out, "; ");
            put_distance(r, &r->all);
            tp_buf_printf(&r->out, ", in %.*s%s", (int)r->place.len, r->place.data, r->each ? "" : " (--tensors lists them)");
        }
        tp_buf_char(&r->out, '\n');
    }
}

static tp_status print(struct report *r)
{
    tp_buf shown;
    TP_TRY(tp_buf_status(r->ctx, &r->out, "result"));
    if (r->json) return tp_cli_print(r->ctx, r->out.data, r->out.len);
    tp_buf_init(&shown, 0);
    tp_cli_show_text(&shown, r->out.data, r->out.len);
    tp_status status = tp_buf_status(r->ctx, &shown, "result");
    if (status == TP_OK) status = tp_cli_print(r->ctx, shown.data, shown.len);
    tp_buf_free(&shown);
    return status;
}

tp_status tp_cli_diff(tp_ctx *ctx, const char *path, const char *other, bool json, bool each)
{
    struct report r = {.ctx = ctx, .json = json, .each = each};
    tp_buf_init(&r.out, 0);
    tp_buf_init(&r.text_a, 0);
    tp_buf_init(&r.text_b, 0);
    tp_status status = open_side(ctx, path, &r.a);
    if (status == TP_OK) status = open_side(ctx, other, &r.b);
    if (status == TP_OK) {
        compare_settings(&r);
        status = compare_tensors(&r);
    }
    if (status == TP_OK) {
        conclude(&r);
        status = print(&r);
    }
    close_side(&r.a);
    close_side(&r.b);
    tp_buf_free(&r.out);
    tp_buf_free(&r.text_a);
    tp_buf_free(&r.text_b);
    return status;
}
