/* `tapeft help NAME` for what is no command: the keys of recipes. */
#ifndef TP_CLI_HELP_H
#define TP_CLI_HELP_H

#include <stdbool.h>

#include "base/status.h"

/* What is known of a key, under its own name or another tool's; "recipe": of every key. *known is false for other
 * names; INVALID if one of them resembles a key. */
tp_status tp_cli_print_key(tp_ctx *ctx, const char *name, bool *known) TP_MUST_CHECK;

#endif
