/* Answers read "... so 3 x 24 = 72.\n#### 72"; models write "#### $1,072." as well. */
#include "cli/gsm8k_number.h"

#include "base/text.h"

bool tp_gsm8k_number(const char *text, size_t n, double *number)
{
    char digits[64];
    size_t i = 0, kept = 0;
    while (i + 4 <= n && memcmp(text + i, "####", 4) != 0) i++;
    if (i + 4 > n) return false;
    for (i += 4; i < n && (text[i] == ' ' || text[i] == '\t'); i++) {
    }
    for (; i < n && memchr("0123456789+-.,$", text[i], 15) != NULL; i++) {
        if (text[i] == ',' || text[i] == '$') continue;
        if (kept + 1 == sizeof digits) return false;
        digits[kept++] = text[i];
    }
    while (kept > 0 && digits[kept - 1] == '.') kept--;
    digits[kept] = '\0';
    return tp_parse_f64(digits[0] == '+' ? digits + 1 : digits, number);
}
