/* Dropout. The generator is Philox4x32-10 (base/rng.h): a number is a function of key and index, so the backward pass
 * draws the same numbers again instead of keeping a mask. Drawn one at a time they would cost more than the rows they
 * thin out; here VL/2 counters run side by side, one in each 64-bit lane, where the widening multiplication is at home. */

#define PHILOX_LANES   (VL / 2)           /* counters at once */
#define PHILOX_NUMBERS (PHILOX_LANES * 4) /* numbers that they give */
#define DROPOUT_CHUNK  1024               /* elements per buffer of numbers */

/* The lane that holds block i, so that interleaving even and then odd lanes puts the numbers in order. */
TP_INLINE void philox_lane_offsets(uint64_t offset[PHILOX_LANES])
{
    for (int lane = 0; lane < PHILOX_LANES; lane++) {
        offset[lane] = (uint64_t)(lane % 2 == 0 ? lane / 2 : PHILOX_LANES / 2 + lane / 2);
    }
}

/* Numbers of the blocks block .. block + PHILOX_LANES - 1. Only the low half of each lane of c0..c3 counts. */
TP_INLINE void philox(tp_rng_key key, vu offset, uint64_t block, uint32_t out[PHILOX_NUMBERS])
{
    vu index = vu_set(block) + offset;
    vu c0 = index, c1 = vu_high(index), c2 = vu_set((uint32_t)key.step), c3 = vu_set(key.step >> 32);
    uint32_t k0 = (uint32_t)key.seed ^ (uint32_t)(key.seed >> 32) * 0x9E3779B9u, k1 = key.stream;
    const vu m0 = vu_set(0xD2511F53u), m1 = vu_set(0xCD9E8D57u);
    for (int round = 0; round < 10; round++) {
        vu p0 = vu_mul32(c0, m0), p1 = vu_mul32(c2, m1);
        c0 = vu_high(p1) ^ c1 ^ vu_set(k0);
        c1 = p1;
        c2 = vu_high(p0) ^ c3 ^ vu_set(k1);
        c3 = p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    vu low = vu_pack(c0, c1), high = vu_pack(c2, c3);
    vu_store(out, vu_interleave_even(low, high));
    vu_store(out + PHILOX_NUMBERS / 2, vu_interleave_odd(low, high));
}

TP_INLINE void dropout_row(const tp_dropout_args *a, tp_rng_key key, int64_t r, int32_t threshold, vf keep_scale,
                           uint32_t *numbers, bool x16, bool y16)
{
    const void *x = row_at(a->x, r);
    void *y = row_at(a->y, r);
    uint64_t lanes[PHILOX_LANES];
    philox_lane_offsets(lanes);
    vu offset = vu_load(lanes);
    for (int64_t c0 = 0; c0 < a->dim; c0 += DROPOUT_CHUNK) {
        int64_t n = a->dim - c0 < DROPOUT_CHUNK ? a->dim - c0 : DROPOUT_CHUNK;
        uint64_t index = (uint64_t)(a->first_row + r) * (uint64_t)a->dim + (uint64_t)c0;
        int64_t skip = (int64_t)(index % 4); /* the first number's place in its block */
        for (int64_t i = 0; i < skip + n; i += PHILOX_NUMBERS) philox(key, offset, (index + (uint64_t)i) / 4, numbers + i);
        for (int64_t i = 0; i < n; i += VL) {
            int64_t c = c0 + i;
            vm keep = v_keep(numbers + skip + i, threshold);
            vf value = v_pick(keep, v_get(x, x16, c, a->dim - c) * keep_scale, v_set(0.0f));
            if (a->accumulate) value = value + v_get(y, y16, c, a->dim - c);
            v_put(y, y16, c, a->dim - c, value);
        }
    }
}

static void dropout_rows(const void *args, int64_t first, int64_t end, void *scratch)
{
    const tp_dropout_args *a = args;
    /* uniform >= p, where uniform = u24 * 2^-24, is u24 >= ceil(p * 2^24), all exact in double */
    int32_t threshold = (int32_t)ceil((double)a->p * 16777216.0);
    vf keep_scale = v_set((float)(1.0 / (1.0 - (double)a->p)));
    bool x16 = is_bf16(a->x), y16 = is_bf16(a->y);
    tp_rng_key key = a->key;
    if (a->state != NULL) key.step = a->state->draw;
    for (int64_t r = first; r < end; r++) {
        if (!x16 && !y16)
            dropout_row(a, key, r, threshold, keep_scale, scratch, false, false);
        else if (x16 && y16)
            dropout_row(a, key, r, threshold, keep_scale, scratch, true, true);
        else
            dropout_row(a, key, r, threshold, keep_scale, scratch, x16, y16);
    }
}

static tp_status dropout(tp_ctx *ctx, const void *args)
{
    const tp_dropout_args *a = args;
    TP_TRY(check_dtype(ctx, "dropout", a->x.dtype));
    TP_TRY(check_dtype(ctx, "dropout", a->y.dtype));
    for_rows(ctx, a->n, a->dim, dropout_rows, args);
    return TP_OK;
}
