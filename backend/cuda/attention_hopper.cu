/* Attention and its gradient on Hopper's tensor core instructions (hopper.cuh), for bf16, f16 and heads of up to 128 channels;
 * the same algorithms as in attention.cu and attention_backward.cu.
 *
 * A block is three or four warpgroups. The first copies: tiles of one side pass through a ring of stages in shared memory, each
 * with a barrier that says it is full and one that says it is empty. The others own 64 rows each of one tile of the other side
 * and compute; neither waits for its neighbour, so that one's exponentials run while the other's products do. Within a
 * warpgroup, too, the weighted sums of a step are issued behind the scores of the next one, and run while those become
 * weights. Scores that have to be scaled, capped or shifted one by one have kernels of their own (SHAPED): beside that code the
 * usual path had no registers left, and branches for each score. */
#include <type_traits>

#include "backend/cuda/attention.cuh"
#include "backend/cuda/hopper.cuh"

using namespace tp_attention;
using namespace tp_hopper;

namespace
{

constexpr int COPIERS = 128;

/* How a kernel is cut: rows (or keys) that a block owns, 64 for each warpgroup that computes, and what each side of a block
 * takes of the 64 Ki registers, by thread. Short heads leave room for a third warpgroup that computes. (A second or third block
 * on a multiprocessor was slower: too few registers, or too much to copy.) */
template <int OWNED> struct cut {
    enum {
        ROWS = OWNED,
        WORKERS = ROWS * 2,
        THREADS = COPIERS + WORKERS,
        ALLOTTED = 65536 / THREADS / 8 * 8 * THREADS, /* registers of a block */
        COPIER = WORKERS > 256 ? 32 : 40,
        WORKER = (ALLOTTED - COPIERS * COPIER) / WORKERS / 8 * 8
    };
};
template <int DIM> using forward_cut = cut<DIM <= 64 ? 192 : 128>;
template <int DIM> using key_cut = cut<128>;
template <int DIM> using query_cut = cut<DIM <= 64 ? 192 : 128>;

constexpr int KEYS = 128; /* of a step forward */
constexpr int STAGES = 2;
constexpr int STEP = 64; /* rows or keys of a step backward */
template <int DIM> constexpr int BACKWARD_STAGES = DIM <= 64 ? 8 : 3;
constexpr int BARRIER_BYTES = 256;

template <int DIM> constexpr int forward_bytes = (forward_cut<DIM>::ROWS + 2 * STAGES * KEYS) * DIM * 2 + BARRIER_BYTES;
template <int DIM, int ROWS>
constexpr int backward_bytes =
    (2 * ROWS + 2 * BACKWARD_STAGES<DIM> * STEP) * DIM * 2 + BACKWARD_STAGES<DIM> *STEP *(int)sizeof(row_terms) + BARRIER_BYTES;

#if TP_HOPPER

__device__ __forceinline__ void copy_chunk(uint32_t to, const void *from, bool there)
{
    const int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_float(uint32_t to, const float *from, bool there)
{
    const int bytes = there ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

/* Begins to copy tiles. A thread keeps to one chunk of rows that are APART from each other, a multiple of 8, so its swizzle
 * stays the same. Four warps feed eight, so what counts is instructions: where rows follow each other at one distance there are
 * three for a chunk. */
template <int DIM> struct copier {
    static constexpr int CHUNKS = DIM / 8, APART = COPIERS / CHUNKS;
    int chunk, first;
    __device__ copier() : chunk((int)threadIdx.x % CHUNKS), first((int)threadIdx.x / CHUNKS) {}

    /* Row `first` begins at `from`, the thread's next one `distance` bytes behind it; n rows are there. */
    template <int ROWS>
    __device__ __forceinline__ void rows_apart(uint32_t to, const unsigned char *from, int64_t distance, int n,
                                               int head_dim) const
    {
        const uint32_t place = to + chunk_offset<ROWS>(first, chunk);
        from += chunk * 16;
        if (n >= ROWS && head_dim == DIM) {
#pragma unroll
            for (int i = 0; i < ROWS / APART; i++, from += distance)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place + i * APART * 128), "l"(from) : "memory");
            return;
        }
        const bool in_head = chunk * 8 < head_dim;
#pragma unroll 1
        for (int i = 0; i < ROWS / APART; i++, from += distance) {
            const bool there = in_head && first + i * APART < n;
            copy_chunk(place + i * APART * 128, there ? from : from - i * distance, there);
        }
    }

    /* Rows row .. row+n-1 of keys or values. */
    template <int ROWS>
    __device__ __forceinline__ void keys(const params &p, uint32_t to, const rows &x, int kv_head, int row, int n) const
    {
        const int there = min(first, max(n - 1, 0)); /* addresses stay within the array */
        rows_apart<ROWS>(to, x.data + (int64_t)(row + there) * x.row_bytes + (int64_t)kv_head * p.head_dim * 2,
                         (int64_t)APART * x.row_bytes, n, p.head_dim);
    }

    /* Rows (query, head) row .. end-1 of a segment, as many as the tile holds. */
    template <int ROWS>
    __device__ __forceinline__ void queries(const params &p, uint32_t to, const rows &x, const segment &s, int kv_head, int row,
                                            int end) const
    {
        const int n = end - row;
        const unsigned char *base = x.data + (int64_t)s.q_start * x.row_bytes + (int64_t)kv_head * p.group * p.head_dim * 2;
        if (APART % p.group == 0) { /* the same head again, APART / group queries further */
            const int mine = row + min(first, n - 1), query = query_of(p, mine);
            rows_apart<ROWS>(to, base + (int64_t)query * x.row_bytes + (mine - query * p.group) * p.head_dim * 2,
                             (int64_t)(APART / p.group) * x.row_bytes, n, p.head_dim);
            return;
        }
        const uint32_t place = to + chunk_offset<ROWS>(first, chunk), row_bytes = (uint32_t)x.row_bytes;
        const bool in_head = chunk * 8 < p.head_dim;
        base += chunk * 16;
#pragma unroll 4
        for (int i = 0; i < ROWS / APART; i++) {
            const int r = row + first + i * APART, query = query_of(p, r);
            const bool there = in_head && r < end;
            const uint64_t offset = (uint64_t)(uint32_t)query * row_bytes + (uint32_t)((r - query * p.group) * p.head_dim * 2);
            copy_chunk(place + i * APART * 128, there ? base + offset : x.data, there);
        }
    }
};

/* A ring of stages: visit i of one is its i / N-th filling. */
template <int N> struct ring {
    uint32_t full; /* barriers; those for empty follow */
    __device__ uint32_t full_of(int i) const { return full + i % N * 8; }
    __device__ uint32_t empty_of(int i) const { return full + (N + i % N) * 8; }
    __device__ void open(int workers) const
    {
        for (int i = 0; i < N; i++) {
            barrier_open(full_of(i), COPIERS);
            barrier_open(empty_of(i), workers / 32);
        }
    }
    __device__ void wait_full(int i) const { barrier_wait(full_of(i), i / N & 1); } /* see_copies() comes before their use */
    __device__ void wait_room(int i) const
    {
        if (i >= N) barrier_wait(empty_of(i), i / N - 1 & 1);
    }
    __device__ void release(int i) const
    {
        if (threadIdx.x % 32 == 0) barrier_arrive(empty_of(i));
    }
};

/* softmax_step in the units of the tensor cores: one multiply-add and the hardware's exponential an element. What the product's
 * rounding costs, 2^-24 of the exponent, is far below what rounding the weights to 16 bits does. */
template <bool SHAPED, int N>
__device__ __forceinline__ void quick_softmax_step(const params &p, const query_tile &t, const key_tile &tile,
                                                   const int (&row)[2], const span (&seen)[2], float (&s)[N][4],
                                                   float (&greatest)[2], float (&sum)[2], float (&shrink)[2])
{
    const int lane = threadIdx.x % 32;
    const float factor = p.unit * LOG2E;
    if constexpr (SHAPED) {
        softmax_step(p, t, tile, row, seen, s, greatest, sum, shrink);
        return;
    }
    if (!tile.all_seen) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const span keys = tile_keys_seen(tile, seen[h]);
            const int first = keys.first - lane % 4 * 2, end = keys.end - lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (n * 8 + i < first || n * 8 + i >= end) s[n][h * 2 + i] = -INFINITY;
                }
            }
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float most[2] = {greatest[h], s[0][h * 2]}, added[2] = {};
#pragma unroll
        for (int n = 0; n < N; n++) {
            most[0] = fmaxf(most[0], s[n][h * 2]);
            most[1] = fmaxf(most[1], s[n][h * 2 + 1]);
        }
        most[0] = fmaxf(most[0], most[1]);
        most[0] = fmaxf(most[0], __shfl_xor_sync(0xffffffffu, most[0], 1));
        most[0] = fmaxf(most[0], __shfl_xor_sync(0xffffffffu, most[0], 2));
        const float shift = most[0] == -INFINITY ? 0.0f : most[0] * factor; /* a row that has seen nothing keeps -infinity */
        shrink[h] = quick_exp2(fmaf(greatest[h], factor, -shift));
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                s[n][h * 2 + i] = quick_exp2(fmaf(s[n][h * 2 + i], factor, -shift));
                added[i] += s[n][h * 2 + i];
            }
        }
        greatest[h] = most[0];
        sum[h] = fmaf(sum[h], shrink[h], added[0] + added[1]);
    }
}

#endif

template <typename T, int DIM, bool SHAPED>
__global__ void __launch_bounds__(forward_cut<DIM>::THREADS, 1) hopper_forward_kernel(const __grid_constant__ params p)
{
#if TP_HOPPER
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr int ROWS = forward_cut<DIM>::ROWS;
    constexpr uint32_t TILE = KEYS * DIM * 2;
    const uint32_t q = (uint32_t)__cvta_generic_to_shared(shared), k = q + ROWS * DIM * 2, v = k + STAGES * TILE;
    const uint32_t q_full = v + STAGES * TILE;
    const ring<STAGES> keys = {q_full + 8}, values = {q_full + 8 + 16 * STAGES};
    const query_tile t = find_query_tile<ROWS>(p);
    const key_walk<KEYS> walk(p, t.some_see);
    const span part = part_of(p, walk.n, t.split);
    const int steps = part.end - part.first;
    if (threadIdx.x == 0) {
        barrier_open(q_full, COPIERS);
        keys.open(forward_cut<DIM>::WORKERS);
        values.open(forward_cut<DIM>::WORKERS);
    }
    __syncthreads();
    if (threadIdx.x < COPIERS) {
        give_registers<forward_cut<DIM>::COPIER>();
        const copier<DIM> copy;
        const auto copy_keys = [&](int step, uint32_t to, const rows &own, const rows &prefix) {
            const key_tile tile = find_key_tile(p, t, walk, part.first + step);
            copy.template keys<KEYS>(p, to + step % STAGES * TILE, tile.prefix ? prefix : own, t.kv_head, tile.row, tile.n);
        };
        if (steps > 0) {
            copy.template queries<ROWS>(p, q, p.q, t.s, t.kv_head, t.first, t.end);
            barrier_arrive_after_copies(q_full);
        }
        for (int step = 0; step < steps; step++) {
            keys.wait_room(step);
            copy_keys(step, k, p.k, p.prefix_k);
            barrier_arrive_after_copies(keys.full_of(step));
            values.wait_room(step);
            copy_keys(step, v, p.v, p.prefix_v);
            barrier_arrive_after_copies(values.full_of(step));
        }
    } else {
        take_registers<forward_cut<DIM>::WORKER>();
        const int worker = threadIdx.x - COPIERS, lane = worker % 32, group_row = worker / 128 * 64,
                  warp_row = worker / 32 * 16;
        float out[DIM / 8][4] = {}, s[KEYS / 8][4], greatest[2] = {-INFINITY, -INFINITY}, sum[2] = {}, shrink[2];
        uint32_t weights[KEYS / 16][4];
        span seen[2];
        int row[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            row[h] = t.first + warp_row + lane / 4 + h * 8;
            seen[h] = keys_seen(p, t.s, query_of(p, min(row[h], t.end - 1)));
        }
        if (steps > 0) {
            barrier_wait(q_full, 0);
            keys.wait_full(0);
            see_copies();
            arrive();
            tile_multiply_nt<T, KEYS, DIM, ROWS>(s, q, group_row, k);
            commit();
            wait<0>();
            keys.release(0);
            hold(s);
            quick_softmax_step<SHAPED>(p, t, find_key_tile(p, t, walk, part.first), row, seen, s, greatest, sum, shrink);
            pack<T>(weights, s);
        }
        for (int step = 1; step < steps; step++) {
            keys.wait_full(step);
            values.wait_full(step - 1);
            see_copies();
            arrive();
            tile_multiply_nt<T, KEYS, DIM, ROWS>(s, q, group_row, k + step % STAGES * TILE);
            commit();
            hold(out);
            arrive();
            tile_multiply_add<T, KEYS, DIM>(out, weights, v + (step - 1) % STAGES * TILE);
            commit();
            wait<1>();
            keys.release(step);
            hold(s);
            quick_softmax_step<SHAPED>(p, t, find_key_tile(p, t, walk, part.first + step), row, seen, s, greatest, sum, shrink);
            wait<0>();
            values.release(step - 1);
            hold(out);
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) out[n][i] *= shrink[i / 2];
            }
            pack<T>(weights, s);
        }
        if (steps > 0) {
            values.wait_full(steps - 1);
            see_copies();
            hold(out);
            arrive();
            tile_multiply_add<T, KEYS, DIM>(out, weights, v + (steps - 1) % STAGES * TILE);
            commit();
            wait<0>();
            hold(out);
        }
        const query_rows to = {p, p.out, t.s, t.kv_head, t.first, t.end};
#pragma unroll
        for (int h = 0; h < 2; h++) store_result<T>(p, t, to, row[h], h, greatest[h], sum[h], out);
    }
#endif
}

#if TP_HOPPER

/* What both gradient kernels keep in shared memory: two tiles that the block owns, and stages of two tiles that pass by. */
template <int DIM, typename Cut> struct backward_room {
    static constexpr uint32_t OWNED = Cut::ROWS * DIM * 2, TILE = STEP * DIM * 2;
    static constexpr int STAGES = BACKWARD_STAGES<DIM>;
    uint32_t owned[2], passing[2], terms, owned_full;
    ring<STAGES> stages;
    __device__ explicit backward_room(const unsigned char *shared)
    {
        owned[0] = (uint32_t)__cvta_generic_to_shared(shared);
        owned[1] = owned[0] + OWNED;
        passing[0] = owned[1] + OWNED;
        passing[1] = passing[0] + STAGES * TILE;
        terms = passing[1] + STAGES * TILE;
        owned_full = terms + STAGES * STEP * (uint32_t)sizeof(row_terms);
        stages.full = owned_full + 8;
        if (threadIdx.x == 0) {
            barrier_open(owned_full, COPIERS);
            stages.open(Cut::WORKERS);
        }
        __syncthreads();
    }
    __device__ uint32_t passing_at(int i, int step) const { return passing[i] + step % STAGES * TILE; }

    /* The copiers' part: own() begins to copy the owned tiles, pass(step) those of a step. */
    template <typename Own, typename Pass>
    __device__ __forceinline__ void copy(int steps, const Own &own, const Pass &pass) const
    {
        if (steps == 0) return;
        own();
        barrier_arrive_after_copies(owned_full);
        for (int step = 0; step < steps; step++) {
            stages.wait_room(step);
            pass(step);
            barrier_arrive_after_copies(stages.full_of(step));
        }
    }

    /* The workers' part where registers are scarce. Two products of scores are issued; first(step) is called when the first is
     * there, second(step), which issues the sums, when both are. */
    template <typename Scores, typename First, typename Second>
    __device__ __forceinline__ void walk(int steps, const Scores &scores, const First &first, const Second &second) const
    {
        if (steps > 0) barrier_wait(owned_full, 0);
        for (int step = 0; step < steps; step++) {
            stages.wait_full(step);
            see_copies();
            scores(step);
            wait<1>();
            first(step);
            wait<0>();
            second(step);
            wait<0>();
            stages.release(step);
        }
    }

    /* Where there are more: the sums of a step go behind the scores of the next. first(step) and second(step) turn scores into
     * weights in place, and take() comes when those may move to where sums(step) reads them. Scores are committed in GROUPS, 1
     * or 2: first(step) is called when the first of them is there. */
    template <int GROUPS, typename Scores, typename First, typename Second, typename Sums, typename Take>
    __device__ __forceinline__ void walk_ahead(int steps, const Scores &scores, const First &first, const Second &second,
                                               const Sums &sums, const Take &take) const
    {
        if (steps == 0) return;
        barrier_wait(owned_full, 0);
        stages.wait_full(0);
        see_copies();
        scores(0);
        wait<GROUPS - 1>();
        first(0);
        wait<0>();
        second(0);
        take();
        for (int step = 1; step < steps; step++) {
            stages.wait_full(step);
            see_copies();
            scores(step);
            sums(step - 1);
            wait<GROUPS>();
            first(step);
            wait<1>();
            second(step);
            wait<0>();
            stages.release(step - 1);
            take();
        }
        sums(steps - 1);
        wait<0>();
    }
};

#endif

/* The sums of a block that owns keys: dv += P^T dout, dk += dS^T q; of one that owns rows: dq += dS k. */
template <typename T, int DIM, bool SHAPED>
__global__ void __launch_bounds__(key_cut<DIM>::THREADS, 1) hopper_key_gradient_kernel(const __grid_constant__ params p)
{
#if TP_HOPPER
    constexpr int ROWS = key_cut<DIM>::ROWS;
    extern __shared__ __align__(1024) unsigned char shared[];
    const backward_room<DIM, key_cut<DIM>> room(shared);
    const owned_keys t = find_owned_keys<ROWS>(p);
    const int steps = (t.end_row - t.first_row + STEP - 1) / STEP;
    if (threadIdx.x < COPIERS) {
        give_registers<key_cut<DIM>::COPIER>();
        const copier<DIM> copy;
        room.copy(
            steps,
            [&]() {
                copy.template keys<ROWS>(p, room.owned[0], p.k, t.kv_head, t.s.k_start + t.key, t.n);
                copy.template keys<ROWS>(p, room.owned[1], p.v, t.kv_head, t.s.k_start + t.key, t.n);
            },
            [&](int step) {
                const int row = t.first_row + step * STEP, r = threadIdx.x % STEP;
                copy.template queries<STEP>(p, room.passing_at(0, step), p.q, t.s, t.kv_head, row, t.end_row);
                copy.template queries<STEP>(p, room.passing_at(1, step), p.dout, t.s, t.kv_head, row, t.end_row);
                /* zeros behind the last row: its dout is zeros as well, so it adds nothing */
                const bool there = row + r < t.end_row;
                const int64_t index = there ? row_index(p, t.s, t.kv_head, row + r) : 0;
                const uint32_t place = room.terms + (step % BACKWARD_STAGES<DIM> * STEP + r) * (uint32_t)sizeof(row_terms);
                if (threadIdx.x < STEP)
                    copy_float(place, p.part_lse + index, there);
                else
                    copy_float(place + 4, p.delta + index, there);
            });
    } else {
        take_registers<key_cut<DIM>::WORKER>();
        const int worker = threadIdx.x - COPIERS, lane = worker % 32, group_key = worker / 128 * 64,
                  warp_key = worker / 32 * 16;
        const row_terms *terms = reinterpret_cast<const row_terms *>(shared + (room.terms - room.owned[0]));
        const float unit = p.unit * LOG2E;
        float dk[DIM / 8][4] = {}, dv[DIM / 8][4] = {}, s[STEP / 8][4], ds[STEP / 8][4];
        uint32_t s_weights[STEP / 16][4], ds_weights[STEP / 16][4];
        const int shift = t.s.k_len - t.s.q_len;
        /* short heads: what the workers own stays in registers, for products that read both sides from memory wait for it */
        constexpr bool HELD = DIM <= 64;
        uint32_t held[2][HELD ? DIM / 16 : 1][4];
        if constexpr (HELD) {
            if (steps > 0) {
                barrier_wait(room.owned_full, 0);
                load_factor<DIM, ROWS>(held[0], room.owned[0], warp_key);
                load_factor<DIM, ROWS>(held[1], room.owned[1], warp_key);
            }
        }
        const auto scores = [&](int step) {
            arrive();
            if constexpr (HELD)
                tile_multiply_held<T, STEP, DIM>(s, held[0], room.passing_at(0, step));
            else
                tile_multiply_nt<T, STEP, DIM, ROWS>(s, room.owned[0], group_key, room.passing_at(0, step));
            commit();
            if constexpr (HELD)
                tile_multiply_held<T, STEP, DIM>(ds, held[1], room.passing_at(1, step));
            else
                tile_multiply_nt<T, STEP, DIM, ROWS>(ds, room.owned[1], group_key, room.passing_at(1, step));
            commit();
        };
        /* both s and ds: scores that are scaled, capped or shifted */
        const auto weigh_shaped = [&](int step) {
            const int row = t.first_row + step * STEP;
#pragma unroll
            for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int r = n * 8 + lane % 4 * 2 + i, at = min(row + r, t.end_row - 1), query = query_of(p, at);
                    const span seen = keys_seen(p, t.s, query);
                    const float slope = alibi_slope(p, t.kv_head, at);
                    const row_terms x = terms[step % BACKWARD_STAGES<DIM> * STEP + r];
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const int key = t.key + warp_key + lane / 4 + h * 8;
                        /* rows behind the last have zeros to add, but what a slope makes of theirs may be more than f16 holds
                         */
                        finish(p, s[n][h * 2 + i], ds[n][h * 2 + i], x, slope, key - (query + shift),
                               row + r < t.end_row && key >= seen.first && key < seen.end);
                    }
                }
            }
        };
        /* s: P. Keys behind the tile's last one may get any: nobody stores their sums. Rows behind the last have zeros to add.
         */
        const auto weigh_scores = [&](int step, auto all) {
            const int row = t.first_row + step * STEP;
#pragma unroll
            for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int r = n * 8 + lane % 4 * 2 + i;
                    const float top = terms[step % BACKWARD_STAGES<DIM> * STEP + r].lse;
                    const int diagonal =
                        decltype(all)::value ? 0 : query_of(p, row + r) + shift - (t.key + warp_key + lane / 4);
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const bool hidden = !decltype(all)::value &&
                                            ((p.causal && h * 8 > diagonal) || (p.window > 0 && h * 8 <= diagonal - p.window));
                        float &x = s[n][h * 2 + i];
                        x = hidden ? 0.0f : quick_exp2(fmaf(x, unit, -top));
                    }
                }
            }
        };
        /* ds: dS = P (dP - D) */
        const auto weigh_slopes = [&](int step) {
#pragma unroll
            for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float delta = terms[step % BACKWARD_STAGES<DIM> * STEP + n * 8 + lane % 4 * 2 + i].delta;
#pragma unroll
                    for (int h = 0; h < 2; h++) ds[n][h * 2 + i] = s[n][h * 2 + i] * (ds[n][h * 2 + i] - delta);
                }
            }
        };
        const auto weigh = [&](int step) {
            if (all_seen(p, t, t.first_row + step * STEP, STEP, ROWS))
                weigh_scores(step, std::true_type());
            else
                weigh_scores(step, std::false_type());
        };
        const auto sum_values = [&](int step) {
            hold(dv);
            arrive();
            tile_multiply_add<T, STEP, DIM>(dv, s_weights, room.passing_at(1, step));
        };
        const auto sum_keys = [&](int step) {
            hold(dk);
            arrive();
            tile_multiply_add<T, STEP, DIM>(dk, ds_weights, room.passing_at(0, step));
            commit();
        };
        if constexpr (DIM <= 64) {
            room.template walk_ahead<2>(
                steps, scores,
                [&](int step) {
                    hold(s);
                    if constexpr (!SHAPED) weigh(step);
                },
                [&](int step) {
                    hold(ds);
                    if constexpr (SHAPED)
                        weigh_shaped(step);
                    else
                        weigh_slopes(step);
                },
                [&](int step) {
                    sum_values(step);
                    sum_keys(step);
                },
                [&]() {
                    pack<T>(s_weights, s);
                    pack<T>(ds_weights, ds);
                });
        } else {
            room.walk(
                steps, scores,
                [&](int step) {
                    hold(s);
                    if constexpr (!SHAPED) weigh(step);
                },
                [&](int step) {
                    hold(ds);
                    if constexpr (SHAPED)
                        weigh_shaped(step);
                    else
                        weigh_slopes(step);
                    pack<T>(s_weights, s);
                    pack<T>(ds_weights, ds);
                    sum_values(step);
                    sum_keys(step);
                });
        }
        hold(dk);
        hold(dv);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int j = warp_key + lane / 4 + h * 8;
            if (j >= t.n) continue;
            unsigned char *dk_row = find_key_rows(p, p.dk, t.kv_head, t.s.k_start + t.key, t.n).at(j);
            unsigned char *dv_row = find_key_rows(p, p.dv, t.kv_head, t.s.k_start + t.key, t.n).at(j);
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) {
                const int column = n * 8 + lane % 4 * 2;
                store_sums<T>(p, p.dk, dk_row, column, dk[n][h * 2] * p.scale, dk[n][h * 2 + 1] * p.scale);
                store_sums<T>(p, p.dv, dv_row, column, dv[n][h * 2], dv[n][h * 2 + 1]);
            }
        }
    }
#endif
}

template <typename T, int DIM, bool SHAPED>
__global__ void __launch_bounds__(query_cut<DIM>::THREADS, 1) hopper_query_gradient_kernel(const __grid_constant__ params p)
{
#if TP_HOPPER
    constexpr int ROWS = query_cut<DIM>::ROWS;
    extern __shared__ __align__(1024) unsigned char shared[];
    const backward_room<DIM, query_cut<DIM>> room(shared);
    const query_tile t = find_query_tile<ROWS>(p);
    const key_walk<STEP> walk(p, t.some_see);
    if (threadIdx.x < COPIERS) {
        give_registers<query_cut<DIM>::COPIER>();
        const copier<DIM> copy;
        room.copy(
            walk.n,
            [&]() {
                copy.template queries<ROWS>(p, room.owned[0], p.q, t.s, t.kv_head, t.first, t.end);
                copy.template queries<ROWS>(p, room.owned[1], p.dout, t.s, t.kv_head, t.first, t.end);
            },
            [&](int step) {
                const key_tile tile = find_key_tile(p, t, walk, step);
                copy.template keys<STEP>(p, room.passing_at(0, step), tile.prefix ? p.prefix_k : p.k, t.kv_head, tile.row,
                                         tile.n);
                copy.template keys<STEP>(p, room.passing_at(1, step), tile.prefix ? p.prefix_v : p.v, t.kv_head, tile.row,
                                         tile.n);
            });
    } else {
        take_registers<query_cut<DIM>::WORKER>();
        const int worker = threadIdx.x - COPIERS, lane = worker % 32, group_row = worker / 128 * 64,
                  warp_row = worker / 32 * 16;
        const float unit = p.unit * LOG2E;
        row_terms terms[2];
        span seen[2];
        int diagonal[2];
        float slope[2], dq[DIM / 8][4] = {}, s[STEP / 8][4], ds[STEP / 8][4];
        uint32_t weights[STEP / 16][4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = t.first + warp_row + lane / 4 + h * 8, at = min(row, t.end - 1), query = query_of(p, at);
            terms[h] = find_terms(p, t.s, t.kv_head, row, t.end);
            seen[h] = keys_seen(p, t.s, query);
            diagonal[h] = query + t.s.k_len - t.s.q_len;
            slope[h] = alibi_slope(p, t.kv_head, at);
        }
        room.template walk_ahead<1>(
            walk.n,
            [&](int step) {
                arrive();
                tile_multiply_nt<T, STEP, DIM, ROWS>(s, room.owned[0], group_row, room.passing_at(0, step));
                tile_multiply_nt<T, STEP, DIM, ROWS>(ds, room.owned[1], group_row, room.passing_at(1, step));
                commit();
            },
            [&](int step) {
                hold(s);
                if constexpr (!SHAPED) {
                    const key_tile tile = find_key_tile(p, t, walk, step);
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const span keys = tile_keys_seen(tile, seen[h]);
                        const int first = keys.first - lane % 4 * 2, end = keys.end - lane % 4 * 2;
                        if (!tile.all_seen) {
#pragma unroll
                            for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
                                for (int i = 0; i < 2; i++) {
                                    if (n * 8 + i < first || n * 8 + i >= end) s[n][h * 2 + i] = -INFINITY;
                                }
                            }
                        }
#pragma unroll
                        for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
                            for (int i = 0; i < 2; i++)
                                s[n][h * 2 + i] = quick_exp2(fmaf(s[n][h * 2 + i], unit, -terms[h].lse));
                        }
                    }
                }
            },
            [&](int step) {
                hold(ds);
                if constexpr (SHAPED) {
                    const key_tile tile = find_key_tile(p, t, walk, step);
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const span keys = tile_keys_seen(tile, seen[h]);
#pragma unroll
                        for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
                            for (int i = 0; i < 2; i++) {
                                const int j = n * 8 + lane % 4 * 2 + i;
                                finish(p, s[n][h * 2 + i], ds[n][h * 2 + i], terms[h], slope[h],
                                       tile.position + j - diagonal[h], j >= keys.first && j < keys.end);
                            }
                        }
                    }
                } else {
#pragma unroll
                    for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
                        for (int i = 0; i < 4; i++) ds[n][i] = s[n][i] * (ds[n][i] - terms[i / 2].delta);
                    }
                }
            },
            [&](int step) {
                hold(dq);
                arrive();
                tile_multiply_add<T, STEP, DIM>(dq, weights, room.passing_at(0, step));
                commit();
            },
            [&]() { pack<T>(weights, ds); });
        hold(dq);
        const query_rows to = {p, p.dq, t.s, t.kv_head, t.first, t.end};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            unsigned char *row = to.at(warp_row + lane / 4 + h * 8);
            if (row == nullptr) continue;
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) {
                const int column = n * 8 + lane % 4 * 2;
                store_pair<T>(row, column, p.head_dim - column, p.dq.aligned, dq[n][h * 2] * p.scale,
                              dq[n][h * 2 + 1] * p.scale);
            }
        }
    }
#endif
}

template <typename Kernel>
tp_status launch(tp_ctx *ctx, const char *name, Kernel kernel, const params *p, int threads, int bytes)
{
    TP_CUDA_ALLOW_SHARED(ctx, name, kernel, bytes);
    TP_CUDA_LAUNCH(ctx, name, kernel, (unsigned)(p->n_tiles * p->kv_heads * p->splits), threads, bytes, *p);
    return TP_OK;
}

} // namespace

bool tp_attention::hopper_takes(tp_ctx *ctx, const params *p)
{
    const rows *all[] = {&p->q, &p->k, &p->v, &p->prefix_k, &p->prefix_v, &p->dout};
    for (const rows *x : all) {
        if (x->data != nullptr && (x->f32 || !x->aligned)) return false;
    }
    if (tp_cuda_of(ctx)->capability != 90 || p->head_dim > 128) return false;
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, (hopper_forward_kernel<bf16, 64, false>)) == cudaSuccess &&
           attributes.ptxVersion >= 90;
}

int tp_attention::hopper_forward_rows(const params *p)
{
    return p->head_dim <= 64 ? (int)forward_cut<64>::ROWS : (int)forward_cut<128>::ROWS;
}

int tp_attention::hopper_key_rows(const params *p)
{
    return p->head_dim <= 64 ? (int)key_cut<64>::ROWS : (int)key_cut<128>::ROWS;
}

int tp_attention::hopper_query_rows(const params *p)
{
    return p->head_dim <= 64 ? (int)query_cut<64>::ROWS : (int)query_cut<128>::ROWS;
}

/* Runs the statements with the constants that a kernel is made for. */
#define TP_HOPPER_KERNEL(p, T, DIM, SHAPED, ...)                                                                               \
    TP_ATTENTION_TYPE(p, T, {                                                                                                  \
        if ((p)->head_dim <= 64) {                                                                                             \
            constexpr int DIM = 64;                                                                                            \
            TP_SHAPED(p, SHAPED, __VA_ARGS__)                                                                                  \
        } else {                                                                                                               \
            constexpr int DIM = 128;                                                                                           \
            TP_SHAPED(p, SHAPED, __VA_ARGS__)                                                                                  \
        }                                                                                                                      \
    })
#define TP_SHAPED(p, SHAPED, ...)                                                                                              \
    if ((p)->shaped) {                                                                                                         \
        constexpr bool SHAPED = true;                                                                                          \
        __VA_ARGS__                                                                                                            \
    } else {                                                                                                                   \
        constexpr bool SHAPED = false;                                                                                         \
        __VA_ARGS__                                                                                                            \
    }

tp_status tp_attention::hopper_forward(tp_ctx *ctx, const params *p)
{
    TP_HOPPER_KERNEL(p, T, DIM, SHAPED, {
        return launch(ctx, "attention", hopper_forward_kernel<T, DIM, SHAPED>, p, forward_cut<DIM>::THREADS,
                      forward_bytes<DIM>);
    });
}

tp_status tp_attention::hopper_key_gradient(tp_ctx *ctx, const params *p)
{
    TP_HOPPER_KERNEL(p, T, DIM, SHAPED, {
        return launch(ctx, "attention_backward", hopper_key_gradient_kernel<T, DIM, SHAPED>, p, key_cut<DIM>::THREADS,
                      backward_bytes<DIM, key_cut<DIM>::ROWS>);
    });
}

tp_status tp_attention::hopper_query_gradient(tp_ctx *ctx, const params *p)
{
    TP_HOPPER_KERNEL(p, T, DIM, SHAPED, {
        return launch(ctx, "attention_backward", hopper_query_gradient_kernel<T, DIM, SHAPED>, p, query_cut<DIM>::THREADS,
                      backward_bytes<DIM, query_cut<DIM>::ROWS>);
    });
}
