/* Running the command under test: $TAPEFT, or build/tapeft. */
#ifndef TP_TESTS_CLI_PROCESS_H
#define TP_TESTS_CLI_PROCESS_H

#include <stdbool.h>
#include <sys/types.h>

/* Starts `tapeft` with these arguments (NULL-terminated); what it prints is appended to the file `log`. */
pid_t command_start(const char *log, const char *const *arguments);
/* Its exit status, or 128 + the signal that ended it. Fails the test if it takes longer than two minutes. */
int command_wait(pid_t process);
int command_run(const char *log, const char *const *arguments);
/* True while it runs; its status is kept for command_wait. */
bool command_runs(pid_t process);

/* Arguments in place: run(log, "train", recipe, "--resume"). */
#define start_tapeft(log, ...) command_start(log, (const char *const[]){__VA_ARGS__, NULL})
#define run_tapeft(log, ...)   command_run(log, (const char *const[]){__VA_ARGS__, NULL})

/* Exit status as expected, or the test fails with the log's last lines. */
void check_exit(const char *log, int got, int expected);
/* True if the log has this text. */
bool log_has(const char *log, const char *text);
void check_log_has(const char *log, const char *text);

void sleep_seconds(double seconds);
/* Waits until the file has at least `lines` lines (0: until it exists); fails the test after a minute or when the process ends.
 */
void wait_for_lines(pid_t process, const char *path, int lines);

/* Both files exist with equal bytes, or the test fails. */
void check_same_file(const char *a, const char *b);
/* Names, times of change and bytes of everything below a folder, as text; free() it. Equal text: nothing was touched. */
char *describe_folder(const char *folder);

#endif
