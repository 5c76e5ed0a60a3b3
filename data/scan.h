/* Hand-written scanners for the pre-tokenizer patterns that nearly every model uses.
 *
 * They cut exactly where the pattern would under a backtracking engine, in time linear in the text, also for runs of
 * millions of blanks or newlines. A pattern is recognised by its exact text; everything else goes through regex.h. */
#ifndef TP_DATA_SCAN_H
#define TP_DATA_SCAN_H

#include "base/text.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tp_scanner {
    const char *name;
    const char *pattern;
    size_t (*next)(const struct tp_scanner *, const char *text, size_t n, size_t at);
    unsigned digits; /* longest run of digits in a piece; 0: no limit */
    bool long_s;     /* contractions ignore case as Unicode does: U+017F stands for s */
} tp_scanner;

/* The scanner for a pattern, or NULL. */
TP_API const tp_scanner *tp_scanner_find(tp_span pattern);
/* Scanner number i, or NULL behind the last. */
TP_API const tp_scanner *tp_scanner_at(size_t i);
/* GPT-2's pattern. */
TP_API const tp_scanner *tp_scanner_gpt2(void);

/* End of the piece that begins at byte `at` < n of valid UTF-8. */
static inline size_t tp_scanner_next(const tp_scanner *scanner, const char *text, size_t n, size_t at)
{
    return scanner->next(scanner, text, n, at);
}

#ifdef __cplusplus
}
#endif
#endif
