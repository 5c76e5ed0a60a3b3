/* The byte alphabet of byte-level vocabularies: every byte has a printable character of its own.
 *
 * Bytes 33-126, 161-172 and 174-255 are written as the character with that number; the other 68, in increasing order,
 * as U+0100, U+0101, ... So a blank is U+0120 and a newline U+010A. */
#ifndef TP_DATA_BYTE_LEVEL_H
#define TP_DATA_BYTE_LEVEL_H

#include <stdbool.h>
#include <stdint.h>

static inline bool tp_byte_is_plain(uint32_t c)
{
    return (c >= 33 && c <= 126) || (c >= 161 && c <= 255 && c != 173);
}

static inline uint32_t tp_byte_to_char(unsigned char byte)
{
    if (tp_byte_is_plain(byte)) return byte;
    if (byte <= 32) return 256u + byte;
    if (byte <= 160) return 289u + (byte - 127u);
    return 323; /* 173 */
}

/* The byte, or -1 for a character outside the alphabet. */
static inline int tp_char_to_byte(uint32_t c)
{
    if (c < 256) return tp_byte_is_plain(c) ? (int)c : -1;
    if (c <= 288) return (int)(c - 256);
    if (c <= 322) return (int)(c - 289 + 127);
    return c == 323 ? 173 : -1;
}

#endif
