/* Grade-school problems (Cobbe et al. 2021, arXiv:2110.14168): greedy replies, compared by the number behind "####". */
#include "cli/eval_gsm8k.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/mem.h"
#include "cli/gsm8k_number.h"
#include "cli/open.h"
#include "inference/generate.h"

#define NEW_TOKENS   256
#define REPORT_EVERY 10 /* problems between two lines of progress where stderr is no terminal */

struct problem {
    int32_t *prompt;
    size_t n_prompt;
    double answer;
};

struct problems {
    struct problem *items;
    size_t n, capacity, longest_prompt;
};

/* ---- the problems of a data set ---- */

/* The last run of labels: tokens begin..end. */
static bool last_stretch(const tp_preview *row, size_t *begin, size_t *end)
{
    *end = row->tokens.count;
    while (*end > 0 && row->labels[*end - 1] < 0) --*end;
    *begin = *end;
    while (*begin > 0 && row->labels[*begin - 1] >= 0) --*begin;
    return *begin<*end && * begin> 0;
}

static tp_status reference_number(tp_ctx *ctx, const tp_tokenizer *tokenizer, const tp_preview *row, size_t begin, size_t end,
                                  double *number)
{
    tp_buf text;
    tp_buf_init(&text, 0);
    int32_t *ids = tp_alloc(ctx, end - begin, sizeof *ids);
    tp_status status = ids != NULL ? TP_OK : TP_NOMEM;
    for (size_t i = begin; status == TP_OK && i < end; i++) ids[i - begin] = row->tokens.items[i].id;
    if (status == TP_OK) status = tp_tokenizer_decode(ctx, tokenizer, ids, end - begin, true, &text);
    if (status == TP_OK) status = tp_buf_status(ctx, &text, "reference answer");
    if (status == TP_OK && !tp_gsm8k_number(tp_buf_cstr(&text), text.len, number))
        status = tp_fail(ctx, TP_FORMAT, "%s:%zu: gsm8k: the reference answer has no number behind ####", row->file, row->line);
    tp_free(ids);
    tp_buf_free(&text);
    return status;
}

static tp_status add_problem(tp_ctx *ctx, const tp_tokenizer *tokenizer, const tp_preview *row, struct problems *all)
{
    size_t begin, end;
    double answer;
    if (!last_stretch(row, &begin, &end))
        return tp_fail(ctx, TP_FORMAT, "%s:%zu: gsm8k: expected a question and an answer to be learned", row->file, row->line);
    TP_TRY(reference_number(ctx, tokenizer, row, begin, end, &answer));
    TP_TRY(tp_grow(ctx, &all->items, &all->capacity, all->n + 1, sizeof *all->items));
    struct problem *p = &all->items[all->n];
    *p = (struct problem){.prompt = tp_alloc(ctx, begin, sizeof *p->prompt), .n_prompt = begin, .answer = answer};
    if (p->prompt == NULL) return TP_NOMEM;
    all->n++;
    for (size_t i = 0; i < begin; i++) p->prompt[i] = row->tokens.items[i].id;
    if (begin > all->longest_prompt) all->longest_prompt = begin;
    return TP_OK;
}

static tp_status collect(tp_ctx *ctx, const tp_tokenizer *tokenizer, const tp_dataset *data, struct problems *all)
{
    tp_dataset_counts counts;
    tp_dataset_count(data, &counts);
    for (int64_t i = 0; i < counts.rows_read - counts.rows_bad; i++) {
        tp_preview row;
        TP_TRY(tp_dataset_preview(ctx, data, i, &row));
        tp_status status = row.dropped ? TP_OK : add_problem(ctx, tokenizer, &row, all);
        tp_preview_free(&row);
        TP_TRY(status);
    }
    return all->n > 0 ? TP_OK : tp_fail(ctx, TP_FORMAT, "gsm8k: the data holds no problem");
}

/* ---- answering ---- */

static void report(const tp_gsm8k_score *score, size_t n)
{
    bool terminal = isatty(STDERR_FILENO) == 1, last = (size_t)score->problems == n;
    if (!terminal && !last && score->problems % REPORT_EVERY != 0) return;
    fprintf(stderr, "%sgsm8k: %lld of %zu problems, %lld right%s", terminal ? "\r\x1b[K" : "", (long long)score->problems, n,
            (long long)score->correct, terminal && !last ? "" : "\n");
    fflush(stderr);
}

/* Nobody reads along, but every piece of a reply is an occasion to stop. */
static bool goes_on(void *state, const char *text, size_t n)
{
    const volatile sig_atomic_t *const *stop = state;
    (void)text;
    (void)n;
    return **stop == 0;
}

struct answers {
    const struct problems *all;
    const volatile sig_atomic_t *stop;
    tp_gsm8k_score *score;
};

static bool score_reply(void *state, size_t index, tp_generated *reply)
{
    const struct answers *a = state;
    double number;
    bool answered = tp_gsm8k_number(tp_buf_cstr(&reply->text), reply->text.len, &number);
    tp_finish finish = reply->finish;
    tp_generated_free(reply);
    if (finish == TP_FINISH_CANCELLED) return false;
    a->score->problems++;
    a->score->answered += answered;
    a->score->correct += answered && number == a->all->items[index].answer;
    if (*a->stop == 0) report(a->score, a->all->n);
    return *a->stop == 0;
}

static tp_status answer_all(tp_ctx *ctx, tp_model *model, const tp_tokenizer *tokenizer, const struct problems *all,
                            const volatile sig_atomic_t *stop, tp_gsm8k_score *score)
{
    tp_generator *generator;
    int64_t ends[TP_MAX_ENDS], context = (int64_t)all->longest_prompt + NEW_TOKENS;
    struct answers answers = {all, stop, score};
    tp_generate_options options = {
        .sampling = TP_SAMPLING_GREEDY, .max_tokens = NEW_TOKENS, .eos_ids = ends, .emit = goes_on, .emit_state = &stop};
    options.n_eos = tp_end_tokens(model, tokenizer, ends);
    if (context > model->config.max_positions) context = model->config.max_positions;
    tp_prompt_ids *prompts = tp_alloc(ctx, all->n, sizeof *prompts);
    if (prompts == NULL) return TP_NOMEM;
    for (size_t i = 0; i < all->n; i++) prompts[i] = (tp_prompt_ids){all->items[i].prompt, all->items[i].n_prompt};
    tp_status status = tp_generator_open_many(ctx, model, context, all->n, &generator);
    if (status == TP_OK) {
        status = tp_generate_all(ctx, generator, tokenizer, prompts, all->n, &options, score_reply, &answers);
        tp_generator_close(generator);
    }
    tp_free(prompts);
    if (status == TP_OK && *stop != 0)
        status = tp_fail(ctx, TP_PREEMPTED, "stopped after %lld of %zu problems", (long long)score->problems, all->n);
    return status;
}

tp_status tp_gsm8k_run(tp_ctx *ctx, tp_model *model, const tp_tokenizer *tokenizer, const tp_dataset *data,
                       const volatile sig_atomic_t *stop, tp_gsm8k_score *score)
{
    struct problems all = {0};
    *score = (tp_gsm8k_score){0};
    tp_status status = collect(ctx, tokenizer, data, &all);
    if (status == TP_OK) status = answer_all(ctx, model, tokenizer, &all, stop, score);
    for (size_t i = 0; i < all.n; i++) tp_free(all.items[i].prompt);
    tp_free(all.items);
    return status;
}
