/* From template text to tokens, whitespace control included (internal to the interpreter). */
#ifndef TP_DATA_TEMPLATE_LEXER_H
#define TP_DATA_TEMPLATE_LEXER_H

#include "data/template_value.h"

typedef enum tp_jtoken_kind {
    TP_T_END,
    TP_T_DATA,
    TP_T_VARIABLE_BEGIN,
    TP_T_VARIABLE_END,
    TP_T_BLOCK_BEGIN,
    TP_T_BLOCK_END,
    TP_T_NAME,
    TP_T_STRING,
    TP_T_INTEGER,
    TP_T_FLOAT,
    /* operators */
    TP_T_ADD,
    TP_T_SUB,
    TP_T_DIV,
    TP_T_FLOORDIV,
    TP_T_MUL,
    TP_T_MOD,
    TP_T_POW,
    TP_T_TILDE,
    TP_T_LBRACKET,
    TP_T_RBRACKET,
    TP_T_LPAREN,
    TP_T_RPAREN,
    TP_T_LBRACE,
    TP_T_RBRACE,
    TP_T_EQ,
    TP_T_NE,
    TP_T_GT,
    TP_T_GE,
    TP_T_LT,
    TP_T_LE,
    TP_T_ASSIGN,
    TP_T_DOT,
    TP_T_COLON,
    TP_T_PIPE,
    TP_T_COMMA,
    TP_T_SEMICOLON
} tp_jtoken_kind;

typedef struct tp_jtoken {
    tp_jtoken_kind kind;
    uint32_t line;
    tp_span text; /* data and strings: as they are to be used, escapes resolved; the rest: as written */
} tp_jtoken;

/* Splits the text, which is changed in place (line ends become \n) and lives on in the tokens. *tokens is released
 * with tp_free and ends in TP_T_END. */
tp_status tp_jlex(tp_ctx *ctx, tp_arena *arena, const char *name, char *text, size_t n, tp_jtoken **tokens) TP_MUST_CHECK;

#endif
