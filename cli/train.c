/* tapeft train RECIPE [key=value ...]: signals in, progress out; the work is trainers/. */
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "cli/open.h"
#include "trainers/metrics.h"
#include "trainers/train.h"

static volatile sig_atomic_t stop_requested, save_requested;

/* The first SIGINT or SIGTERM asks the run to save and stop; a second SIGINT ends the process at once, which loses nothing that
 * was saved. Handlers set flags and nothing else. */
static void on_signal(int number)
{
    if (number == SIGUSR1) {
        save_requested = 1;
        return;
    }
    if (stop_requested != 0 && number == SIGINT) {
        signal(SIGINT, SIG_DFL);
        raise(SIGINT);
    }
    stop_requested = 1;
}

static void install_handlers(void)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGHUP, &action, NULL);
    sigaction(SIGUSR1, &action, NULL);
}

static tp_status read_accept(tp_ctx *ctx, const char *text, unsigned *accept)
{
    static const struct {
        const char *name;
        unsigned bit;
    } names[] = {{"recipe", TP_ACCEPT_RECIPE},
                 {"data", TP_ACCEPT_DATA},
                 {"base", TP_ACCEPT_BASE},
                 {"version", TP_ACCEPT_VERSION},
                 {"devices", TP_ACCEPT_DEVICES}};
    while (text != NULL && *text != '\0') {
        size_t n = strcspn(text, ", "), i = 0;
        while (i < sizeof names / sizeof *names && (strlen(names[i].name) != n || memcmp(names[i].name, text, n) != 0)) i++;
        if (i == sizeof names / sizeof *names)
            return tp_fail(ctx, TP_INVALID, "--accept: expected recipe, data, base, version, devices, got \"%.*s\"", (int)n,
                           text);
        *accept |= names[i].bit;
        text += n + strspn(text + n, ", ");
    }
    return TP_OK;
}

static void print_plan(const tp_run *run, FILE *to)
{
    tp_buf text;
    tp_buf_init(&text, 0);
    tp_plan_write_text(tp_run_plan(run), &text);
    fputs(tp_buf_cstr(&text), to);
    tp_buf_free(&text);
}

static tp_status run_training(tp_ctx *ctx, const tp_args *args, const tp_cli_recipe *recipe, tp_train_options *options)
{
    tp_run *run;
    TP_TRY(tp_run_open(ctx, recipe->recipe, &recipe->config, options, &run));
    print_plan(run, options->dry_run ? stdout : stderr);
    (void)args;
    return tp_run_close(run, tp_run_train(run));
}

static tp_status run(tp_ctx *ctx, const tp_args *args)
{
    bool resume = tp_args_has(args, "resume");
    const char *from = tp_args_value(args, "resume");
    tp_train_options options = {.resume = resume ? (from != NULL ? from : "auto") : NULL,
                                .fresh_optimizer = tp_args_has(args, "fresh-optimizer"),
                                .force = tp_args_has(args, "force"),
                                .dry_run = tp_args_has(args, "dry-run"),
                                .dump_gradients = tp_args_value(args, "dump-gradients"),
                                .stop = &stop_requested,
                                .save = &save_requested,
                                .progress = !tp_args_has(args, "quiet"),
                                .process_start = tp_now()};
    tp_cli_recipe recipe;
    for (size_t i = 0; tp_args_value_at(args, "accept", i) != NULL; i++)
        TP_TRY(read_accept(ctx, tp_args_value_at(args, "accept", i), &options.accept));
    install_handlers();
    TP_TRY(tp_cli_recipe_open(ctx, args, NULL, !options.dry_run, resume, &recipe));
    tp_status status = run_training(ctx, args, &recipe, &options);
    tp_cli_recipe_close(&recipe);
    return status;
}

static const tp_flag flags[] = {
    {"dry-run", NULL, false, false, "check shapes and print the plan; write nothing"},
    {"resume", "CKPT", true, false, "go on from the newest checkpoint, or from the one named"},
    {"fresh-optimizer", NULL, false, false, "resume without the optimizer's state"},
    {"accept", "WHAT", false, true, "what may differ on resume: recipe, data, base, version, devices"},
    {"dump-gradients", "FILE", false, false, "write the gradients of step 1 before clipping"},
    {"quiet", NULL, false, false, "no progress on stderr"},
    TP_FLAG_FORCE,
    TP_FLAG_END,
};

const tp_command tp_command_train = {
    "train", "RECIPE [key=value ...] [flags]", "train an adapter from a recipe", flags, 1, 1000, run};
