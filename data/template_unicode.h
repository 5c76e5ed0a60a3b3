/* What Python's str knows about characters (internal to the interpreter). */
#ifndef TP_DATA_TEMPLATE_UNICODE_H
#define TP_DATA_TEMPLATE_UNICODE_H

#include "base/text.h"

/* Bytes of the whitespace character at s, or 0 if there is none (or nothing). */
int tp_jspace_at(const char *s, size_t n);
/* Bytes of the letter, digit, mark or underscore at s, or 0. */
int tp_jword_at(const char *s, size_t n);
/* Length without trailing whitespace, and bytes of leading whitespace. */
size_t tp_jrstrip_len(const char *s, size_t n);
size_t tp_jlstrip_len(const char *s, size_t n);

/* Full case mappings, up to three characters written as UTF-8 to out; returns the bytes. */
typedef enum tp_jcase { TP_J_UPPER, TP_J_LOWER, TP_J_TITLE, TP_J_FOLD } tp_jcase;
#define TP_J_CASE_BYTES 16
size_t tp_jmap_case(uint32_t c, tp_jcase to, char out[TP_J_CASE_BYTES]);
/* Lower case of the capital sigma at byte `at` of s, which depends on its neighbours. */
uint32_t tp_jfinal_sigma(const char *s, size_t n, size_t at);

bool tp_jis_upper_char(uint32_t c);
bool tp_jis_lower_char(uint32_t c);
bool tp_jis_title_char(uint32_t c);
bool tp_jis_alpha(uint32_t c);
bool tp_jis_decimal(uint32_t c);
bool tp_jis_digit(uint32_t c);
bool tp_jis_numeric(uint32_t c);
bool tp_jis_space(uint32_t c);
bool tp_jis_printable(uint32_t c);

#endif
