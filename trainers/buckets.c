/* Few shapes out of many lengths. */
#include "trainers/replay.h"

/* Numbers of rows up to the largest, and of labels: a sixteenth of the rows means that 3 % of the largest batch are filled in
 * on average. */
#define ROW_STEPS   16
#define LABEL_STEPS 8
/* Fewer would be a number of its own for next to nothing. */
#define LEAST_ROWS   64
#define LEAST_LABELS 16

static int64_t step_of(int64_t most, int64_t steps, int64_t least)
{
    return (most / steps + least) / least * least;
}

tp_buckets tp_buckets_for(int64_t rows, int64_t labels)
{
    return (tp_buckets){rows, labels, step_of(rows, ROW_STEPS, LEAST_ROWS), step_of(labels, LABEL_STEPS, LEAST_LABELS)};
}

static int64_t up_to(int64_t n, int64_t step, int64_t most)
{
    int64_t filled = (n + step - 1) / step * step;
    return filled < most ? filled : most;
}

static bool comes_again(const tp_buckets *buckets, const tp_host_batch *b)
{
    if (b->n != buckets->rows) return false;
    for (int64_t s = 0; s < b->n_segments; s++)
        if (b->segments[s].q_len != b->segments[0].q_len || b->segments[s].q_start != s * b->segments[0].q_len) return false;
    return b->n_segments * b->segments[0].q_len == b->n;
}

tp_status tp_buckets_fill(tp_ctx *ctx, const tp_buckets *buckets, tp_host_batch *b)
{
    if (buckets->row_step == 0 || b->n_segments == 0 || b->n_labels == 0) return TP_OK;
    b->any_segments = !comes_again(buckets, b);
    return tp_host_batch_fill(ctx, b, b->any_segments ? up_to(b->n, buckets->row_step, buckets->rows) : b->n,
                              up_to(b->n_labels, buckets->label_step, buckets->labels));
}
