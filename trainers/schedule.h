/* Learning rate as a function of the step: the schedules of transformers. */
#ifndef TP_TRAINERS_SCHEDULE_H
#define TP_TRAINERS_SCHEDULE_H

#include <stdint.h>

#include "base/status.h"

typedef enum tp_schedule_kind { TP_SCHEDULE_CONSTANT, TP_SCHEDULE_LINEAR, TP_SCHEDULE_COSINE } tp_schedule_kind;

typedef struct tp_schedule {
    tp_schedule_kind kind;
    double learning_rate;
    double min_ratio; /* of learning_rate, where linear and cosine end */
    int64_t warmup_steps;
    int64_t steps;
} tp_schedule;

/* Rate used by step t, counted from 0: t/W while t < W, then m + (1-m) f(x), x = (t-W)/(S-W); f = 1, 1-x, (1+cos(pi x))/2. */
TP_API double tp_schedule_rate(const tp_schedule *schedule, int64_t step);

#endif
