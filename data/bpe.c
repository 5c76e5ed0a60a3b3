/* Pair table, symbols, merging of short and long pieces, word cache. */
#include "data/bpe.h"

#include "base/mem.h"
#include "data/byte_level.h"
#include "data/unicode.h"

#define NO_TOKEN UINT32_MAX       /* a character without token, before late fallback */
#define MERGED   (UINT32_MAX - 1) /* a symbol that its left neighbour has taken in */
#define NO_RANK  UINT32_MAX
#define LAST     UINT32_MAX /* as an index: no neighbour */

struct merge {
    uint32_t left, right; /* left is NO_TOKEN in an empty slot */
    uint32_t rank, result;
};

struct tp_bpe {
    const tp_vocabulary *vocabulary;
    tp_bpe_options options;
    struct merge *merges; /* open addressing, a power of two of slots, at most half full */
    size_t n_slots, n_merges;
    uint32_t next_rank;
    int32_t last_result; /* of the merge that was added last */
    uint64_t fingerprint;
    uint64_t seed;            /* secret, so that no file can make pairs collide */
    tp_map *extra;            /* characters that are no tokens but parts of some: ids from vocabulary->size upwards */
    bool crosses_words;       /* some merge gives a token with U+2581 behind another character */
    int32_t byte_ids[256];    /* tokens of the byte alphabet's characters */
    int32_t ascii_ids[128];   /* tokens of ASCII characters */
    int32_t byte_tokens[256]; /* <0x00> to <0xFF> */
};

/* ---- the pair table ---- */

static const struct merge no_merge = {NO_TOKEN, 0, NO_RANK, 0};

static size_t slot_of(const tp_bpe *bpe, uint32_t left, uint32_t right)
{
    uint64_t x = ((uint64_t)left << 32 | right) ^ bpe->seed;
    x = (x ^ x >> 32) * UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 29) * UINT64_C(0xbf58476d1ce4e5b9);
    return (size_t)(x >> 32) & (bpe->n_slots - 1);
}

static const struct merge *find_merge(const tp_bpe *bpe, uint32_t left, uint32_t right)
{
    for (size_t i = slot_of(bpe, left, right);; i = (i + 1) & (bpe->n_slots - 1)) {
        const struct merge *m = &bpe->merges[i];
        if (m->left == NO_TOKEN) return &no_merge;
        if (m->left == left && m->right == right) return m;
    }
}

/* A pair that comes twice takes the later rank. */
static void put_merge(tp_bpe *bpe, struct merge merge)
{
    size_t i = slot_of(bpe, merge.left, merge.right);
    while (bpe->merges[i].left != NO_TOKEN && (bpe->merges[i].left != merge.left || bpe->merges[i].right != merge.right))
        i = (i + 1) & (bpe->n_slots - 1);
    if (bpe->merges[i].left == NO_TOKEN) bpe->n_merges++;
    bpe->merges[i] = merge;
}

static tp_status resize(tp_ctx *ctx, tp_bpe *bpe, size_t n_merges)
{
    size_t n_slots = 64;
    while (n_slots / 2 < n_merges)
        if (!tp_mul_size(n_slots, 2, &n_slots)) return tp_fail(ctx, TP_NOMEM, "too many merges");
    struct merge *old = bpe->merges, *grown = tp_alloc_raw(ctx, n_slots, sizeof *grown);
    if (grown == NULL) return TP_NOMEM;
    size_t n_old = bpe->n_slots;
    for (size_t i = 0; i < n_slots; i++) grown[i] = no_merge;
    bpe->merges = grown;
    bpe->n_slots = n_slots;
    bpe->n_merges = 0;
    for (size_t i = 0; i < n_old; i++)
        if (old[i].left != NO_TOKEN) put_merge(bpe, old[i]);
    tp_free(old);
    return TP_OK;
}

static tp_status add_pair(tp_ctx *ctx, tp_bpe *bpe, struct merge merge)
{
    if (bpe->n_merges >= bpe->n_slots / 2) TP_TRY(resize(ctx, bpe, 2 * bpe->n_merges + 1));
    put_merge(bpe, merge);
    bpe->fingerprint = (bpe->fingerprint ^ ((uint64_t)merge.left << 32 | merge.right)) * UINT64_C(0x100000001b3);
    bpe->fingerprint = (bpe->fingerprint ^ ((uint64_t)merge.rank << 32 | merge.result)) * UINT64_C(0x100000001b3);
    return TP_OK;
}

/* ---- building ---- */

static void find_single_tokens(tp_bpe *bpe)
{
    static const char hex[] = "0123456789ABCDEF";
    for (unsigned b = 0; b < 256; b++) {
        char text[7] = {'<', '0', 'x', hex[b >> 4], hex[b & 15], '>', '\0'}, utf8[4];
        size_t n = (size_t)tp_utf8_encode(tp_byte_to_char((unsigned char)b), utf8);
        char ascii = (char)b;
        bpe->byte_tokens[b] = tp_vocabulary_find(bpe->vocabulary, (tp_span){text, 6});
        bpe->byte_ids[b] = tp_vocabulary_find(bpe->vocabulary, (tp_span){utf8, n});
        if (b < 128) bpe->ascii_ids[b] = tp_vocabulary_find(bpe->vocabulary, (tp_span){&ascii, 1});
    }
}

static tp_status copy_text(tp_ctx *ctx, tp_span *text)
{
    text->data = tp_strndup(ctx, text->data != NULL ? text->data : "", text->len);
    return text->data != NULL ? TP_OK : TP_NOMEM;
}

static tp_status copy_options(tp_ctx *ctx, const tp_bpe_options *from, tp_bpe_options *to)
{
    *to = *from;
    to->prefix.data = to->suffix.data = to->missing_unk.data = NULL;
    tp_span prefix = from->prefix, suffix = from->suffix, missing = from->missing_unk;
    TP_TRY(copy_text(ctx, &prefix));
    to->prefix = prefix;
    TP_TRY(copy_text(ctx, &suffix));
    to->suffix = suffix;
    if (missing.data == NULL) return TP_OK;
    TP_TRY(copy_text(ctx, &missing));
    to->missing_unk = missing;
    return TP_OK;
}

tp_status tp_bpe_new(tp_ctx *ctx, const tp_vocabulary *vocabulary, const tp_bpe_options *options, size_t max_merges,
                     tp_bpe **out)
{
    *out = NULL;
    tp_bpe *bpe = tp_alloc(ctx, 1, sizeof *bpe);
    if (bpe == NULL) return TP_NOMEM;
    bpe->vocabulary = vocabulary;
    bpe->seed = tp_hash("pairs", 5);
    tp_status status = copy_options(ctx, options, &bpe->options);
    if (status == TP_OK) status = resize(ctx, bpe, max_merges);
    if (status != TP_OK) {
        tp_bpe_free(bpe);
        return status;
    }
    find_single_tokens(bpe);
    *out = bpe;
    return TP_OK;
}

static void free_const(const char *text)
{
    char *own;
    memcpy(&own, &text, sizeof own); /* ours: the options only lend it out as const */
    tp_free(own);
}

void tp_bpe_free(tp_bpe *bpe)
{
    if (bpe == NULL) return;
    free_const(bpe->options.prefix.data);
    free_const(bpe->options.suffix.data);
    free_const(bpe->options.missing_unk.data);
    tp_map_free(bpe->extra);
    tp_free(bpe->merges);
    tp_free(bpe);
}

#define MARK "\xe2\x96\x81" /* U+2581, SentencePiece's blank */

/* Whether the text has U+2581 behind another character. */
static bool has_inner_mark(tp_span text)
{
    for (size_t i = 3; i + 3 <= text.len; i++)
        if (memcmp(text.data + i, MARK, 3) == 0 && memcmp(text.data + i - 3, MARK, 3) != 0) return true;
    return text.len > 3 && ((memcmp(text.data + 1, MARK, 3) == 0) || (text.len > 4 && memcmp(text.data + 2, MARK, 3) == 0));
}

static tp_status find_part(tp_ctx *ctx, const tp_bpe *bpe, const char *where, tp_span part, int32_t *id)
{
    *id = tp_vocabulary_find(bpe->vocabulary, part);
    if (*id >= 0) return TP_OK;
    return tp_fail(ctx, TP_FORMAT, "%s: \"%.*s\" is not in the vocabulary", where, (int)(part.len < 100 ? part.len : 100),
                   part.data);
}

/* Merges mostly stand in the order in which their results were numbered: a look at the next id saves a search. */
static int32_t find_result(tp_bpe *bpe, tp_span text)
{
    int32_t next = bpe->last_result + 1;
    tp_span guess = tp_vocabulary_text(bpe->vocabulary, next);
    bool guessed = guess.data != NULL && tp_span_equal(guess, text);
    return bpe->last_result = guessed ? next : tp_vocabulary_find(bpe->vocabulary, text);
}

tp_status tp_bpe_add_merge(tp_ctx *ctx, tp_bpe *bpe, const char *where, tp_span left, tp_span right)
{
    char joined[512];
    int32_t left_id, right_id, result = -1;
    size_t skip = bpe->options.prefix.len;
    TP_TRY(find_part(ctx, bpe, where, left, &left_id));
    TP_TRY(find_part(ctx, bpe, where, right, &right_id));
    if (right.len < skip)
        return tp_fail(ctx, TP_FORMAT, "%s: \"%.*s\" is shorter than the continuing_subword_prefix of %zu bytes", where,
                       (int)right.len, right.data, skip);
    size_t n = left.len + right.len - skip; /* both are parts of memory: no overflow */
    char *text = n <= sizeof joined ? joined : n <= bpe->vocabulary->longest ? tp_alloc_raw(ctx, n, 1) : NULL;
    if (text == NULL && n <= bpe->vocabulary->longest) return TP_NOMEM;
    if (text != NULL) {
        memcpy(text, left.data, left.len);
        memcpy(text + left.len, right.data + skip, right.len - skip);
        result = find_result(bpe, (tp_span){text, n});
        if (has_inner_mark((tp_span){text, n})) bpe->crosses_words = true;
        if (text != joined) tp_free(text);
    }
    if (result < 0)
        return tp_fail(ctx, TP_FORMAT, "%s: \"%.*s\" + \"%.*s\" is not in the vocabulary", where,
                       (int)(left.len < 100 ? left.len : 100), left.data, (int)(right.len < 100 ? right.len : 100), right.data);
    struct merge merge = {(uint32_t)left_id, (uint32_t)right_id, bpe->next_rank++, (uint32_t)result};
    return add_pair(ctx, bpe, merge);
}

/* The symbol that a part of a token can be: a token, or a single character. */
static tp_status part_symbol(tp_ctx *ctx, tp_bpe *bpe, tp_span part, uint32_t *symbol)
{
    int64_t extra;
    uint32_t c;
    int32_t id = tp_vocabulary_find(bpe->vocabulary, part);
    *symbol = NO_TOKEN;
    if (id >= 0) {
        *symbol = (uint32_t)id;
        return TP_OK;
    }
    if (tp_char_next(part.data, part.len, &c) != part.len) return TP_OK;
    if (bpe->extra == NULL) bpe->extra = tp_map_new(ctx, true);
    if (bpe->extra == NULL) return TP_NOMEM;
    if (!tp_map_get(bpe->extra, part, &extra)) {
        extra = (int64_t)(bpe->vocabulary->size + tp_map_count(bpe->extra));
        TP_TRY(tp_map_put(ctx, bpe->extra, part, extra, NULL));
    }
    *symbol = (uint32_t)extra;
    return TP_OK;
}

#define LONGEST_SCORED 512 /* bytes; SentencePiece's own limit is 512, models use 16 characters */

tp_status tp_bpe_add_token_merges(tp_ctx *ctx, tp_bpe *bpe, int32_t id, uint32_t rank)
{
    tp_span text = tp_vocabulary_text(bpe->vocabulary, id);
    if (text.len > LONGEST_SCORED)
        return tp_fail(ctx, TP_UNSUPPORTED, "token %d has %zu bytes, at most %d are supported with scores", id, text.len,
                       LONGEST_SCORED);
    if (has_inner_mark(text)) bpe->crosses_words = true;
    uint32_t c;
    for (size_t i = 0, n; i < text.len; i += n) {
        n = tp_char_next(text.data + i, text.len - i, &c);
        if (i == 0) continue;
        uint32_t left, right;
        TP_TRY(part_symbol(ctx, bpe, (tp_span){text.data, i}, &left));
        TP_TRY(part_symbol(ctx, bpe, (tp_span){text.data + i, text.len - i}, &right));
        if (left == NO_TOKEN || right == NO_TOKEN) continue;
        struct merge merge = {left, right, rank, (uint32_t)id};
        TP_TRY(add_pair(ctx, bpe, merge));
    }
    return TP_OK;
}

void tp_bpe_finish(tp_bpe *bpe)
{
    const tp_bpe_options *o = &bpe->options;
    bpe->options.cut_words = !bpe->crosses_words && !o->bytes && !o->ignore_merges && o->prefix.len == 0 &&
                             o->suffix.len == 0 && tp_vocabulary_find(bpe->vocabulary, tp_span_of(MARK)) >= 0;
    bpe->fingerprint ^= tp_hash(bpe->vocabulary->bytes, bpe->vocabulary->n_bytes);
    bpe->fingerprint ^= tp_hash(bpe->byte_ids, sizeof bpe->byte_ids) ^ tp_hash(bpe->byte_tokens, sizeof bpe->byte_tokens) << 1;
    bpe->fingerprint ^= (uint64_t)o->bytes << 1 | (uint64_t)o->byte_fallback << 2 | (uint64_t)o->fuse_unk << 3 |
                        (uint64_t)o->ignore_merges << 4 | (uint64_t)o->late_fallback << 5;
}

uint64_t tp_bpe_fingerprint(const tp_bpe *bpe)
{
    return bpe->fingerprint;
}

/* ---- scratch ---- */

struct tp_bpe_symbol {
    uint32_t id;
    uint32_t begin;          /* in the word; it ends where the next one begins */
    uint32_t previous, next; /* while a long word is merged */
};

#define CACHE_SLOTS (1u << 14)
#define CACHE_KEY   22
#define CACHE_IDS   8

struct tp_bpe_word { /* one cache line; n_key is 0 in an empty slot */
    uint8_t n_key, n_ids;
    char key[CACHE_KEY];
    uint8_t begins[CACHE_IDS];
    int32_t ids[CACHE_IDS];
};

void tp_bpe_scratch_free(tp_bpe_scratch *scratch)
{
    tp_free(scratch->symbols);
    tp_free(scratch->heap);
    tp_free(scratch->cache);
    tp_buf_free(&scratch->text);
    *scratch = (tp_bpe_scratch){0};
}

void tp_bpe_scratch_clear(tp_bpe_scratch *scratch)
{
    if (scratch->cache != NULL) memset(scratch->cache, 0, CACHE_SLOTS * sizeof *scratch->cache);
}

static tp_status add_symbol(tp_ctx *ctx, tp_bpe_scratch *s, uint32_t id, size_t begin)
{
    TP_TRY(tp_grow(ctx, &s->symbols, &s->symbols_capacity, s->n_symbols + 1, sizeof *s->symbols));
    s->symbols[s->n_symbols++] = (struct tp_bpe_symbol){.id = id, .begin = (uint32_t)begin};
    return TP_OK;
}

/* ---- characters to symbols ---- */

/* An unknown token that is held back: with fuse_unk the next unknown character joins it. The reference library lets
 * fallback bytes overtake it; so does this. */
struct unknown {
    bool pending;
    size_t begin;
};

static tp_status flush_unknown(tp_ctx *ctx, const tp_bpe *bpe, tp_bpe_scratch *s, struct unknown *u)
{
    if (!u->pending) return TP_OK;
    u->pending = false;
    return add_symbol(ctx, s, (uint32_t)bpe->options.unk_id, u->begin);
}

static tp_status add_unknown(tp_ctx *ctx, const tp_bpe *bpe, tp_bpe_scratch *s, struct unknown *u, size_t begin)
{
    if (bpe->options.unk_id < 0) {
        if (bpe->options.missing_unk.data == NULL) return TP_OK; /* dropped, as the reference library does */
        return tp_fail(ctx, TP_FORMAT,
                       "the text has a character without token, and unk_token \"%.100s\" is not in the vocabulary",
                       bpe->options.missing_unk.data);
    }
    if (u->pending && bpe->options.fuse_unk) return TP_OK;
    TP_TRY(flush_unknown(ctx, bpe, s, u));
    *u = (struct unknown){true, begin};
    return TP_OK;
}

static bool has_byte_tokens(const tp_bpe *bpe, tp_span text)
{
    for (size_t i = 0; i < text.len; i++)
        if (bpe->byte_tokens[(unsigned char)text.data[i]] < 0) return false;
    return true;
}

static tp_status add_known(tp_ctx *ctx, const tp_bpe *bpe, tp_bpe_scratch *s, struct unknown *u, int32_t id, size_t begin)
{
    if (u->pending) TP_TRY(flush_unknown(ctx, bpe, s, u));
    return add_symbol(ctx, s, (uint32_t)id, begin);
}

static tp_status symbols_of_bytes(tp_ctx *ctx, const tp_bpe *bpe, tp_bpe_scratch *s, const char *word, size_t n)
{
    struct unknown u = {0};
    for (size_t i = 0; i < n; i++) {
        int32_t id = bpe->byte_ids[(unsigned char)word[i]];
        if (id >= 0)
            TP_TRY(add_known(ctx, bpe, s, &u, id, i));
        else
            TP_TRY(add_unknown(ctx, bpe, s, &u, i));
    }
    return flush_unknown(ctx, bpe, s, &u);
}

/* The text under which a character is looked up: with the prefix unless it is first, with the suffix if it is last. */
static tp_status affixed(tp_ctx *ctx, const tp_bpe *bpe, tp_bpe_scratch *s, tp_span *text, bool first, bool last)
{
    bool prefix = !first && bpe->options.prefix.len > 0, suffix = last && bpe->options.suffix.len > 0;
    if (!prefix && !suffix) return TP_OK;
    tp_buf_clear(&s->text);
    if (prefix) tp_buf_append(&s->text, bpe->options.prefix.data, bpe->options.prefix.len);
    tp_buf_append(&s->text, text->data, text->len);
    if (suffix) tp_buf_append(&s->text, bpe->options.suffix.data, bpe->options.suffix.len);
    *text = (tp_span){tp_buf_cstr(&s->text), s->text.len};
    return tp_buf_status(ctx, &s->text, "token");
}

static tp_status add_char(tp_ctx *ctx, const tp_bpe *bpe, tp_bpe_scratch *s, struct unknown *u, tp_span text, size_t at)
{
    int64_t extra = NO_TOKEN;
    int32_t id = text.len == 1 && (unsigned char)text.data[0] < 0x80 ? bpe->ascii_ids[(unsigned char)text.data[0]]
                                                                     : tp_vocabulary_find(bpe->vocabulary, text);
    if (id >= 0) return add_known(ctx, bpe, s, u, id, at);
    if (bpe->options.late_fallback) {
        if (bpe->extra != NULL) tp_map_get(bpe->extra, text, &extra);
        return add_symbol(ctx, s, (uint32_t)extra, at);
    }
    if (!bpe->options.byte_fallback || !has_byte_tokens(bpe, text)) return add_unknown(ctx, bpe, s, u, at);
    for (size_t i = 0; i < text.len; i++)
        TP_TRY(add_symbol(ctx, s, (uint32_t)bpe->byte_tokens[(unsigned char)text.data[i]], at + i));
    return TP_OK;
}

static tp_status symbols_of_chars(tp_ctx *ctx, const tp_bpe *bpe, tp_bpe_scratch *s, const char *word, size_t n)
{
    struct unknown u = {0};
    for (size_t i = 0, length; i < n; i += length) {
        uint32_t c;
        length = tp_char_next(word + i, n - i, &c);
        tp_span text = {word + i, length};
        TP_TRY(affixed(ctx, bpe, s, &text, i == 0, i + length == n));
        TP_TRY(add_char(ctx, bpe, s, &u, text, i));
    }
    return flush_unknown(ctx, bpe, s, &u);
}

/* ---- merging ---- */

#define SHORT_WORD 32 /* symbols; below this a scan is faster than a heap */

static void merge_short(const tp_bpe *bpe, tp_bpe_scratch *scratch)
{
    struct tp_bpe_symbol *s = scratch->symbols;
    const struct merge *pairs[SHORT_WORD]; /* of each symbol with the next */
    size_t n = scratch->n_symbols;
    for (size_t i = 0; i + 1 < n; i++) pairs[i] = find_merge(bpe, s[i].id, s[i + 1].id);
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (pairs[i]->rank < pairs[best]->rank) best = i;
        if (pairs[best]->rank == NO_RANK) break;
        s[best].id = pairs[best]->result;
        n--;
        memmove(s + best + 1, s + best + 2, (n - best - 1) * sizeof *s);
        if (best + 1 < n) memmove(pairs + best, pairs + best + 1, (n - best - 1) * sizeof *pairs);
        if (best > 0) pairs[best - 1] = find_merge(bpe, s[best - 1].id, s[best].id);
        if (best + 1 < n) pairs[best] = find_merge(bpe, s[best].id, s[best + 1].id);
    }
    scratch->n_symbols = n;
}

static void sift_down(uint64_t *heap, size_t n, size_t i)
{
    uint64_t value = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= value) break;
        heap[i] = heap[child];
    }
    heap[i] = value;
}

static uint64_t heap_pop(tp_bpe_scratch *s)
{
    uint64_t top = s->heap[0];
    s->heap[0] = s->heap[--s->n_heap];
    if (s->n_heap > 0) sift_down(s->heap, s->n_heap, 0);
    return top;
}

static tp_status heap_add(tp_ctx *ctx, tp_bpe_scratch *s, uint64_t value)
{
    TP_TRY(tp_grow(ctx, &s->heap, &s->heap_capacity, s->n_heap + 1, sizeof *s->heap));
    s->heap[s->n_heap++] = value;
    return TP_OK;
}

/* Offers the pair that begins at symbol i; the heap is ordered by (rank, place), both in one number. */
static tp_status offer_pair(tp_ctx *ctx, const tp_bpe *bpe, tp_bpe_scratch *s, uint32_t i)
{
    const struct merge *m = find_merge(bpe, s->symbols[i].id, s->symbols[s->symbols[i].next].id);
    return m->rank == NO_RANK ? TP_OK : heap_add(ctx, s, (uint64_t)m->rank << 32 | i);
}

static void sift_up(tp_bpe_scratch *s)
{
    size_t i = s->n_heap - 1;
    uint64_t value = s->heap[i];
    for (; i > 0 && s->heap[(i - 1) / 2] > value; i = (i - 1) / 2) s->heap[i] = s->heap[(i - 1) / 2];
    s->heap[i] = value;
}

static tp_status offer_and_sift(tp_ctx *ctx, const tp_bpe *bpe, tp_bpe_scratch *s, uint32_t i)
{
    size_t before = s->n_heap;
    TP_TRY(offer_pair(ctx, bpe, s, i));
    if (s->n_heap > before) sift_up(s);
    return TP_OK;
}

static tp_status fill_heap(tp_ctx *ctx, const tp_bpe *bpe, tp_bpe_scratch *s)
{
    size_t n = s->n_symbols;
    for (size_t i = 0; i < n; i++) {
        s->symbols[i].previous = i > 0 ? (uint32_t)(i - 1) : LAST;
        s->symbols[i].next = i + 1 < n ? (uint32_t)(i + 1) : LAST;
    }
    s->n_heap = 0;
    for (size_t i = 0; i + 1 < n; i++) TP_TRY(offer_pair(ctx, bpe, s, (uint32_t)i));
    for (size_t i = s->n_heap / 2; i-- > 0;) sift_down(s->heap, s->n_heap, i);
    return TP_OK;
}

static void drop_merged(tp_bpe_scratch *s)
{
    size_t n = 0;
    for (size_t i = 0; i < s->n_symbols; i++)
        if (s->symbols[i].id != MERGED) s->symbols[n++] = s->symbols[i];
    s->n_symbols = n;
}

static tp_status merge_long(tp_ctx *ctx, const tp_bpe *bpe, tp_bpe_scratch *s)
{
    TP_TRY(fill_heap(ctx, bpe, s));
    while (s->n_heap > 0) {
        uint64_t top = heap_pop(s);
        struct tp_bpe_symbol *left = &s->symbols[(uint32_t)top];
        if (left->id == MERGED || left->next == LAST) continue;
        struct tp_bpe_symbol *right = &s->symbols[left->next];
        const struct merge *m = find_merge(bpe, left->id, right->id);
        if (m->rank != top >> 32) continue; /* one of the two has changed since */
        left->id = m->result;
        right->id = MERGED;
        left->next = right->next;
        if (left->next != LAST) {
            s->symbols[left->next].previous = (uint32_t)top;
            TP_TRY(offer_and_sift(ctx, bpe, s, (uint32_t)top));
        }
        if (left->previous != LAST) TP_TRY(offer_and_sift(ctx, bpe, s, left->previous));
    }
    drop_merged(s);
    return TP_OK;
}

/* ---- symbols to tokens ---- */

static tp_status push_token(tp_ctx *ctx, tp_tokens *out, int64_t id, size_t begin, size_t end)
{
    return tp_tokens_push(ctx, out, (tp_token){.id = (int32_t)id, .begin = begin, .end = end});
}

/* What is left of characters without token: bytes, or the unknown token. */
static tp_status push_fallback(tp_ctx *ctx, const tp_bpe *bpe, const char *word, size_t base, size_t begin, size_t end,
                               tp_tokens *out)
{
    if (!has_byte_tokens(bpe, (tp_span){word + begin, end - begin}))
        return bpe->options.unk_id >= 0 ? push_token(ctx, out, bpe->options.unk_id, base + begin, base + end) : TP_OK;
    for (size_t i = begin; i < end; i++)
        TP_TRY(push_token(ctx, out, bpe->byte_tokens[(unsigned char)word[i]], base + i, base + i + 1));
    return TP_OK;
}

static tp_status push_symbols(tp_ctx *ctx, const tp_bpe *bpe, const tp_bpe_scratch *s, const char *word, size_t base, size_t n,
                              tp_tokens *out)
{
    for (size_t i = 0; i < s->n_symbols; i++) {
        const struct tp_bpe_symbol *symbol = &s->symbols[i];
        size_t end = i + 1 < s->n_symbols ? symbol[1].begin : n;
        if (end < symbol->begin) end = symbol->begin; /* a held-back unknown token that bytes have overtaken */
        if (symbol->id < bpe->vocabulary->size)
            TP_TRY(push_token(ctx, out, symbol->id, base + symbol->begin, base + end));
        else
            TP_TRY(push_fallback(ctx, bpe, word, base, symbol->begin, end, out));
    }
    return TP_OK;
}

/* A whole word that is a token (ignore_merges). */
static tp_status whole_word(tp_ctx *ctx, const tp_bpe *bpe, tp_bpe_scratch *s, const char *word, size_t n, int32_t *id)
{
    *id = -1;
    if (n > bpe->vocabulary->longest) return TP_OK;
    tp_span text = {word, n};
    if (bpe->options.bytes) {
        tp_buf_clear(&s->text);
        for (size_t i = 0; i < n; i++) tp_buf_codepoint(&s->text, tp_byte_to_char((unsigned char)word[i]));
        TP_TRY(tp_buf_status(ctx, &s->text, "token"));
        text = (tp_span){tp_buf_cstr(&s->text), s->text.len};
    }
    *id = tp_vocabulary_find(bpe->vocabulary, text);
    return TP_OK;
}

static tp_status encode_new(tp_ctx *ctx, const tp_bpe *bpe, tp_bpe_scratch *s, const char *word, size_t base, size_t n,
                            tp_tokens *out)
{
    int32_t id = -1;
    if (bpe->options.ignore_merges) TP_TRY(whole_word(ctx, bpe, s, word, n, &id));
    if (id >= 0) return push_token(ctx, out, id, base, base + n);
    if (n >= UINT32_MAX)
        return tp_fail(ctx, TP_UNSUPPORTED, "a piece of %zu bytes without a place to cut, at most 4 GiB are supported", n);
    s->n_symbols = 0;
    if (bpe->options.bytes)
        TP_TRY(symbols_of_bytes(ctx, bpe, s, word, n));
    else
        TP_TRY(symbols_of_chars(ctx, bpe, s, word, n));
    if (s->n_symbols <= SHORT_WORD)
        merge_short(bpe, s);
    else
        TP_TRY(merge_long(ctx, bpe, s));
    return push_symbols(ctx, bpe, s, word, base, n, out);
}

/* ---- the word cache ---- */

static size_t cache_slot(const char *word, size_t n)
{
    uint64_t parts[3] = {0};
    memcpy(parts, word, n);
    uint64_t x = (parts[0] ^ n) * UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 29 ^ parts[1]) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 31 ^ parts[2]) * UINT64_C(0x94d049bb133111eb);
    return (size_t)(x >> 40) & (CACHE_SLOTS - 1);
}

static tp_status push_cached(tp_ctx *ctx, const struct tp_bpe_word *cached, size_t base, size_t n, tp_tokens *out)
{
    for (size_t i = 0; i < cached->n_ids; i++) {
        size_t end = i + 1 < cached->n_ids ? cached->begins[i + 1] : n;
        TP_TRY(push_token(ctx, out, cached->ids[i], base + cached->begins[i], base + end));
    }
    return TP_OK;
}

/* Remembers tokens [first, out->count) as those of the word. */
static void remember(struct tp_bpe_word *slot, const char *word, size_t base, size_t n, const tp_tokens *out, size_t first)
{
    size_t count = out->count - first;
    if (count > CACHE_IDS || count == 0) return;
    slot->n_key = (uint8_t)n;
    slot->n_ids = (uint8_t)count;
    memcpy(slot->key, word, n);
    for (size_t i = 0; i < count; i++) {
        const tp_token *token = &out->items[first + i];
        size_t next = i + 1 < count ? token[1].begin : base + n;
        if (token->end != next) slot->n_key = 0; /* its places cannot be told from their beginnings */
        slot->ids[i] = token->id;
        slot->begins[i] = (uint8_t)(token->begin - base);
    }
}

static tp_status encode_word(tp_ctx *ctx, const tp_bpe *bpe, tp_bpe_scratch *s, const char *text, size_t begin, size_t end,
                             tp_tokens *out)
{
    const char *word = text + begin;
    size_t n = end - begin, first = out->count;
    if (n > CACHE_KEY) return encode_new(ctx, bpe, s, word, begin, n, out);
    struct tp_bpe_word *slot = &s->cache[cache_slot(word, n)];
    if (slot->n_key == n && memcmp(slot->key, word, n) == 0) return push_cached(ctx, slot, begin, n, out);
    TP_TRY(encode_new(ctx, bpe, s, word, begin, n, out));
    remember(slot, word, begin, n, out, first);
    return TP_OK;
}

/* End of the word that begins at `at`: in front of the next U+2581 that follows another character. */
static size_t word_end(const char *text, size_t at, size_t end)
{
    while (end - at >= 3 && memcmp(text + at, MARK, 3) == 0) at += 3;
    const char *mark = memmem(text + at, end - at, MARK, 3);
    return mark != NULL && mark > text + at ? (size_t)(mark - text) : end;
}

tp_status tp_bpe_encode(tp_ctx *ctx, const tp_bpe *bpe, tp_bpe_scratch *s, const char *text, size_t begin, size_t end,
                        tp_tokens *out)
{
    if (s->cache == NULL) s->cache = tp_alloc(ctx, CACHE_SLOTS, sizeof *s->cache);
    if (s->cache == NULL) return TP_NOMEM;
    if (!bpe->options.cut_words) return begin < end ? encode_word(ctx, bpe, s, text, begin, end, out) : TP_OK;
    while (begin < end) {
        size_t stop = word_end(text, begin, end);
        TP_TRY(encode_word(ctx, bpe, s, text, begin, stop, out));
        begin = stop;
    }
    return TP_OK;
}
