/* A file and the files that it includes, as one tree.
 *
 *     include: [base.yaml, data.yaml]     # relative to the file that says so
 *
 * The included files come first, in their order, then the file's own keys: later ones win, blocks
 * merge key by key, everything else is replaced as a whole. Names of other tools become ours in each
 * file before that, so that `lora_rank` of a base is overridden by `lora_r` of the file above it. */
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "base/file.h"
#include "base/mem.h"
#include "recipes/parts.h"

/* The files being read, innermost first: a cycle is a file that is already in this chain. */
struct open_file {
    const struct open_file *includer;
    const char *path;
    dev_t device;
    ino_t inode;
    int depth;
};

static tp_status read_file(tp_reading *r, const char *path, const tp_yaml *asked, const struct open_file *includer,
                           tp_yaml **root);

/* ---- merging ---- */

void tp_merge_blocks(tp_yaml *base, tp_yaml *over)
{
    struct {
        tp_yaml *base, *over;
    } stack[TP_YAML_DEPTH + 1];
    size_t n = 0;
    stack[n].base = base;
    stack[n++].over = over;
    while (n > 0) {
        tp_yaml *to = stack[n - 1].base, *member = stack[n - 1].over->first;
        if (member == NULL) {
            n--;
            continue;
        }
        tp_yaml_unlink(member);
        tp_yaml *old = tp_yaml_find(to, member->key);
        if (old == NULL) {
            tp_yaml_append(to, member);
        } else if (old->kind == TP_YAML_BLOCK && member->kind == TP_YAML_BLOCK && n <= TP_YAML_DEPTH) {
            stack[n].base = old;
            stack[n++].over = member;
        } else {
            tp_yaml_replace(old, member);
        }
    }
}

/* ---- one file ---- */

static tp_status parse(tp_reading *r, const char *name, const char *text, size_t n, tp_yaml **root)
{
    size_t errors = r->problems->n_errors;
    TP_TRY(tp_yaml_parse(r->ctx, &r->recipe->tree, r->problems, name, false, text, n, root));
    if (*root == NULL && r->problems->n_errors == errors)
        return tp_problems_add(r->ctx, r->problems, TP_INVALID, "%s: empty; a recipe is lines of key: value", name);
    if (*root != NULL && (*root)->kind != TP_YAML_BLOCK) {
        char found[100];
        tp_status st = tp_reading_problem(r, (*root)->at, "a recipe is lines of key: value, got %s",
                                          tp_yaml_describe(*root, found, sizeof found));
        *root = NULL;
        return st;
    }
    return *root != NULL ? tp_reading_names(r, *root) : TP_OK;
}

/* Takes `include` out of the root; NULL if it has none. */
static tp_yaml *take_include(tp_yaml *root)
{
    tp_yaml *include = tp_yaml_find(root, "include");
    if (include != NULL) tp_yaml_unlink(include);
    return include;
}

tp_status tp_reading_text(tp_reading *r, const char *name, const char *text, size_t n, tp_yaml **root)
{
    TP_TRY(parse(r, name, text, n, root));
    tp_yaml *include = *root != NULL ? take_include(*root) : NULL;
    return include != NULL ? tp_reading_problem(r, include->key_at, "include: only a file can include others") : TP_OK;
}

/* The path of an included file: relative to the folder of the file that names it. */
static char *resolve(tp_reading *r, const char *includer, const char *path)
{
    const char *slash = strrchr(includer, '/');
    if (path[0] == '/' || slash == NULL) return tp_strdup(r->ctx, path);
    tp_buf joined;
    tp_buf_init(&joined, 0);
    tp_buf_append(&joined, includer, (size_t)(slash - includer) + 1);
    tp_buf_text(&joined, path);
    if (tp_buf_status(r->ctx, &joined, "include") == TP_OK) return joined.data;
    tp_buf_free(&joined);
    return NULL;
}

static tp_status include_one(tp_reading *r, const tp_yaml *item, const struct open_file *file, tp_yaml *merged, bool *failed)
{
    tp_yaml *root = NULL;
    char found[100];
    if (item->kind != TP_YAML_SCALAR || item->text[0] == '\0')
        return tp_reading_problem(r, item->at, "include: expected a path or a list of paths, got %s",
                                  tp_yaml_describe(item, found, sizeof found));
    if (strstr(item->text, "${") != NULL)
        return tp_reading_problem(r, item->at, "include: variables are filled in after including, so none can stand here");
    char *path = resolve(r, file->path, item->text);
    if (path == NULL) return TP_NOMEM;
    tp_status st = read_file(r, path, item, file, &root);
    tp_free(path);
    TP_TRY(st);
    if (root != NULL)
        tp_merge_blocks(merged, root);
    else
        *failed = true;
    return TP_OK;
}

/* *root becomes: everything included, then what it held itself. */
static tp_status include_all(tp_reading *r, const tp_yaml *include, const struct open_file *file, tp_yaml **root)
{
    tp_yaml *merged = tp_yaml_new(r->ctx, &r->recipe->tree, TP_YAML_BLOCK, (*root)->at, NULL);
    if (merged == NULL) return TP_NOMEM;
    bool failed = false;
    const tp_yaml *item = include->kind == TP_YAML_LIST ? include->first : include;
    for (; item != NULL && !failed; item = include->kind == TP_YAML_LIST ? item->next : NULL)
        TP_TRY(include_one(r, item, file, merged, &failed));
    tp_merge_blocks(merged, *root);
    *root = failed ? NULL : merged;
    return TP_OK;
}

static tp_status parse_file(tp_reading *r, const char *text, size_t n, const struct open_file *file, tp_yaml **root)
{
    TP_TRY(parse(r, file->path, text, n, root));
    tp_yaml *include = *root != NULL ? take_include(*root) : NULL;
    return include != NULL ? include_all(r, include, file, root) : TP_OK;
}

/* ---- the chain of files ---- */

/* A file that cannot be read is a problem at the line that asked for it. */
static tp_status report_unreadable(tp_reading *r, const tp_yaml *asked, tp_status status, const char *message)
{
    char place[512];
    if (status == TP_NOMEM) return tp_fail(r->ctx, TP_NOMEM, "%s", message);
    if (status == TP_FORMAT) status = TP_INVALID; /* a recipe longer than its limit */
    if (asked == NULL) return tp_problems_add(r->ctx, r->problems, status, "%s", message);
    return tp_problems_add(r->ctx, r->problems, status, "%s: include: %s", tp_mark_text(asked->at, place, sizeof place),
                           message);
}

/* Says why a file must not be read here; NULL if it may. */
static const char *refusal(tp_reading *r, const struct open_file *file)
{
    for (const struct open_file *f = file->includer; f != NULL; f = f->includer)
        if (f->device == file->device && f->inode == file->inode) return "includes itself";
    if (file->depth > TP_RECIPE_INCLUDE_DEPTH) return "included more than 8 levels deep";
    return ++r->n_files > TP_RECIPE_FILES ? "more than 64 files in one recipe" : NULL;
}

/* Calls itself for included files, TP_RECIPE_INCLUDE_DEPTH levels at most. */
static tp_status read_file(tp_reading *r, const char *path, const tp_yaml *asked, const struct open_file *includer,
                           tp_yaml **root)
{
    struct open_file file = {.includer = includer, .path = path, .depth = includer != NULL ? includer->depth + 1 : 0};
    struct stat info;
    *root = NULL;
    if (stat(path, &info) == 0) {
        file.device = info.st_dev;
        file.inode = info.st_ino;
        const char *why = refusal(r, &file);
        if (why != NULL && asked != NULL) return tp_reading_problem(r, asked->at, "include: %s: %s", path, why);
    }
    tp_ctx reading; /* its message becomes a problem with a line */
    tp_ctx_init(&reading);
    char *text = NULL;
    size_t n = 0;
    tp_status st = tp_file_read(&reading, path, TP_YAML_BYTES, &text, &n);
    if (st != TP_OK) return report_unreadable(r, asked, st, reading.message);
    st = parse_file(r, text, n, &file, root);
    tp_free(text);
    return st;
}

tp_status tp_reading_file(tp_reading *r, const char *path, tp_yaml **root)
{
    return read_file(r, path, NULL, NULL, root);
}
