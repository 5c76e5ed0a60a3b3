/* Gradient norm, AdamW and SGD over flat buffers of parameters. Each update reads and writes every array once. */

#define NORM_BLOCK   4096
#define UPDATE_BLOCK 16384

typedef struct norm_job {
    const float *g;
    int64_t n, first_block;
    double *sums; /* of the blocks from first_block on */
} norm_job;

static void norm_block(void *arg, int64_t i, int thread)
{
    const norm_job *job = arg;
    int64_t c = (job->first_block + i) * NORM_BLOCK, end = c + NORM_BLOCK < job->n ? c + NORM_BLOCK : job->n;
    double sum = 0;
    (void)thread;
    for (; c < end; c += VL) sum += v_sum_squares(v_load_n(job->g + c, end - c));
    job->sums[i] = sum;
}

static tp_status grad_norm(tp_ctx *ctx, const void *args)
{
    const tp_grad_norm_args *a = args;
    tp_cpu *cpu = tp_cpu_of(ctx);
    tp_step_state *state = a->state;
    norm_job job = {a->g, a->n, 0, (double *)(void *)cpu->workspace};
    int64_t blocks = (a->n + NORM_BLOCK - 1) / NORM_BLOCK, at_once = TP_CPU_WORKSPACE_BYTES / sizeof(double);
    double total = 0;
    for (; job.first_block < blocks; job.first_block += at_once) {
        int64_t n = blocks - job.first_block < at_once ? blocks - job.first_block : at_once;
        tp_cpu_for(cpu, n, norm_block, &job);
        for (int64_t i = 0; i < n; i++) total += job.sums[i];
    }
    state->norm = sqrt(total) / (double)state->loss_scale;
    bool spike = state->loss_sum - state->loss_mean > state->loss_spread;
    state->finite = isfinite(state->norm) && isfinite(state->loss_sum) && !spike;
    double clip = state->max_norm > 0 ? (double)state->max_norm / (state->norm + 1e-6) : 1.0;
    state->clip = (clip < 1.0 ? (float)clip : 1.0f) / state->loss_scale;
    return TP_OK;
}

/* In the order of PyTorch's loop over single tensors: decay, lerp of m, v, then w += (-step m) / denominator. */
static void adamw_some(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_adamw_args *a = args;
    const tp_step_state *state = a->state;
    double lr = state->learning_rate;
    vf decay = v_set((float)(1.0 - lr * (double)a->weight_decay)), clip = v_set(state->clip);
    vf toward = v_set((float)(1.0 - (double)a->beta1));
    vf keep = v_set((float)a->beta2), fresh = v_set((float)(1.0 - (double)a->beta2));
    vf root = v_set((float)sqrt((double)state->bias2)), epsilon = v_set(a->epsilon);
    vf step = v_set((float)(-lr / (double)state->bias1));
    (void)scratch;
    int64_t stop = end * UPDATE_BLOCK < a->n ? end * UPDATE_BLOCK : a->n;
    for (int64_t c = first * UPDATE_BLOCK; c < stop; c += VL) {
        int64_t n = stop - c;
        vf w = v_load_n(a->w + c, n) * decay, m = v_load_n(a->m + c, n), v = v_load_n(a->v + c, n);
        vf g = v_load_n(a->g + c, n) * clip;
        m = m + toward * (g - m);
        v = v * keep + fresh * g * g;
        v_store_n(a->m + c, n, m);
        v_store_n(a->v + c, n, v);
        v_store_n(a->w + c, n, w + step * m / (v_sqrt(v) / root + epsilon));
    }
}

static void sgd_some(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_sgd_args *a = args;
    const tp_step_state *state = a->state;
    vf clip = v_set(state->clip), decay = v_set(a->weight_decay), momentum = v_set(a->momentum);
    vf step = v_set(-state->learning_rate);
    (void)scratch;
    int64_t stop = end * UPDATE_BLOCK < a->n ? end * UPDATE_BLOCK : a->n;
    for (int64_t c = first * UPDATE_BLOCK; c < stop; c += VL) {
        int64_t n = stop - c;
        vf w = v_load_n(a->w + c, n), m = v_load_n(a->g + c, n) * clip + decay * w;
        if (a->momentum != 0.0f) {
            m = v_load_n(a->m + c, n) * momentum + m;
            v_store_n(a->m + c, n, m);
        }
        v_store_n(a->w + c, n, w + step * m);
    }
}

static void update_blocks(tp_ctx *ctx, int64_t n, row_body body, const void *args)
{
    row_loop loop = {tp_cpu_of(ctx), body, args, (n + UPDATE_BLOCK - 1) / UPDATE_BLOCK, 1};
    tp_cpu_for(loop.cpu, loop.n, row_loop_item, &loop);
}

static tp_status adamw(tp_ctx *ctx, const void *args)
{
    const tp_adamw_args *a = args;
    if (a->state->finite) update_blocks(ctx, a->n, adamw_some, args);
    return TP_OK;
}

static tp_status sgd(tp_ctx *ctx, const void *args)
{
    const tp_sgd_args *a = args;
    if (a->state->finite) update_blocks(ctx, a->n, sgd_some, args);
    return TP_OK;
}
