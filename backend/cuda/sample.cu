/* The next token, chosen where the logits are (inference/sampler.h says what the filters mean).
 *
 * Candidates stand in order of their logits, ties by id; a candidate's weight is a whole multiple of 2^-32 of the best one's,
 * so sums are exact in any order and equal those of the CPU. Every filter, and the draw, asks the same thing: which is the
 * first candidate in order up to which the weights (or their number) reach some amount? It is found digit by digit: the
 * distance from the best, then the bits of the logit, then those of the id; each time the weights are added up by digit, and
 * the digit is taken in which the amount is reached. After the first digit few candidates are left, and they are put into a
 * list. */
#include "backend/cuda/chain.cuh"

namespace
{

constexpr int BLOCKS = 64, THREADS = 256; /* of a row, while it is looked through */
constexpr int CHOOSERS = 1024;            /* threads that choose */
constexpr int DIGITS = 2048, LIST = 2048;
constexpr int PER_NAT = 32, FAR = 1023; /* the first digit: distance from the best in nats / PER_NAT */
constexpr double WEIGHT_ONE = 4294967296.0;

typedef unsigned long long u64;

struct best {
    float logit;
    int32_t id, nan; /* nan: the first token whose logit is none, or INT32_MAX */
};

struct params {
    tp_sample_args args;
    best *bests;  /* [n, BLOCKS] */
    u64 *weights; /* [n, vocab] */
};

__device__ __forceinline__ best better(best a, best b)
{
    const bool second = b.logit > a.logit || (b.logit == a.logit && b.id < a.id);
    const int32_t nan = min(a.nan, b.nan);
    best one = second ? b : a;
    one.nan = nan;
    return one;
}

__device__ __forceinline__ best warp_best(best x)
{
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        best other;
        other.logit = __shfl_xor_sync(0xffffffffu, x.logit, offset);
        other.id = __shfl_xor_sync(0xffffffffu, x.id, offset);
        other.nan = __shfl_xor_sync(0xffffffffu, x.nan, offset);
        x = better(x, other);
    }
    return x;
}

/* All threads of a block of up to 32 whole warps; every thread gets it. */
__device__ best block_best(best x, best *shared)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    x = warp_best(x);
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    x = warp_best(lane < n_warps ? shared[lane] : best{-INFINITY, INT32_MAX, INT32_MAX});
    __syncthreads();
    return x;
}

/* Of what the blocks of a row found. */
__device__ best row_best(const params &p, int row, best *shared)
{
    best x = {-INFINITY, INT32_MAX, INT32_MAX};
    if (threadIdx.x < BLOCKS) x = p.bests[row * BLOCKS + threadIdx.x];
    return block_best(x, shared);
}

/* ---- looking through the logits, many blocks a row ---- */

__global__ void __launch_bounds__(THREADS) survey_kernel(const __grid_constant__ params p)
{
    __shared__ best shared[32];
    tp_chain_begin();
    tp_chain_wait();
    const tp_sample_args &a = p.args;
    const int row = blockIdx.y, each = (int)((a.vocab + BLOCKS - 1) / BLOCKS), first = blockIdx.x * each;
    float *logits = a.logits + row * a.ld;
    best most = {-INFINITY, INT32_MAX, INT32_MAX};
    for (int i = first + (int)threadIdx.x; i < min((int)a.vocab, first + each); i += THREADS) {
        float x = logits[i];
        if (a.seen != nullptr && a.seen[row * a.vocab + i] != 0) {
            x = (float)(x > 0 ? x / a.repetition_penalty : x * a.repetition_penalty);
            logits[i] = x;
        }
        most = better(most, best{x, i, isnan(x) ? i : INT32_MAX});
    }
    most = block_best(most, shared);
    if (threadIdx.x == 0) p.bests[row * BLOCKS + blockIdx.x] = most;
}

__device__ __forceinline__ float scaled(float logit, double temperature)
{
    return (float)(logit / temperature);
}

__global__ void __launch_bounds__(THREADS) weigh_kernel(const __grid_constant__ params p)
{
    __shared__ best shared[32];
    tp_chain_begin();
    tp_chain_wait();
    const tp_sample_args &a = p.args;
    const int row = blockIdx.y;
    float *logits = a.logits + row * a.ld;
    const float most = scaled(row_best(p, row, shared).logit, a.temperature);
    if (!isfinite(most)) return;
    for (int i = blockIdx.x * THREADS + (int)threadIdx.x; i < a.vocab; i += (int)gridDim.x * THREADS) {
        const float x = scaled(logits[i], a.temperature);
        logits[i] = x;
        p.weights[row * a.vocab + i] = (u64)(exp((double)x - most) * WEIGHT_ONE + 0.5);
    }
}

/* ---- choosing, one block a row ---- */

/* Where a candidate stands: by key, then by id. */
struct place {
    uint32_t key;
    int32_t id;
};

/* Greater logits have lower keys. */
__device__ __forceinline__ uint32_t key_of(float logit)
{
    const uint32_t bits = __float_as_uint(logit == 0.0f ? 0.0f : logit); /* -0 equals 0 */
    return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}

struct chooser {
    const float *logits;
    const u64 *weights;
    int vocab;
    float most;
    place last; /* candidates behind it are out */
    u64 least;  /* so are lighter ones */
    int kept;   /* all that are not out are in room.kept, if this is not 0 */
};

__device__ __forceinline__ u64 weight_left(const chooser &c, int id, float logit, u64 weight)
{
    const uint32_t key = key_of(logit);
    return weight < c.least || key > c.last.key || (key == c.last.key && id > c.last.id) ? 0 : weight;
}

struct choosing_room {
    u64 sums[DIGITS], warps[32], before;
    int list[LIST], kept[LIST], listed, digit;
};

/* Digit `level` of a candidate, below DIGITS. */
__device__ __forceinline__ int digit_of(const chooser &c, int level, float logit, int id)
{
    const uint32_t key = key_of(logit);
    if (level == 0) {
        const float distance = (c.most - logit) * PER_NAT;
        return distance < FAR ? (int)distance : FAR;
    }
    if (level == 1) return (int)(key >> 21);
    if (level == 2) return (int)(key >> 10 & 2047u);
    if (level == 3) return (int)(key & 1023u);
    return level == 4 ? id >> 11 : id & 2047;
}

/* Calls body(id, logit, weight) for each of the n candidates of a list, or the first n; id -1 where a thread has none, for all
 * threads come along. A few at once, for they are far away. */
template <typename Body>
__device__ __forceinline__ void for_candidates(const chooser &c, const int *list, int n, bool weights, const Body &body)
{
    constexpr int ONCE = 4;
    for (int base = 0; base < n; base += ONCE * CHOOSERS) {
        int ids[ONCE];
        float logits[ONCE];
        u64 found[ONCE];
#pragma unroll
        for (int j = 0; j < ONCE; j++) {
            const int i = base + j * CHOOSERS + (int)threadIdx.x;
            ids[j] = i >= n ? -1 : list != nullptr ? list[i] : i;
        }
#pragma unroll
        for (int j = 0; j < ONCE; j++) {
            logits[j] = ids[j] >= 0 ? c.logits[ids[j]] : 0.0f;
            found[j] = weights && ids[j] >= 0 ? c.weights[ids[j]] : 0;
        }
#pragma unroll
        for (int j = 0; j < ONCE; j++) body(ids[j], logits[j], found[j]);
    }
}

__device__ __forceinline__ u64 warp_sum(u64 x)
{
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

__device__ u64 total_weight(const chooser &c, choosing_room &room)
{
    u64 sum = 0;
    const bool some = c.kept > 0;
    for_candidates(c, some ? room.kept : nullptr, some ? c.kept : c.vocab, true, [&](int id, float logit, u64 weight) {
        if (id >= 0) sum += weight_left(c, id, logit, weight);
    });
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) room.warps[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = warp_sum(room.warps[threadIdx.x % 32]);
    __syncthreads();
    return sum;
}

/* The digit in whose sum `wanted` (1 or more, at most all) is reached, and the sum of those before it. */
__device__ void find_digit(choosing_room &room, u64 wanted)
{
    const int t = threadIdx.x, lane = t % 32, warp = t / 32;
    const u64 a = room.sums[2 * t], b = room.sums[2 * t + 1];
    u64 upto = a + b;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const u64 other = __shfl_up_sync(0xffffffffu, upto, offset);
        if (lane >= offset) upto += other;
    }
    if (lane == 31) room.warps[warp] = upto;
    __syncthreads();
    for (int w = 0; w < warp; w++) upto += room.warps[w];
    const u64 before = upto - a - b;
    if (before < wanted && wanted <= before + a) room.digit = 2 * t, room.before = before;
    if (before + a < wanted && wanted <= upto) room.digit = 2 * t + 1, room.before = before + a;
    __syncthreads();
}

/* Ids of candidates for which `in` says so to a list, in any order: what is done with it does not depend on that. room.listed
 * says how many there are, of which a list holds LIST. */
template <typename In>
__device__ __forceinline__ void gather(const chooser &c, choosing_room &room, const int *from, int n, int *list, const In &in)
{
    if (threadIdx.x == 0) room.listed = 0;
    __syncthreads();
    for_candidates(c, from, n, false, [&](int id, float logit, u64) {
        if (id < 0 || !in(id, logit)) return;
        const int at = atomicAdd(&room.listed, 1);
        if (at < LIST) list[at] = id;
    });
    __syncthreads();
}

/* The first candidate in order up to which there are `wanted` candidates (counting) or the weight `wanted`. */
__device__ place select(const chooser &c, choosing_room &room, u64 wanted, bool counting)
{
    int digits[6] = {};
    const int *list = c.kept > 0 ? room.kept : nullptr;
    int n = c.kept > 0 ? c.kept : c.vocab;
    for (int level = 0; level < 6; level++) {
        for (int i = threadIdx.x; i < DIGITS; i += CHOOSERS) room.sums[i] = 0;
        __syncthreads();
        for_candidates(c, list, n, !counting, [&](int id, float logit, u64 weight) {
            bool in = id >= 0;
            for (int l = 0; l < level; l++) in = in && digit_of(c, l, logit, id) == digits[l];
            const u64 amount = !in ? 0 : counting ? 1 : weight_left(c, id, logit, weight);
            const int digit = in ? digit_of(c, level, logit, id) : -1;
            /* a warp that is all of one digit adds once: such crowds would queue for long */
            if (__all_sync(0xffffffffu, digit == __shfl_sync(0xffffffffu, digit, 0))) {
                const u64 sum = warp_sum(amount);
                if (threadIdx.x % 32 == 0 && sum > 0) atomicAdd(&room.sums[digit], sum);
            } else if (amount > 0) {
                atomicAdd(&room.sums[digit], amount);
            }
        });
        __syncthreads();
        find_digit(room, wanted);
        digits[level] = room.digit;
        wanted -= room.before;
        __syncthreads();
        if (level > 0) continue;
        gather(c, room, list, n, room.list, [&](int id, float logit) { return digit_of(c, 0, logit, id) == digits[0]; });
        if (room.listed <= LIST) list = room.list, n = room.listed;
    }
    __syncthreads();
    return {(uint32_t)digits[1] << 21 | (uint32_t)digits[2] << 10 | (uint32_t)digits[3], digits[4] << 11 | digits[5]};
}

/* From here on the candidates up to `last` are all there are. */
__device__ void keep(chooser &c, choosing_room &room, place last)
{
    c.last = last;
    if (c.kept > 0) return; /* few enough already */
    gather(c, room, nullptr, c.vocab, room.kept, [&](int, float logit) { return key_of(logit) <= last.key; });
    if (room.listed > 0 && room.listed <= LIST) c.kept = room.listed;
    __syncthreads();
}

__device__ float uniform_number(uint64_t seed, uint64_t index)
{
    const uint64_t block = index / 4;
    const uint32_t counter[4] = {(uint32_t)block, (uint32_t)(block >> 32), 0, 0};
    const uint32_t key[2] = {(uint32_t)seed ^ ((uint32_t)(seed >> 32) * 0x9E3779B9u), TP_STREAM_SAMPLE};
    uint32_t out[4];
    tp_philox4x32(counter, key, out);
    return tp_rng_to_uniform(out[index % 4]);
}

__device__ int32_t draw(const tp_sample_args &a, chooser c, choosing_room &room, uint64_t index)
{
    if (a.top_k > 0 && a.top_k < a.vocab) /* with those that tie */
        keep(c, room, place{select(c, room, (u64)a.top_k, true).key, INT32_MAX});
    if (a.top_p < 1) {
        const double enough = ceil(a.top_p * (double)total_weight(c, room));
        const place last = select(c, room, enough > 1 ? (u64)enough : 1, false);
        keep(c, room, last);
    }
    if (a.min_p > 0) c.least = (u64)ceil(a.min_p * WEIGHT_ONE);
    const double uniform = (double)uniform_number(a.seed, index);
    return select(c, room, (u64)(uniform * (double)total_weight(c, room)) + 1, false).id;
}

__global__ void __launch_bounds__(CHOOSERS) choose_kernel(const __grid_constant__ params p)
{
    __shared__ best shared[32];
    __shared__ choosing_room room;
    tp_chain_begin();
    tp_chain_wait();
    const tp_sample_args &a = p.args;
    const int row = blockIdx.x;
    const best most = row_best(p, row, shared);
    const int32_t count = a.counts[row], position = a.positions[row];
    int32_t token = most.id;
    if (most.nan != INT32_MAX) {
        token = 0;
    } else if (a.temperature > 0) {
        const float scale = scaled(most.logit, a.temperature);
        const chooser c = {
            a.logits + row * a.ld, p.weights + row * a.vocab, (int)a.vocab, scale, {0xffffffffu, INT32_MAX}, 0, 0};
        if (isfinite(scale)) token = draw(a, c, room, (uint64_t)count);
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (most.nan != INT32_MAX && a.bad[row] == 0) a.bad[row] = most.nan + 1;
    if (a.seen != nullptr) a.seen[row * a.vocab + token] = 1;
    a.ids[row] = token;
    a.history[count % a.history_length * a.n + row] = token;
    a.counts[row] = count + 1;
    a.positions[row] = position < a.position_limit ? position + 1 : position;
}

} // namespace

extern "C" tp_status tp_cuda_sample(tp_ctx *ctx, const void *arguments)
{
    const tp_sample_args *a = (const tp_sample_args *)arguments;
    if (a->n <= 0) return TP_OK;
    if (a->vocab < 1 || a->vocab > DIGITS * 2048)
        return tp_fail(ctx, TP_UNSUPPORTED, "sample: a vocabulary of %lld; cuda takes at most %d", (long long)a->vocab,
                       DIGITS * 2048);
    params p = {};
    p.args = *a;
    p.weights = (u64 *)a->scratch;
    p.bests = reinterpret_cast<best *>(p.weights + a->n * a->vocab);
    const dim3 grid(BLOCKS, (unsigned)a->n);
    static_assert(sizeof(best) * BLOCKS <= TP_SAMPLE_EXTRA * sizeof(u64), "bests fit behind the weights");
    TP_TRY(tp_chain_launch(ctx, "sample", survey_kernel, grid, THREADS, 0, true, p));
    if (a->temperature > 0) TP_TRY(tp_chain_launch(ctx, "sample", weigh_kernel, grid, THREADS, 0, true, p));
    return tp_chain_launch(ctx, "sample", choose_kernel, dim3((unsigned)a->n), CHOOSERS, 0, true, p);
}
