/* Handlers set flags and nothing else. */
#include "cli/signals.h"

static volatile sig_atomic_t stop_requested, save_requested;

static void on_stop(int number)
{
    if (stop_requested != 0 && number == SIGINT) {
        signal(SIGINT, SIG_DFL);
        raise(SIGINT);
    }
    stop_requested = 1;
}

static void on_save(int number)
{
    (void)number;
    save_requested = 1;
}

/* Reads and writes under way go on afterwards. */
static void catch_signal(int number, void (*handler)(int))
{
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
    sigemptyset(&action.sa_mask);
    sigaction(number, &action, NULL);
}

const volatile sig_atomic_t *tp_cli_catch_stop(void)
{
    catch_signal(SIGINT, on_stop);
    catch_signal(SIGTERM, on_stop);
    catch_signal(SIGHUP, on_stop);
    return &stop_requested;
}

volatile sig_atomic_t *tp_cli_catch_save(void)
{
    catch_signal(SIGUSR1, on_save);
    return &save_requested;
}
