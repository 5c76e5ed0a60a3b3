/* Matching module paths as PEFT does (its check_target_module_exists and get_pattern_key), with PCRE2 for Python's re. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "peft/target.h"

#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/mem.h"

/* Module paths are short, and an adapter may bring thousands of patterns for hundreds of them; PCRE2's own limits are ten
 * million steps and gigabytes. */
#define MATCH_LIMIT    50000u
#define HEAP_LIMIT_KIB 4096u

/* The digits of the group "idx" of a match. */
static bool read_index(pcre2_match_data *data, int64_t *index)
{
    char digits[20];
    PCRE2_SIZE n = sizeof digits;
    return pcre2_substring_copy_byname(data, (PCRE2_SPTR) "idx", (PCRE2_UCHAR *)digits, &n) == 0 && tp_parse_i64(digits, index);
}

/* Compiles and matches once: a handful of patterns against a few hundred paths, so nothing is cached. With `index` the match
 * has to have a number in its group "idx" too. */
static tp_status regex_matches(tp_ctx *ctx, const char *pattern, uint32_t options, const char *subject, bool *matches,
                               int64_t *index)
{
    int error;
    PCRE2_SIZE offset;
    pcre2_code *code = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, options | PCRE2_UTF, &error, &offset, NULL);
    if (code == NULL) {
        unsigned char text[160] = "out of memory";
        pcre2_get_error_message(error, text, sizeof text);
        return tp_fail(ctx, error == PCRE2_ERROR_NOMEMORY ? TP_NOMEM : TP_INVALID,
                       "regular expression \"%s\": %s at offset %zu", pattern, (const char *)text, offset);
    }
    pcre2_match_context *limits = pcre2_match_context_create(NULL);
    pcre2_match_data *data = pcre2_match_data_create_from_pattern(code, NULL);
    int result = PCRE2_ERROR_NOMEMORY;
    if (limits != NULL && data != NULL) {
        pcre2_set_match_limit(limits, MATCH_LIMIT);
        pcre2_set_heap_limit(limits, HEAP_LIMIT_KIB);
        result = pcre2_match(code, (PCRE2_SPTR)subject, PCRE2_ZERO_TERMINATED, 0, 0, data, limits);
    }
    *matches = result >= 0 && (index == NULL || read_index(data, index));
    pcre2_match_data_free(data);
    pcre2_match_context_free(limits);
    pcre2_code_free(code);
    if (result >= 0 || result == PCRE2_ERROR_NOMATCH) return TP_OK;
    if (result == PCRE2_ERROR_NOMEMORY) return tp_fail(ctx, TP_NOMEM, "regular expression \"%s\": out of memory", pattern);
    return tp_fail(ctx, TP_INVALID, "regular expression \"%s\" is too costly to match against %s", pattern, subject);
}

static bool suffix_matches(const char *path, const char *name)
{
    size_t n = strlen(path), m = strlen(name);
    return n > m && path[n - m - 1] == '.' && memcmp(path + n - m, name, m) == 0;
}

static tp_status names_match(tp_ctx *ctx, const tp_names *names, const char *path, bool *matches, bool *whole, int *entry)
{
    *matches = *whole = false;
    *entry = -1;
    if (names->is_regex && names->n > 0) {
        *entry = 0;
        return regex_matches(ctx, names->list[0], PCRE2_ANCHORED | PCRE2_ENDANCHORED, path, matches, NULL);
    }
    for (size_t i = 0; i < names->n && !*whole; i++) { /* a whole path wins over an ending that stands before it */
        *whole = strcmp(path, names->list[i]) == 0;
        if (!*whole && (*matches || !suffix_matches(path, names->list[i]))) continue;
        *matches = true;
        *entry = (int)i;
    }
    return TP_OK;
}

/* The first numbered segment behind two others, or behind one that the layers_pattern entry `after` (an expression) matches. */
static tp_status layer_index(tp_ctx *ctx, const char *path, const char *after, bool *found, int64_t *index)
{
    tp_buf pattern;
    if (after == NULL) return regex_matches(ctx, ".*?\\.[^.]*\\.(?P<idx>\\d+)\\.", PCRE2_ANCHORED, path, found, index);
    tp_buf_init(&pattern, 0);
    tp_buf_printf(&pattern, "(?:^|.*?\\.)%s\\.(?P<idx>\\d+)\\.", after);
    tp_status status = tp_buf_status(ctx, &pattern, "layers_pattern");
    if (status == TP_OK) status = regex_matches(ctx, tp_buf_cstr(&pattern), PCRE2_ANCHORED, path, found, index);
    tp_buf_free(&pattern);
    return status;
}

static tp_status layer_matches(tp_ctx *ctx, const tp_targets *targets, const char *path, bool *matches)
{
    int64_t index = 0;
    bool found = false;
    *matches = targets->n_layers == 0;
    if (*matches) return TP_OK;
    if (targets->n_layers_pattern == 0) TP_TRY(layer_index(ctx, path, NULL, &found, &index));
    for (size_t i = 0; i < targets->n_layers_pattern && !found; i++)
        TP_TRY(layer_index(ctx, path, targets->layers_pattern[i], &found, &index));
    for (size_t i = 0; found && i < targets->n_layers && !*matches; i++) *matches = targets->layers[i] == index;
    return TP_OK;
}

tp_status tp_target_match(tp_ctx *ctx, const tp_targets *targets, const char *path, bool is_head, bool *matches, int *entry)
{
    bool excluded, whole;
    int which = -1;
    if (entry == NULL) entry = &which;
    *matches = false;
    TP_TRY(names_match(ctx, &targets->exclude, path, &excluded, &whole, entry));
    *entry = -1;
    if (excluded) return TP_OK;
    if (targets->all_linear) return is_head ? TP_OK : layer_matches(ctx, targets, path, matches);
    TP_TRY(names_match(ctx, &targets->include, path, matches, &whole, entry));
    if (!*matches || whole || targets->include.is_regex) return TP_OK;
    return layer_matches(ctx, targets, path, matches);
}

tp_status tp_pattern_value(tp_ctx *ctx, const tp_pattern *patterns, size_t n, const char *path, double otherwise, double *value,
                           int *index)
{
    *value = otherwise;
    *index = -1;
    for (size_t i = 0; i < n; i++) {
        tp_buf pattern;
        bool matches = false;
        tp_buf_init(&pattern, 0);
        tp_buf_printf(&pattern, "(.*\\.)?(%s)$", patterns[i].key);
        tp_status status = tp_buf_status(ctx, &pattern, "pattern");
        if (status == TP_OK) status = regex_matches(ctx, tp_buf_cstr(&pattern), PCRE2_ANCHORED, path, &matches, NULL);
        tp_buf_free(&pattern);
        if (status != TP_OK) return status;
        if (matches) {
            *value = patterns[i].value;
            *index = (int)i;
            return TP_OK;
        }
    }
    return TP_OK;
}
