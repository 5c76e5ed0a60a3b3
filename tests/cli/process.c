#include "tests/support.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/file.h"
#include "base/mem.h"
#include "tests/cli/process.h"

#define WAIT_SECONDS     120
#define MAX_ARGUMENTS    32
#define MAX_PROCESSES    8
#define FOLDER_MAX_BYTES ((size_t)1 << 20)

/* Processes that ended before anyone waited for them. */
static struct {
    pid_t process;
    int status;
} ended[MAX_PROCESSES];

void sleep_seconds(double seconds)
{
    struct timespec t = {.tv_sec = (time_t)seconds, .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)};
    while (nanosleep(&t, &t) != 0 && errno == EINTR) continue;
}

pid_t command_start(const char *log, const char *const *arguments)
{
    const char *program = getenv("TAPEFT");
    char *argv[MAX_ARGUMENTS];
    int n = 0;
    argv[n++] = strdup(program != NULL ? program : "build/tapeft");
    for (; arguments[n - 1] != NULL && n < MAX_ARGUMENTS - 1; n++) argv[n] = strdup(arguments[n - 1]);
    argv[n] = NULL;
    fflush(NULL);
    pid_t process = fork();
    if (process == 0) {
        int out = open(log, O_WRONLY | O_CREAT | O_APPEND, 0666), in = open("/dev/null", O_RDONLY);
        if (out < 0 || in < 0 || dup2(in, 0) < 0 || dup2(out, 1) < 0 || dup2(out, 2) < 0) _exit(126);
        execv(argv[0], argv);
        _exit(127);
    }
    for (int i = 0; i < n; i++) free(argv[i]);
    if (process < 0) fail_msg("fork: %s", strerror(errno));
    return process;
}

static bool take_ended(pid_t process, int *status)
{
    for (int i = 0; i < MAX_PROCESSES; i++) {
        if (ended[i].process != process) continue;
        ended[i].process = 0;
        *status = ended[i].status;
        return true;
    }
    return false;
}

bool command_runs(pid_t process)
{
    int status;
    if (waitpid(process, &status, WNOHANG) != process) return true;
    for (int i = 0; i < MAX_PROCESSES; i++) {
        if (ended[i].process != 0) continue;
        ended[i].process = process;
        ended[i].status = status;
        return false;
    }
    fail_msg("more than %d processes", MAX_PROCESSES);
    return false;
}

int command_wait(pid_t process)
{
    int status = 0;
    double waited = 0;
    while (!take_ended(process, &status) && command_runs(process)) {
        sleep_seconds(0.002);
        waited += 0.002;
        if (waited < WAIT_SECONDS) continue;
        kill(process, SIGKILL);
        waitpid(process, &status, 0);
        fail_msg("tapeft takes longer than %d s", WAIT_SECONDS);
    }
    (void)take_ended(process, &status);
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

int command_run(const char *log, const char *const *arguments)
{
    return command_wait(command_start(log, arguments));
}

static char *read_text(const char *path)
{
    char *text = NULL;
    size_t n;
    if (tp_file_read(NULL, path, (size_t)64 << 20, &text, &n) != TP_OK) return strdup("");
    char *copy = strdup(text);
    tp_free(text);
    return copy;
}

void check_exit(const char *log, int got, int expected)
{
    if (got == expected) return;
    char *text = read_text(log);
    size_t n = strlen(text);
    fail_msg("exit status %d, expected %d; the end of %s:\n%s", got, expected, log, n > 2000 ? text + n - 2000 : text);
}

bool log_has(const char *log, const char *text)
{
    char *all = read_text(log);
    bool found = strstr(all, text) != NULL;
    free(all);
    return found;
}

void check_log_has(const char *log, const char *text)
{
    if (log_has(log, text)) return;
    char *all = read_text(log);
    fail_msg("%s: expected \"%s\" in:\n%s", log, text, all);
}

static int count_lines(const char *path)
{
    if (!tp_path_exists(path)) return -1;
    char *text = read_text(path);
    int n = 0;
    for (const char *p = text; (p = strchr(p, '\n')) != NULL; p++) n++;
    free(text);
    return n;
}

void wait_for_lines(pid_t process, const char *path, int lines)
{
    for (double waited = 0; count_lines(path) < lines; waited += 0.001) {
        if (!command_runs(process)) fail_msg("tapeft ended before %s had %d lines", path, lines);
        if (waited > 60) fail_msg("%s: not %d lines within a minute", path, lines);
        sleep_seconds(0.001);
    }
}

void check_same_file(const char *a, const char *b)
{
    char *first = NULL, *second = NULL;
    size_t n = 0, m = 0;
    if (tp_file_read(NULL, a, (size_t)64 << 20, &first, &n) != TP_OK) fail_msg("%s cannot be read", a);
    if (tp_file_read(NULL, b, (size_t)64 << 20, &second, &m) != TP_OK) fail_msg("%s cannot be read", b);
    if (n != m) fail_msg("%s has %zu bytes, %s has %zu", a, n, b, m);
    for (size_t i = 0; i < n; i++)
        if (first[i] != second[i]) fail_msg("%s and %s differ from byte %zu on", a, b, i);
    tp_free(first);
    tp_free(second);
}

/* ---- folders ---- */

static tp_buf description; /* nftw has no argument for its callback */

static int describe(const char *path, const struct stat *s, int type, struct FTW *where)
{
    char hex[65] = "";
    (void)where;
    if (type == FTW_F && tp_sha256_file(NULL, path, hex) != TP_OK) return 1;
    tp_buf_printf(&description, "%s %lld.%09ld %lld %s\n", path, (long long)s->st_mtim.tv_sec, (long)s->st_mtim.tv_nsec,
                  (long long)s->st_size, hex);
    return 0;
}

char *describe_folder(const char *folder)
{
    tp_buf_init(&description, FOLDER_MAX_BYTES);
    if (nftw(folder, describe, 16, FTW_PHYS) != 0) fail_msg("%s cannot be listed", folder);
    char *text = strdup(tp_buf_cstr(&description));
    tp_buf_free(&description);
    return text;
}
