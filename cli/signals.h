/* Being told to stop: what commands that run for a while poll between two pieces of work. */
#ifndef TP_CLI_SIGNALS_H
#define TP_CLI_SIGNALS_H

#include <signal.h>

/* From here on the first SIGINT, SIGTERM or SIGHUP sets the flag that is returned, and a second SIGINT ends the process.
 * Before, signals do what they do anywhere: call it when there is something worth ending in good order. */
const volatile sig_atomic_t *tp_cli_catch_stop(void);
/* The flag that SIGUSR1 sets from here on; whoever obeys it sets it back. */
volatile sig_atomic_t *tp_cli_catch_save(void);

#endif
