/* How close decoding comes to reading once per token what it must, and what one LoRA costs: SmolLM2-135M, batch 1, behind a
 * prompt of 512 tokens, greedy.
 *
 *     bench_decode [--threads N] [--tokens N] [bf16 | f32 | q8_0 | q4_0 | q4_1]...
 *
 * Each round decodes a few tokens with the base alone and a few with an adapter of rank 16 on all linears, in turns, between
 * two measurements of the read speed. Bytes are those of the weights and of the prompt's keys and values, without the adapter.
 * Medians over rounds; the second ratio counts CPU time, as in bench_train. Packed weights are random bytes in the place of the
 * model's own. Runs for about half a minute. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "inference/generate.h"
#include "peft/lora.h"
#include "tests/bench/ceilings.h"
#include "tests/bench/command.h"

#define ROUNDS 5
#define PROMPT 512
#define BUFFER ((size_t)256 << 20)
#define MODELS 5

static const struct {
    const char *name, *folder;
    tp_format_id format;
} models[MODELS] = {
    {"bf16", "bf16", TP_FORMAT_BF16}, {"f32", "f32", TP_FORMAT_F32},   {"q8_0", "f32", TP_FORMAT_Q8_0},
    {"q4_0", "f32", TP_FORMAT_Q4_0},  {"q4_1", "f32", TP_FORMAT_Q4_1},
};

/* Seconds per token, by the clock and of CPU time. */
struct pace {
    double seconds, cpu_seconds;
};

static struct pace decode(tp_ctx *ctx, tp_generator *generator, tp_sampler *sampler, int tokens, int32_t *id)
{
    const tp_sampling greedy = TP_SAMPLING_GREEDY;
    double began = 0, cpu_began = 0;
    for (int i = -1; i < tokens; i++) { /* the first one after a change of adapters is not counted */
        float *logits;
        if (i == 0) began = bench_now(), cpu_began = bench_cpu_now();
        bench_need(ctx, tp_generator_run(ctx, generator, id, 1, &logits));
        bench_need(ctx, tp_sampler_next(ctx, sampler, &greedy, logits, NULL, 0, 0, id));
    }
    return (struct pace){(bench_now() - began) / tokens, (bench_cpu_now() - cpu_began) / tokens};
}

static void switch_adapter(tp_lora *lora, bool on)
{
    for (size_t i = 0; i < lora->n_modules; i++) lora->modules[i].module->slot.n_terms = on;
}

/* Bytes of the matrices that one token runs through: all linears, and the head, which here is the embedding. */
static double weight_bytes(const tp_model *model)
{
    const tp_matrix *head = &model->head.weight;
    double bytes = (double)head->rows * (double)tp_format_row_bytes(head->format, head->cols);
    for (size_t i = 0; i < model->n_linears; i++) {
        const tp_matrix *w = &model->linears[i]->weight;
        if (!model->linears[i]->is_head) bytes += (double)w->rows * (double)tp_format_row_bytes(w->format, w->cols);
    }
    return bytes;
}

/* Keys and values of the prompt. */
static double cache_bytes(const tp_model *model, tp_dtype precision)
{
    const tp_model_config *c = &model->config;
    return 2.0 * (double)(c->n_layers * c->n_kv_heads * c->head_dim) * PROMPT * (double)tp_dtype_bytes(precision);
}

static tp_matrix packed(tp_format_id format, int64_t rows, int64_t cols)
{
    const tp_format *f = &tp_formats[format];
    size_t row = (size_t)tp_format_row_bytes(format, cols), bytes = (size_t)rows * row;
    unsigned char *data = malloc(bytes);
    if (data == NULL) {
        fprintf(stderr, "out of memory: %zu bytes\n", bytes);
        exit(1);
    }
    for (size_t i = 0; i < bytes; i++) data[i] = (unsigned char)(i * 2654435761u >> 13);
    for (size_t i = 0; i < bytes; i += (size_t)f->block_bytes) { /* scales, and q4_1's offsets, of about 2^-9 */
        data[i] = 0, data[i + 1] = 0x18;
        if (format == TP_FORMAT_Q4_1) data[i + 2] = 0, data[i + 3] = 0x98;
    }
    return (tp_matrix){.format = format, .data = data, .rows = rows, .cols = cols};
}

/* Puts packed matrices into the model; `kept` [n_linears + 1] gets what was there. */
static void pack_weights(tp_model *model, tp_format_id format, tp_matrix *kept)
{
    for (size_t i = 0; i < model->n_linears; i++) {
        tp_matrix *w = &model->linears[i]->weight;
        kept[i] = *w;
        *w = packed(format, w->rows, w->cols);
    }
    kept[model->n_linears] = model->embedding;
    model->embedding = packed(format, model->embedding.rows, model->embedding.cols);
    model->head.weight = model->embedding; /* tied */
}

static void unpack_weights(tp_model *model, const tp_matrix *kept)
{
    for (size_t i = 0; i < model->n_linears; i++) {
        free((void *)(uintptr_t)model->linears[i]->weight.data);
        model->linears[i]->weight = kept[i];
    }
    free((void *)(uintptr_t)model->embedding.data);
    model->embedding = model->head.weight = kept[model->n_linears];
}

static void measure(tp_ctx *ctx, int which, int tokens, const void *memory)
{
    static tp_matrix kept[1024];
    bench_model from = bench_model_of(ctx, models[which].folder);
    const char *label = models[which].name;
    bool packs = !tp_formats[models[which].format].dense;
    tp_model_options options = {.precision = from.precision};
    tp_lora_spec spec = {.rank = 16, .alpha = 32, .targets = {.all_linear = true}};
    tp_model *model;
    tp_lora *lora;
    tp_generator *generator;
    tp_sampler *sampler;
    int32_t prompt[PROMPT], id = 1;
    float *logits;
    bench_need(ctx, tp_model_open(ctx, from.path, &options, &model));
    if (packs) pack_weights(model, models[which].format, kept);
    bench_need(ctx, tp_lora_attach(ctx, model, &spec, &lora));
    bench_need(ctx, tp_lora_initialise(ctx, lora));
    bench_need(ctx, tp_generator_open(ctx, model, PROMPT + 2 * (ROUNDS + 1) * (tokens + 1), &generator));
    bench_need(ctx, tp_sampler_new(ctx, model->config.vocab_size, &sampler));
    for (int i = 0; i < PROMPT; i++) prompt[i] = 1000 + 7 * i;
    bench_need(ctx, tp_generator_run(ctx, generator, prompt, PROMPT, &logits));

    double rate[ROUNDS], share[ROUNDS], cpu_share[ROUNDS], cost[ROUNDS], cpu_cost[ROUNDS];
    double bytes = weight_bytes(model) + cache_bytes(model, from.precision);
    for (int round = -1; round < ROUNDS; round++) { /* the first warms up */
        bench_read before = bench_read_speed(ctx, memory, BUFFER);
        switch_adapter(lora, round % 2 == 0);
        struct pace first = decode(ctx, generator, sampler, tokens, &id);
        switch_adapter(lora, round % 2 != 0);
        struct pace second = decode(ctx, generator, sampler, tokens, &id);
        bench_read after = bench_read_speed(ctx, memory, BUFFER);
        struct pace with = round % 2 == 0 ? first : second, without = round % 2 == 0 ? second : first;
        if (round < 0) continue;
        rate[round] = 1 / without.seconds;
        share[round] = bytes / without.seconds / (0.5 * (before.rate + after.rate));
        cpu_share[round] = bytes / without.cpu_seconds / (0.5 * (before.rate_per_cpu + after.rate_per_cpu));
        cost[round] = 100 * (with.seconds / without.seconds - 1);
        cpu_cost[round] = 100 * (with.cpu_seconds / without.cpu_seconds - 1);
    }
    bench_spread r = bench_spread_of(rate, ROUNDS), s = bench_spread_of(share, ROUNDS), c = bench_spread_of(cpu_share, ROUNDS);
    bench_spread l = bench_spread_of(cost, ROUNDS), p = bench_spread_of(cpu_cost, ROUNDS);
    printf("decode %-5s %6.1f tokens/s  limit %6.1f  ratio %.3f (%.3f .. %.3f), by CPU time %.3f (%.3f .. %.3f)\n", label,
           r.median, r.median / s.median, s.median, s.low, s.high, c.median, c.low, c.high);
    printf("LoRA   %-5s %+6.1f %% time per token (%+.1f .. %+.1f), CPU time %+.1f %% (%+.1f .. %+.1f)\n", label, l.median,
           l.low, l.high, p.median, p.low, p.high);
    fflush(stdout);
    tp_sampler_free(sampler);
    tp_generator_close(generator);
    tp_lora_free(lora);
    if (packs) unpack_weights(model, kept);
    tp_model_free(model);
}

int main(int argc, char **argv)
{
    static tp_ctx ctx;
    int threads = 0, tokens = 8;
    bool wanted[MODELS] = {false}, any = false;
    for (int i = 1; i < argc; i++) {
        for (int m = 0; m < MODELS; m++)
            if (strcmp(argv[i], models[m].name) == 0) any = wanted[m] = true;
        if (i + 1 == argc) continue;
        if (strcmp(argv[i], "--threads") == 0) threads = atoi(argv[i + 1]);
        if (strcmp(argv[i], "--tokens") == 0) tokens = atoi(argv[i + 1]);
    }
    if (tokens < 1 || tokens > 256) return fprintf(stderr, "--tokens: expected a number from 1 to 256\n"), 2;
    bench_open(&ctx, threads);
    bench_print_machine(&ctx);
    void *memory = ctx.device->backend->alloc(&ctx, ctx.device, BUFFER);
    if (memory == NULL) bench_need(&ctx, TP_NOMEM);
    memset(memory, 1, BUFFER); /* pages of its own: untouched ones all are the same zero page */
    for (int m = 0; m < MODELS; m++)
        if (!any || wanted[m]) measure(&ctx, m, tokens, memory);
    printf("load %.1f at the end\n", bench_load());
    ctx.device->backend->free(ctx.device, memory, BUFFER);
    ctx.device->backend->close(ctx.device);
    return 0;
}
