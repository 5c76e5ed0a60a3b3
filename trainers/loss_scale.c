#include "trainers/loss_scale.h"

#include <math.h>

bool tp_loss_scale_update(tp_loss_scale *s, bool finite)
{
    if (s->value == 0) return false;
    if (!finite) {
        bool falls = s->value > TP_LOSS_SCALE_LEAST;
        s->streak = 0;
        if (falls) s->value /= 2;
        return falls;
    }
    if (++s->streak < TP_LOSS_SCALE_INTERVAL) return false;
    s->streak = 0;
    if (s->value < TP_LOSS_SCALE_MOST) s->value *= 2;
    return false;
}

bool tp_loss_scale_valid(const tp_loss_scale *s)
{
    int exponent;
    if (s->value == 0) return s->streak == 0;
    return s->value >= TP_LOSS_SCALE_LEAST && s->value <= TP_LOSS_SCALE_MOST && frexp(s->value, &exponent) == 0.5 &&
           s->streak >= 0 && s->streak < TP_LOSS_SCALE_INTERVAL;
}
