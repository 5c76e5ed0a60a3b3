/* Where a CUDA program's time goes: a table of its kernels and copies, without nsys.
 *
 *   gcc -shared -fPIC -O2 -I$CUDA/include -o kernel_times.so kernel_times.c -L$CUDA/lib64 -lcupti
 *   CUDA_INJECTION64_PATH=$PWD/kernel_times.so LD_LIBRARY_PATH=$CUDA/lib64 tapeft train ... 2>table.txt
 *
 * The driver loads the library into the program, and CUPTI tells it when each kernel began and ended. At the end stderr gets
 * one line for each name: share, milliseconds, calls; and before it the time between the first start and the last end, the time
 * in which something ran, and the number of gaps longer than 5 us. TAPEFT_KERNEL_TIMES_SKIP=N leaves out the first N records,
 * warm-up. */
#include <cupti.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BUFFER_BYTES ((size_t)8 << 20)
#define NAMES        4096 /* a power of two */
#define LONG_GAP_NS  5000

struct row {
    char *name;
    uint64_t ns, calls;
};

static struct row rows[NAMES];
static uint64_t first_start, last_end, busy_ns, long_gaps, gap_ns, records, skip;

static void count(const char *name, uint64_t start, uint64_t end)
{
    uint32_t hash = 2166136261u;
    if (records++ < skip) return;
    for (const char *c = name; *c != '\0'; c++) hash = (hash ^ (unsigned char)*c) * 16777619u;
    struct row *row = &rows[hash % NAMES];
    while (row->name != NULL && strcmp(row->name, name) != 0) row = row + 1 == rows + NAMES ? rows : row + 1;
    if (row->name == NULL) row->name = strdup(name);
    row->ns += end - start;
    row->calls++;
    if (first_start == 0) first_start = last_end = start;
    if (start > last_end + LONG_GAP_NS) {
        long_gaps++;
        gap_ns += start - last_end;
    }
    if (end > last_end) {
        busy_ns += end - (start > last_end ? start : last_end);
        last_end = end;
    }
}

static void CUPTIAPI give_buffer(uint8_t **buffer, size_t *size, size_t *most)
{
    *buffer = aligned_alloc(64, BUFFER_BYTES);
    *size = *buffer != NULL ? BUFFER_BYTES : 0;
    *most = 0;
}

static void CUPTIAPI take_buffer(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid)
{
    CUpti_Activity *r = NULL;
    char name[64];
    (void)context, (void)stream, (void)size;
    while (cuptiActivityGetNextRecord(buffer, valid, &r) == CUPTI_SUCCESS) {
        if (r->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
            const CUpti_ActivityKernel10 *k = (const CUpti_ActivityKernel10 *)(const void *)r;
            count(k->name, k->start, k->end);
        } else if (r->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
            const CUpti_ActivityMemcpy6 *m = (const CUpti_ActivityMemcpy6 *)(const void *)r;
            snprintf(name, sizeof name, "[copy %s]", m->copyKind == 1 ? "in" : m->copyKind == 2 ? "out" : "within");
            count(name, m->start, m->end);
        } else if (r->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
            const CUpti_ActivityMemset4 *m = (const CUpti_ActivityMemset4 *)(const void *)r;
            count("[set]", m->start, m->end);
        }
    }
    free(buffer);
}

static int by_time(const void *a, const void *b)
{
    const struct row *x = a, *y = b;
    return x->ns < y->ns ? 1 : x->ns > y->ns ? -1 : 0;
}

static void print_table(void)
{
    (void)cuptiActivityFlushAll(1);
    qsort(rows, NAMES, sizeof rows[0], by_time);
    fprintf(stderr, "kernel times: %.1f ms from first to last, %.1f ms busy, %llu gaps of more than 5 us, %.1f ms together\n",
            (double)(last_end - first_start) * 1e-6, (double)busy_ns * 1e-6, (unsigned long long)long_gaps,
            (double)gap_ns * 1e-6);
    for (int i = 0; i < NAMES && rows[i].name != NULL && rows[i].ns > 0; i++)
        fprintf(stderr, "%5.1f%% %10.2f ms %8llu x %8.1f us  %.300s\n", 100.0 * (double)rows[i].ns / (double)busy_ns,
                (double)rows[i].ns * 1e-6, (unsigned long long)rows[i].calls, (double)rows[i].ns * 1e-3 / (double)rows[i].calls,
                rows[i].name);
}

int InitializeInjection(void);
int InitializeInjection(void)
{
    const char *text = getenv("TAPEFT_KERNEL_TIMES_SKIP");
    skip = text != NULL ? strtoull(text, NULL, 10) : 0;
    if (cuptiActivityRegisterCallbacks(give_buffer, take_buffer) != CUPTI_SUCCESS) return 0;
    (void)cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
    (void)cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY);
    (void)cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET);
    return atexit(print_table) == 0;
}
