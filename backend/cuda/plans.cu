/* A table of algorithms with open addressing, and its file: a line of numbers for each tuned product, the key's and then the
 * algorithm's, which cuBLASLt lets us keep as bytes for the same version on the same kind of GPU. The program carries such
 * lines as well, made from files by scripts/make_tuned_products. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/plans.cuh"
#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"

#define FILE_LIMIT ((size_t)8 << 20)
#define KEY_WORDS  ((int)(sizeof(tp_plan_key) / sizeof(int32_t)))
#define WORDS      (KEY_WORDS + (int)(sizeof(cublasLtMatmulAlgo_t) / sizeof(int32_t)))

tp_status tp_plans_open(tp_ctx *ctx, tp_plans *plans)
{
    plans->slots = (tp_plan_slot *)tp_alloc(ctx, TP_PLANS, sizeof *plans->slots);
    return plans->slots != NULL ? TP_OK : TP_NOMEM;
}

void tp_plans_close(tp_plans *plans)
{
    tp_free(plans->slots);
}

tp_plan_slot *tp_plans_find(tp_plans *plans, const tp_plan_key *key)
{
    const unsigned char *bytes = reinterpret_cast<const unsigned char *>(key);
    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    for (size_t i = 0; i < sizeof *key; i++) hash = (hash ^ bytes[i]) * 1099511628211u;
    for (uint64_t i = hash ^ hash >> 32;; i++) {
        tp_plan_slot *slot = &plans->slots[i % TP_PLANS];
        if (slot->state == TP_PLAN_EMPTY) return plans->n < TP_PLANS / 4 * 3 ? slot : NULL;
        if (memcmp(&slot->key, key, sizeof *key) == 0) return slot;
    }
}

/* How many times as large as the other. */
static double ratio_of(int64_t a, int64_t b)
{
    return a > b ? (double)a / (double)b : (double)b / (double)a;
}

const tp_plan_slot *tp_plans_near(const tp_plans *plans, const tp_plan_key *key)
{
    const tp_plan_slot *near = NULL;
    for (int i = 0; i < TP_PLANS; i++) {
        const tp_plan_slot *slot = &plans->slots[i];
        tp_plan_key as = slot->key;
        if (slot->state < TP_PLAN_CARRIED) continue;
        as.n = key->n;
        if (memcmp(&as, key, sizeof as) != 0 || ratio_of(slot->key.n, key->n) > 2) continue;
        const double now = ratio_of(slot->key.n, key->n), best = near != NULL ? ratio_of(near->key.n, key->n) : INFINITY;
        if (now < best || (now == best && slot->key.n < near->key.n)) near = slot;
    }
    return near;
}

void tp_plans_fill(tp_plans *plans, tp_plan_slot *slot, const tp_plan_key *key, const cublasLtMatmulAlgo_t *algorithm,
                   int state)
{
    if (slot->state == TP_PLAN_EMPTY) plans->n++;
    slot->key = *key;
    slot->algorithm = *algorithm;
    slot->state = state;
    slot->checked = false;
}

/* ---- the file ---- */

/* ".../tapeft/cublaslt-130100-NVIDIA-H100-80GB-HBM3.txt"; INVALID without a home. */
static tp_status path_of(tp_ctx *ctx, const tp_plans_owner *owner, tp_buf *path)
{
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    if (cache != NULL && cache[0] == '/')
        tp_buf_text(path, cache);
    else if (home != NULL && home[0] == '/')
        tp_buf_printf(path, "%s/.cache", home);
    else
        return tp_fail(ctx, TP_INVALID, "neither XDG_CACHE_HOME nor HOME says where tuned algorithms are kept");
    tp_buf_printf(path, "/tapeft/cublaslt-%zu-", owner->version);
    for (const char *c = owner->gpu; *c != '\0'; c++)
        tp_buf_char(path, (*c >= '0' && *c <= '9') || (*c >= 'A' && *c <= 'Z') || (*c >= 'a' && *c <= 'z') ? *c : '-');
    tp_buf_text(path, ".txt");
    return tp_buf_status(ctx, path, "path of tuned algorithms");
}

/* One line into the table; false if it is not a line of ours. */
static bool read_line(tp_plans *plans, const char *line, int state)
{
    int32_t words[WORDS];
    tp_plan_key key;
    cublasLtMatmulAlgo_t algorithm;
    for (int i = 0; i < WORDS; i++) {
        char *end;
        unsigned long word = strtoul(line, &end, 16);
        if (end == line || word > UINT32_MAX) return false;
        words[i] = (int32_t)(uint32_t)word;
        line = end;
    }
    while (*line == ' ') line++;
    if (*line != '\n') return false;
    memcpy(&key, words, sizeof key);
    memcpy(&algorithm, words + KEY_WORDS, sizeof algorithm);
    tp_plan_slot *slot = tp_plans_find(plans, &key);
    if (slot != NULL) tp_plans_fill(plans, slot, &key, &algorithm, state);
    return true;
}

/* All lines of a text; false at the first damaged one. */
static bool read_lines(tp_plans *plans, const char *text, size_t n, int state)
{
    const char *line = text, *end = text + n;
    while (line < end) {
        const char *newline = (const char *)memchr(line, '\n', (size_t)(end - line));
        if (newline == NULL || !read_line(plans, line, state)) return false;
        line = newline + 1;
    }
    return true;
}

/* ---- what the program carries ---- */

static const struct {
    size_t version;
    int capability, multiprocessors;
    const char *lines;
} carried[] = {
#include "backend/cuda/tuned_products.inc"
};

static void read_carried(tp_plans *plans, const tp_plans_owner *owner)
{
    for (size_t i = 0; i < sizeof carried / sizeof *carried; i++)
        if (carried[i].version == owner->version && carried[i].capability == owner->capability &&
            carried[i].multiprocessors == owner->multiprocessors)
            (void)read_lines(plans, carried[i].lines, strlen(carried[i].lines), TP_PLAN_CARRIED);
}

tp_status tp_plans_load(tp_ctx *ctx, tp_plans *plans, const tp_plans_owner *owner)
{
    char *text = NULL;
    size_t n = 0;
    tp_buf path;
    read_carried(plans, owner);
    tp_buf_init(&path, 0);
    tp_status status = path_of(ctx, owner, &path);
    bool there = status == TP_OK && tp_path_exists(tp_buf_cstr(&path));
    if (there) status = tp_file_read(ctx, tp_buf_cstr(&path), FILE_LIMIT, &text, &n);
    if (status != TP_OK) tp_ctx_clear(ctx); /* a cache: without it there are still the other answers */
    if (status == TP_OK && there && !read_lines(plans, text, n, TP_PLAN_TUNED))
        tp_warn(ctx, "%s: damaged, the rest of it is not used; `tapeft tune` writes it again", tp_buf_cstr(&path));
    tp_free(text);
    tp_buf_free(&path);
    return TP_OK;
}

tp_status tp_plans_save(tp_ctx *ctx, const tp_plans *plans, const tp_plans_owner *owner, tp_buf *path)
{
    tp_buf text;
    tp_buf_init(&text, 0);
    tp_status status = path_of(ctx, owner, path);
    for (int i = 0; i < TP_PLANS; i++) {
        int32_t words[WORDS];
        const tp_plan_slot *slot = &plans->slots[i];
        if (slot->state != TP_PLAN_TUNED) continue;
        memcpy(words, &slot->key, sizeof slot->key);
        memcpy(words + KEY_WORDS, &slot->algorithm, sizeof slot->algorithm);
        for (int w = 0; w < WORDS; w++) tp_buf_printf(&text, w > 0 ? " %x" : "%x", (unsigned)words[w]);
        tp_buf_char(&text, '\n');
    }
    char *folder = status == TP_OK ? tp_strdup(ctx, tp_buf_cstr(path)) : NULL;
    if (status == TP_OK && folder == NULL) status = TP_NOMEM;
    if (status == TP_OK) *strrchr(folder, '/') = '\0';
    if (status == TP_OK) status = tp_folder_make(ctx, folder);
    if (status == TP_OK) status = tp_buf_status(ctx, &text, "tuned algorithms");
    if (status == TP_OK) status = tp_file_write(ctx, tp_buf_cstr(path), text.data, text.len);
    tp_free(folder);
    tp_buf_free(&text);
    return status;
}
