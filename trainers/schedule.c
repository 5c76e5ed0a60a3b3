/* Warm-up, then constant, linear or cosine. */
#include "trainers/schedule.h"

#include <math.h>

double tp_schedule_rate(const tp_schedule *s, int64_t step)
{
    const double pi = 3.14159265358979323846;
    if (step < s->warmup_steps) return s->learning_rate * ((double)step / (double)s->warmup_steps);
    if (s->kind == TP_SCHEDULE_CONSTANT) return s->learning_rate;
    int64_t rest = s->steps - s->warmup_steps;
    double x = rest > 0 ? (double)(step - s->warmup_steps) / (double)rest : 1;
    if (x > 1) x = 1;
    double f = s->kind == TP_SCHEDULE_LINEAR ? 1 - x : 0.5 * (1 + cos(pi * x));
    return s->learning_rate * (s->min_ratio + (1 - s->min_ratio) * f);
}
