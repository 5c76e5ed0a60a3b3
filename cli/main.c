/* tapeft: the command line. Finds the command, checks its flags, runs it, prints the first error, maps it to an exit code. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/file.h"
#include "base/log.h"
#include "backend/backend.h"
#include "base/version.h"
#include "cli/command.h"
#include "cli/help.h"
#include "cli/limits.h"
#include "recipes/keys.h"

static const tp_command *const commands[] = {
    &tp_command_train,   &tp_command_generate, &tp_command_eval,    &tp_command_logits, &tp_command_tokenize, &tp_command_init,
    &tp_command_inspect, &tp_command_plan,     &tp_command_preview, &tp_command_doctor, &tp_command_tune,
};
#define N_COMMANDS (sizeof commands / sizeof *commands)
/* What other versions will have: not a typo, so no other name is suggested. */
static const char *const to_come[] = {"distill",  "serve",   "merge",         "export", "combine",
                                      "quantize", "convert", "import-recipe", NULL};
#define MAX_FLAGS 32 /* of one command, as far as advice goes */

/* Notes and warnings go to stderr, one line each; results alone go to stdout. */
static void print_log(tp_log_level level, const char *text, void *user)
{
    (void)user;
    fprintf(stderr, "%s%s\n", level >= TP_LOG_WARN ? "warning: " : "", text);
}

static void print_overview(FILE *to)
{
    fprintf(to, "tapeft %s: parameter-efficient fine-tuning of language models\n\nusage: tapeft COMMAND ...\n\n", TP_VERSION);
    for (size_t i = 0; i < N_COMMANDS; i++) fprintf(to, "  %-10s %s\n", commands[i]->name, commands[i]->summary);
    fprintf(to, "  %-10s %s\n\n", "help",
            "this text, or `tapeft help COMMAND`; `help KEY`: a key of recipes; `help recipe`: all of them");
    fprintf(to, "--version and --limits print what they say. Exit codes: 0 done, 2 usage or recipe, 3 bad input file, 4 "
                "memory, disk or device,\n"
                "5 numeric guard, 6 checkpoint unusable, 70 a bug of tapeft, 75 stopped and resumable.\n");
}

static bool takes_recipe(const tp_command *command)
{
    return strncmp(command->usage, "RECIPE", 6) == 0;
}

static void print_help(const tp_command *command, FILE *to)
{
    fprintf(to, "usage: tapeft %s %s\n\n%s\n", command->name, command->usage, command->summary);
    for (const tp_flag *f = command->flags; f != NULL && f->name != NULL; f++) {
        char left[64];
        snprintf(left, sizeof left, "--%s%s%s%s", f->name,
                 f->value == NULL    ? ""
                 : f->optional_value ? "[="
                                     : " ",
                 f->value != NULL ? f->value : "", f->optional_value ? "]" : "");
        fprintf(to, "  %-28s %s\n", left, f->help);
    }
    if (takes_recipe(command))
        fprintf(to, "\n`tapeft help recipe` lists the keys of a recipe, `tapeft help KEY` explains one.\n");
}

static const tp_command *find_command(const char *name)
{
    for (size_t i = 0; i < N_COMMANDS; i++)
        if (strcmp(commands[i]->name, name) == 0) return commands[i];
    return NULL;
}

/* INVALID: what was given, the nearest of what there is, where the list is. */
static tp_status unknown(tp_ctx *ctx, const char *what, const char *dashes, const char *name, const char *const *names,
                         const char *list)
{
    const char *near = tp_nearest_name(name, names);
    if (near == NULL) return tp_fail(ctx, TP_INVALID, "unknown %s \"%s%s\"; `%s` lists them", what, dashes, name, list);
    return tp_fail(ctx, TP_INVALID, "unknown %s \"%s%s\", did you mean \"%s%s\"? `%s` lists them", what, dashes, name, dashes,
                   near, list);
}

static tp_status unknown_command(tp_ctx *ctx, const char *name)
{
    const char *names[N_COMMANDS + 2];
    for (const char *const *later = to_come; *later != NULL; later++)
        if (strcmp(*later, name) == 0)
            return tp_fail(ctx, TP_INVALID,
                           "the command \"%s\" is not available in this version; `tapeft help` lists those that are", name);
    for (size_t i = 0; i < N_COMMANDS; i++) names[i] = commands[i]->name;
    names[N_COMMANDS] = "help";
    names[N_COMMANDS + 1] = NULL;
    return unknown(ctx, "command", "", name, names, "tapeft help");
}

static const tp_flag *find_flag(const tp_command *command, const char *name, size_t n)
{
    for (const tp_flag *f = command->flags; f != NULL && f->name != NULL; f++)
        if (strlen(f->name) == n && memcmp(f->name, name, n) == 0) return f;
    return NULL;
}

/* "--lora_r" and "--load-in-4bit" are keys. */
static tp_status check_not_key(tp_ctx *ctx, const tp_command *command, const char *name)
{
    char key[64];
    snprintf(key, sizeof key, "%s", name);
    for (char *c = key; *c != '\0'; c++)
        if (*c == '-') *c = '_';
    if (tp_schema_field(&tp_recipe_schema, key) == NULL) return TP_OK;
    if (takes_recipe(command))
        return tp_fail(ctx, TP_INVALID, "--%s: %s is a key of the recipe; write %s=VALUE, without dashes", name, key, key);
    return tp_fail(ctx, TP_INVALID, "--%s: not available in this version; `tapeft help %s` lists the flags that are", name,
                   command->name);
}

static tp_status unknown_flag(tp_ctx *ctx, const tp_command *command, const char *text, size_t n)
{
    const char *names[MAX_FLAGS + 1];
    char name[64], list[64];
    size_t count = 0;
    for (const tp_flag *f = command->flags; f != NULL && f->name != NULL && count < MAX_FLAGS; f++) names[count++] = f->name;
    names[count] = NULL;
    snprintf(name, sizeof name, "%.*s", (int)(n < sizeof name ? n : sizeof name - 1), text);
    TP_TRY(check_not_key(ctx, command, name));
    snprintf(list, sizeof list, "tapeft help %s", command->name);
    return unknown(ctx, "flag", "--", name, names, list);
}

/* argv[*i] is "--name" or "--name=value"; a value may also be the next word. */
static tp_status parse_flag(tp_ctx *ctx, tp_args *args, int argc, char **argv, int *i)
{
    const char *text = argv[*i] + 2, *equals = strchr(text, '=');
    size_t n = equals != NULL ? (size_t)(equals - text) : strlen(text);
    const tp_flag *flag = find_flag(args->command, text, n);
    if (flag == NULL) return unknown_flag(ctx, args->command, text, n);
    if (!flag->repeatable && tp_args_has(args, flag->name)) return tp_fail(ctx, TP_INVALID, "--%s is given twice", flag->name);
    if (args->n_given == TP_MAX_FLAG_VALUES) return tp_fail(ctx, TP_INVALID, "more than %d flags", TP_MAX_FLAG_VALUES);
    const char *value = equals != NULL ? equals + 1 : NULL;
    if (flag->value == NULL && value != NULL) return tp_fail(ctx, TP_INVALID, "--%s takes no value", flag->name);
    if (flag->value != NULL && value == NULL && !flag->optional_value) {
        if (*i + 1 >= argc) return tp_fail(ctx, TP_INVALID, "--%s needs a value: %s", flag->name, flag->value);
        value = argv[++*i];
    }
    args->given[args->n_given].flag = flag;
    args->given[args->n_given++].value = value;
    return TP_OK;
}

static tp_status parse_args(tp_ctx *ctx, tp_args *args, int argc, char **argv)
{
    bool flags_over = false;
    for (int i = 2; i < argc; i++) {
        if (!flags_over && strcmp(argv[i], "--") == 0)
            flags_over = true;
        else if (!flags_over && tp_starts_with(argv[i], "--"))
            TP_TRY(parse_flag(ctx, args, argc, argv, &i));
        else
            args->positional[args->n_positional++] = argv[i];
    }
    const tp_command *c = args->command;
    if (args->n_positional < c->min_positional)
        return tp_fail(ctx, TP_INVALID, "%s: %.*s is missing; usage: tapeft %s %s", c->name, (int)strcspn(c->usage, " "),
                       c->usage, c->name, c->usage);
    if (args->n_positional > c->max_positional)
        return tp_fail(ctx, TP_INVALID, "%s: \"%s\" is one argument too many; usage: tapeft %s %s", c->name,
                       args->positional[c->max_positional], c->name, c->usage);
    return TP_OK;
}

/* Whether the flag stands anywhere: the few that need nothing else to be right. */
static bool asks_for(const char *flag, int argc, char **argv)
{
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++)
        if (strcmp(argv[i], flag) == 0) return true;
    return false;
}

/* A write past a file-size limit or to a closed pipe is an error code, not a signal. Descriptors 0-2 exist, so that no file of
 * ours becomes stdout by accident. */
static void prepare_process(void)
{
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) < 0 && errno == EBADF) (void)!open("/dev/null", fd == 0 ? O_RDONLY : O_WRONLY);
}

static tp_status dispatch(tp_ctx *ctx, int argc, char **argv)
{
    if (argc < 2) {
        print_overview(stderr);
        return tp_fail(ctx, TP_INVALID, "no command given");
    }
    if (strcmp(argv[1], "version") == 0 || asks_for("--version", argc, argv))
        return printf("tapeft %s\n", TP_VERSION) < 0 ? TP_IO_WRITE : TP_OK;
    if (asks_for("--limits", argc, argv)) return tp_cli_print_limits(ctx);
    bool help = strcmp(argv[1], "help") == 0 || strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0;
    if (help && argc < 3) {
        print_overview(stdout);
        return TP_OK;
    }
    const tp_command *command = find_command(argv[help ? 2 : 1]);
    if (command == NULL && help) {
        bool known;
        TP_TRY(tp_cli_print_key(ctx, argv[2], &known));
        if (known) return TP_OK;
    }
    if (command == NULL) return unknown_command(ctx, argv[help ? 2 : 1]);
    if (help || asks_for("--help", argc, argv) || asks_for("-h", argc, argv)) {
        print_help(command, stdout);
        return TP_OK;
    }
    const char *positional[1024];
    tp_args args = {.command = command, .positional = positional};
    if (argc > 1024) return tp_fail(ctx, TP_INVALID, "more than 1024 arguments");
    TP_TRY(parse_args(ctx, &args, argc, argv));
    return command->run(ctx, &args);
}

int main(int argc, char **argv)
{
    tp_ctx ctx;
    tp_log log = {TP_LOG_INFO, print_log, NULL};
    prepare_process();
    tp_ctx_init(&ctx);
    ctx.log = &log;
    tp_status status = tp_map_guard_install(&ctx);
    if (status == TP_OK) status = dispatch(&ctx, argc, argv);
    if (ctx.device != NULL) tp_device_close(ctx.device);
    if (status == TP_OK && (fflush(stdout) != 0 || ferror(stdout)))
        status = tp_fail(&ctx, TP_IO_WRITE, "stdout: %s", strerror(errno));
    if (status != TP_OK) fprintf(stderr, "tapeft: %s\n", ctx.message[0] != '\0' ? ctx.message : tp_status_name(status));
    return tp_status_exit_code(status);
}
