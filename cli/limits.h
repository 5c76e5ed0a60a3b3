/* `tapeft --limits` and `tapeft doctor`: every limit on input from outside, by name. */
#ifndef TP_CLI_LIMITS_H
#define TP_CLI_LIMITS_H

#include "base/status.h"
#include "base/text.h"

tp_status tp_cli_print_limits(tp_ctx *ctx) TP_MUST_CHECK;
/* As a JSON object. */
void tp_cli_write_limits(tp_buf *out);

#endif
