/* The number a GSM8K answer ends in. */
#ifndef TP_CLI_GSM8K_NUMBER_H
#define TP_CLI_GSM8K_NUMBER_H

#include <stdbool.h>
#include <stddef.h>

/* The number behind the first "####" of a text, without commas, dollar signs and trailing dots. False if there is none. */
bool tp_gsm8k_number(const char *text, size_t n, double *number);

#endif
