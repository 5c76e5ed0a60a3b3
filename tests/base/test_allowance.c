/* What a process may use: from trees of files as the kernel shows them in containers of both versions, and from its limits. */
#include "tests/support.h"

#include <sys/resource.h>
#include <sys/stat.h>

#include "base/allowance.h"
#include "base/mem.h"
#include "tests/scratch.h"

static void put(scratch *s, const char *path, const char *text)
{
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char *folder = tp_strdup(&ctx, scratch_path(s, path));
    assert_non_null(folder);
    *strrchr(folder, '/') = '\0';
    assert_ok(&ctx, tp_folder_make(&ctx, folder));
    assert_ok(&ctx, tp_file_write(&ctx, s->path, text, strlen(text)));
    tp_free(folder);
}

static uint64_t container_bytes(const scratch *s)
{
    tp_allowance a;
    tp_allowance_read(s->folder, &a);
    return a.container_bytes;
}

static void test_version_2(void **state)
{
    scratch s;
    (void)state;
    scratch_begin(&s);
    assert_true(container_bytes(&s) == TP_NO_LIMIT);
    put(&s, "proc/self/cgroup", "0::/user.slice/job 7\n");
    assert_true(container_bytes(&s) == TP_NO_LIMIT);
    put(&s, "sys/fs/cgroup/user.slice/job 7/memory.max", "max\n");
    assert_true(container_bytes(&s) == TP_NO_LIMIT);
    put(&s, "sys/fs/cgroup/user.slice/job 7/memory.max", "8589934592\n");
    assert_true(container_bytes(&s) == 8589934592u);
    put(&s, "sys/fs/cgroup/user.slice/memory.max", "9000000000\n"); /* one around it, wider */
    assert_true(container_bytes(&s) == 8589934592u);
    put(&s, "sys/fs/cgroup/user.slice/memory.max", "4294967296\n"); /* and narrower */
    assert_true(container_bytes(&s) == 4294967296u);
    put(&s, "sys/fs/cgroup/memory.max", "nonsense\n");
    assert_true(container_bytes(&s) == 4294967296u);
    scratch_end(&s);
}

/* A container sees the path that its host gave it, but its own folder at the top. */
static void test_version_1(void **state)
{
    scratch s;
    (void)state;
    scratch_begin(&s);
    put(&s, "proc/self/cgroup", "9:name=systemd:/docker/0a1b\n5:cpu,cpuacct:/docker/0a1b\n4:memory:/docker/0a1b\nbroken\n");
    put(&s, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    assert_true(container_bytes(&s) == TP_NO_LIMIT);
    put(&s, "sys/fs/cgroup/memory/memory.limit_in_bytes", "536870912\n");
    assert_true(container_bytes(&s) == 536870912u);
    scratch_end(&s);
}

static void test_resources(void **state)
{
    static const int kinds[] = {RLIMIT_AS, RLIMIT_FSIZE, RLIMIT_NOFILE};
    (void)state;
    for (int i = 0; i < 3; i++) {
        struct rlimit before, now;
        tp_allowance a;
        assert_int_equal(getrlimit(kinds[i], &before), 0);
        rlim_t value = i == 0 ? (rlim_t)1 << 47 : i == 1 ? 123456789 : 77;
        now = (struct rlimit){value, before.rlim_max};
        assert_int_equal(setrlimit(kinds[i], &now), 0);
        tp_allowance_read("", &a);
        assert_int_equal(setrlimit(kinds[i], &before), 0);
        assert_true((i == 0 ? a.address_bytes : i == 1 ? a.file_bytes : a.open_files) == value);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_version_2),
        cmocka_unit_test(test_version_1),
        cmocka_unit_test(test_resources),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
