/* Reading, mapping, writing and publishing files, with what can go wrong. */
#include "tests/support.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/file.h"
#include "base/io.h"
#include "base/json.h"
#include "base/mem.h"
#include "tests/failing_memory.h"
#include "tests/scratch.h"

/* ---- helpers ---- */

static void put(const char *path, const char *text)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, strlen(text), f), strlen(text));
    assert_int_equal(fclose(f), 0);
}

static void assert_content(const char *path, const char *text)
{
    tp_ctx ctx;
    char *bytes;
    size_t n;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_file_read(&ctx, path, 1 << 20, &bytes, &n));
    assert_int_equal(n, strlen(text));
    assert_string_equal(bytes, text);
    tp_free(bytes);
}

static int entries_in(const char *folder)
{
    DIR *dir = opendir(folder);
    int n = 0;
    assert_non_null(dir);
    for (struct dirent *e; (e = readdir(dir)) != NULL;) n += strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
    closedir(dir);
    return n;
}

/* ---- reading ---- */

static void whole_files_are_read(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char *bytes;
    size_t n;
    put(scratch_path(&s, "f"), "12345");
    for (size_t most = 4; most <= 6; most++) {
        if (most < 5) {
            assert_status(&ctx, TP_FORMAT, tp_file_read(&ctx, s.path, most, &bytes, &n));
            assert_null(bytes);
            continue;
        }
        assert_ok(&ctx, tp_file_read(&ctx, s.path, most, &bytes, &n));
        assert_int_equal(n, 5);
        assert_memory_equal(bytes, "12345", 6);
        tp_free(bytes);
    }
    put(scratch_path(&s, "empty"), "");
    assert_ok(&ctx, tp_file_read(&ctx, s.path, 0, &bytes, &n));
    assert_int_equal(n, 0);
    assert_string_equal(bytes, "");
    tp_free(bytes);
    assert_ok(&ctx, tp_file_read(&ctx, "/proc/self/status", 1 << 20, &bytes, &n)); /* says it has 0 bytes */
    assert_true(n > 100 && strlen(bytes) == n);
    tp_free(bytes);
    assert_status(&ctx, TP_FORMAT, tp_file_read(&ctx, "/proc/self/status", 100, &bytes, &n));
    assert_survives_failing_memory(
        &ctx, tp_file_read(&ctx, scratch_path(&s, "f"), 10, &bytes, &n) == TP_OK ? (tp_free(bytes), TP_OK) : ctx.status);
    scratch_end(&s);
}

/* D11: none of these may block or be read. */
static void only_regular_files_are_opened(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char *bytes;
    size_t n;
    tp_file *file;
    char hex[65];
    assert_int_equal(mkfifo(scratch_path(&s, "fifo"), 0600), 0);
    assert_int_equal(mkdir(scratch_path(&s, "folder"), 0700), 0);
    assert_int_equal(symlink("loop", scratch_path(&s, "loop")), 0);
    assert_int_equal(symlink("nowhere", scratch_path(&s, "dangling")), 0);
    assert_int_equal(symlink("fifo", scratch_path(&s, "to_fifo")), 0);
    int socket_fd = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int length = snprintf(address.sun_path, sizeof address.sun_path, "%s", scratch_path(&s, "socket"));
    bool have_socket =
        length < (int)sizeof address.sun_path && bind(socket_fd, (struct sockaddr *)&address, sizeof address) == 0;
    const struct {
        const char *path;
        tp_status status;
    } cases[] = {{"fifo", TP_FORMAT},    {"folder", TP_FORMAT},
                 {"to_fifo", TP_FORMAT}, {"socket", have_socket ? TP_FORMAT : TP_IO_READ},
                 {"loop", TP_IO_READ},   {"dangling", TP_IO_READ},
                 {"absent", TP_IO_READ}, {"absent/deeper", TP_IO_READ}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        scratch_path(&s, cases[i].path);
        assert_status(&ctx, cases[i].status, tp_file_read(&ctx, s.path, 100, &bytes, &n));
        assert_status(&ctx, cases[i].status, tp_file_open(&ctx, s.path, &file));
        assert_status(&ctx, cases[i].status, tp_sha256_file(&ctx, s.path, hex));
        assert_null(file);
    }
    assert_status(&ctx, TP_FORMAT, tp_file_read(&ctx, "/dev/zero", 100, &bytes, &n));
    assert_int_equal(tp_file_open(&ctx, scratch_path(&s, "fifo"), &file), TP_FORMAT);
    assert_non_null(strstr(ctx.message, "expected a regular file, found a FIFO"));
    assert_true(tp_path_exists(scratch_path(&s, "folder")) && tp_path_is_folder(s.path));
    assert_true(tp_path_exists(scratch_path(&s, "fifo")) && !tp_path_is_folder(s.path));
    assert_false(tp_path_exists(scratch_path(&s, "dangling")));
    close(socket_fd);
    scratch_end(&s);
}

/* S15: names from an index stay beneath the model's folder. */
static void names_stay_beneath_their_folder(void **state)
{
    (void)state;
    static const char hash[] = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char model[1024], blob[128], target[2048], *path;
    assert_ok(&ctx, tp_folder_make(&ctx, scratch_path(&s, "repo/snapshots/rev")));
    snprintf(model, sizeof model, "%s", s.path);
    assert_ok(&ctx, tp_folder_make(&ctx, scratch_path(&s, "repo/blobs")));
    assert_ok(&ctx, tp_folder_make(&ctx, scratch_path(&s, "repo/other")));
    put(scratch_path(&s, "secret"), "secret");
    put(scratch_path(&s, "repo/snapshots/rev/plain"), "p");
    snprintf(blob, sizeof blob, "repo/blobs/%s", hash);
    put(scratch_path(&s, blob), "b");
    snprintf(blob, sizeof blob, "repo/other/%s", hash);
    put(scratch_path(&s, blob), "o");
    snprintf(blob, sizeof blob, "repo/blobs/%.40s", hash); /* a blob that is itself a link to somewhere else */
    assert_int_equal(symlink("../../secret", scratch_path(&s, blob)), 0);

    const struct {
        const char *name, *link; /* link NULL: nothing is made; else a symbolic link to it */
        tp_status status;
    } cases[] = {
        {"plain", NULL, TP_OK},
        {"inside", "plain", TP_OK},
        {"inside_too", "../rev/plain", TP_OK},
        {"cached", "../../blobs/0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", TP_OK},
        {"cached_chain", "../../blobs/0123456789abcdef0123456789abcdef01234567", TP_FORMAT},
        {"other", "../../other/0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", TP_FORMAT},
        {"not_a_hash", "../../blobs/../../secret", TP_FORMAT},
        {"out", "../../../secret", TP_FORMAT},
        {"out_absolute", "/etc/passwd", TP_FORMAT},
        {"prefix", "../rev2/x", TP_IO_READ},
        {"dangling", "nothing", TP_IO_READ},
        {"folder", "../rev", TP_FORMAT},
        {"absent", NULL, TP_IO_READ},
        {"", NULL, TP_FORMAT},
        {".", NULL, TP_FORMAT},
        {"..", NULL, TP_FORMAT},
        {"../rev/plain", NULL, TP_FORMAT},
        {"/etc/passwd", NULL, TP_FORMAT},
        {"a/b", NULL, TP_FORMAT},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        snprintf(target, sizeof target, "%s/%s", model, cases[i].name);
        if (cases[i].link != NULL) assert_int_equal(symlink(cases[i].link, target), 0);
        tp_status status = tp_path_beneath(&ctx, model, cases[i].name, &path);
        if (status != cases[i].status) fail_msg("%s: %s: %s", cases[i].name, tp_status_name(status), ctx.message);
        if (status == TP_OK)
            assert_string_equal(path, target);
        else
            assert_null(path);
        tp_free(path);
        tp_ctx_clear(&ctx);
    }
    /* rev2 is not beneath rev, though its name begins so */
    assert_ok(&ctx, tp_folder_make(&ctx, scratch_path(&s, "repo/snapshots/rev2")));
    put(scratch_path(&s, "repo/snapshots/rev2/x"), "x");
    assert_status(&ctx, TP_FORMAT, tp_path_beneath(&ctx, model, "prefix", &path));
    assert_status(&ctx, TP_IO_READ, tp_path_beneath(&ctx, scratch_path(&s, "no_such_folder"), "x", &path));

    path = tp_path_join(&ctx, "a/", "b");
    assert_string_equal(path, "a/b");
    tp_free(path);
    path = tp_path_join(&ctx, "a", "b");
    assert_string_equal(path, "a/b");
    tp_free(path);
    path = tp_path_join(&ctx, "", "b");
    assert_string_equal(path, "b");
    tp_free(path);
    scratch_end(&s);
}

static void offsets_are_checked(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_file *file;
    char bytes[8] = "";
    put(scratch_path(&s, "f"), "0123456789");
    assert_ok(&ctx, tp_file_open(&ctx, s.path, &file));
    assert_string_equal(tp_file_path(file), s.path);
    assert_int_equal(tp_file_size(file), 10);
    assert_ok(&ctx, tp_file_pread(&ctx, file, 7, bytes, 3));
    assert_memory_equal(bytes, "789", 3);
    assert_ok(&ctx, tp_file_pread(&ctx, file, 10, bytes, 0));
    assert_status(&ctx, TP_IO_READ, tp_file_pread(&ctx, file, 8, bytes, 3));
    assert_status(&ctx, TP_IO_READ, tp_file_pread(&ctx, file, 11, bytes, 0));
    assert_status(&ctx, TP_IO_READ, tp_file_pread(&ctx, file, UINT64_MAX, bytes, 2));
    assert_memory_equal(tp_file_map(file), "0123456789", 10);
    assert_ptr_equal(tp_file_map(file), tp_file_map(file));
    assert_ok(&ctx, tp_file_check(&ctx, file));
    tp_file_close(file);
    tp_file_close(NULL);
    setenv("TAPEFT_NO_MMAP", "1", 1);
    assert_ok(&ctx, tp_file_open(&ctx, s.path, &file));
    assert_null(tp_file_map(file));
    assert_ok(&ctx, tp_file_pread(&ctx, file, 0, bytes, 8));
    tp_file_close(file);
    unsetenv("TAPEFT_NO_MMAP");
    put(scratch_path(&s, "empty"), "");
    assert_ok(&ctx, tp_file_open(&ctx, s.path, &file));
    assert_null(tp_file_map(file));
    tp_file_close(file);
    scratch_end(&s);
}

/* S14: a file that is cut or written to while in use is noticed, and touching what vanished is harmless. */
static void files_that_change_are_noticed(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_file *file;
    char byte;
    long page = sysconf(_SC_PAGESIZE);
    char *text = malloc((size_t)page * 4 + 1);
    memset(text, 'x', (size_t)page * 4);
    text[page * 4] = '\0';
    assert_ok(&ctx, tp_map_guard_install(&ctx));
    assert_ok(&ctx, tp_map_guard_install(&ctx));

    put(scratch_path(&s, "cut"), text);
    assert_ok(&ctx, tp_file_open(&ctx, s.path, &file));
    const volatile char *map = tp_file_map(file);
    assert_int_equal(map[page * 3], 'x');
    assert_int_equal(truncate(s.path, page), 0);
    assert_int_equal(map[page * 3 + 5], 0);
    assert_int_equal(map[page * 2], 0);
    assert_int_equal(map[5], 'x');
    assert_int_equal(truncate(s.path, page * 4), 0); /* the size is right again, but not the content */
    assert_status(&ctx, TP_IO_READ, tp_file_check(&ctx, file));
    assert_status(&ctx, TP_IO_READ, tp_file_check(&ctx, file));
    assert_int_equal(truncate(s.path, page), 0);
    assert_status(&ctx, TP_IO_READ, tp_file_check(&ctx, file));
    assert_status(&ctx, TP_IO_READ, tp_file_pread(&ctx, file, (uint64_t)page * 2, &byte, 1));
    tp_file_close(file);

    put(scratch_path(&s, "written"), text);
    assert_ok(&ctx, tp_file_open(&ctx, s.path, &file));
    assert_ok(&ctx, tp_file_check(&ctx, file));
    const struct timespec times[2] = {{.tv_sec = 1},
                                      {.tv_sec = 1}}; /* what a write does, without waiting for the clock to tick */
    assert_int_equal(utimensat(AT_FDCWD, s.path, times, 0), 0);
    assert_status(&ctx, TP_IO_READ, tp_file_check(&ctx, file));
    tp_file_close(file);

    put(scratch_path(&s, "replaced"), text);
    assert_ok(&ctx, tp_file_open(&ctx, s.path, &file));
    assert_ok(&ctx, tp_file_write(&ctx, s.path, "new", 3)); /* another file under the name: ours lives on */
    map = tp_file_map(file);
    assert_int_equal(map[page * 3], 'x');
    assert_ok(&ctx, tp_file_check(&ctx, file));
    tp_file_close(file);
    free(text);
    scratch_end(&s);
}

/* A SIGBUS outside of our mappings, and one that was sent, end the process as they would without a handler. */
static void foreign_faults_are_not_swallowed(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    put(scratch_path(&s, "f"), "x");
    for (int sent = 0; sent < 2; sent++) {
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
            if (tp_map_guard_install(NULL) != TP_OK) _exit(1);
            if (sent == 1) {
                raise(SIGBUS);
                _exit(2);
            }
            int fd = open(s.path, O_RDWR);
            volatile char *map = mmap(NULL, 1, PROT_READ, MAP_SHARED, fd, 0);
            if (ftruncate(fd, 0) != 0) _exit(3);
            _exit(map[0] == 0 ? 4 : 5);
        }
        int status;
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFSIGNALED(status));
        assert_int_equal(WTERMSIG(status), SIGBUS);
    }
    scratch_end(&s);
}

static void guards_run_out_without_harm(void **state)
{
    (void)state;
    enum { N = 1100 }; /* the table has 1024 places */
    static tp_file *files[N];
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    put(scratch_path(&s, "f"), "0123456789");
    const struct rlimit many = {N + 100, N + 100};
    struct rlimit before;
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    if (before.rlim_cur < many.rlim_cur)
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &(struct rlimit){many.rlim_cur, before.rlim_max}), 0);
    int mapped = 0;
    for (int i = 0; i < N; i++) {
        char byte;
        assert_ok(&ctx, tp_file_open(&ctx, s.path, &files[i]));
        mapped += tp_file_map(files[i]) != NULL;
        assert_ok(&ctx, tp_file_pread(&ctx, files[i], 3, &byte, 1));
        assert_int_equal(byte, '3');
    }
    assert_int_equal(mapped, 1024);
    for (int i = 0; i < N; i++) tp_file_close(files[i]);
    assert_ok(&ctx, tp_file_open(&ctx, s.path, &files[0]));
    assert_non_null(tp_file_map(files[0]));
    tp_file_close(files[0]);
    scratch_end(&s);
}

/* ---- writing ---- */

static void files_appear_when_complete(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_writer *writer;
    char folder[512];
    snprintf(folder, sizeof folder, "%s", s.folder);
    put(scratch_path(&s, "f"), "old");
    assert_ok(&ctx, tp_writer_open(&ctx, s.path, &writer));
    assert_ok(&ctx, tp_writer_write(&ctx, writer, "new", 3));
    assert_content(s.path, "old");
    assert_int_equal(entries_in(folder), 2);
    tp_writer_discard(writer);
    tp_writer_discard(NULL);
    assert_content(s.path, "old");
    assert_int_equal(entries_in(folder), 1);
    assert_ok(&ctx, tp_writer_open(&ctx, s.path, &writer));
    assert_ok(&ctx, tp_writer_write(&ctx, writer, "", 0));
    assert_ok(&ctx, tp_writer_write(&ctx, writer, "new ", 4));
    assert_ok(&ctx, tp_writer_write(&ctx, writer, "text", 4));
    assert_ok(&ctx, tp_writer_finish(&ctx, writer));
    assert_content(s.path, "new text");
    assert_int_equal(entries_in(folder), 1);
    assert_ok(&ctx, tp_file_write(&ctx, s.path, NULL, 0));
    assert_content(s.path, "");

    /* Pieces of every size around the buffer's arrive in order. */
    tp_buf all;
    tp_buf_init(&all, 0);
    assert_ok(&ctx, tp_writer_open(&ctx, scratch_path(&s, "big"), &writer));
    static char piece[200000];
    for (size_t n = 1; n < sizeof piece; n = n * 3 / 2 + 7) {
        memset(piece, 'a' + (int)(n % 26), n);
        tp_buf_append(&all, piece, n);
        assert_ok(&ctx, tp_writer_write(&ctx, writer, piece, n));
    }
    assert_ok(&ctx, tp_writer_finish(&ctx, writer));
    assert_content(s.path, all.data);
    tp_buf_free(&all);

    assert_int_equal(mkdir(scratch_path(&s, "folder"), 0700), 0);
    assert_status(&ctx, TP_IO_WRITE, tp_file_write(&ctx, s.path, "x", 1));
    assert_status(&ctx, TP_IO_WRITE, tp_file_write(&ctx, "/dev/full", "x", 1));
    assert_status(&ctx, TP_IO_WRITE, tp_file_write(&ctx, scratch_path(&s, "absent/f"), "x", 1));
    assert_survives_failing_memory(&ctx, tp_file_write(&ctx, scratch_path(&s, "f"), "12", 2));
    assert_content(s.path, "12");
    assert_int_equal(entries_in(folder), 3);
    scratch_end(&s);
}

/* M5, M7: the file-size limit stands in for a full disk; both fail the write. */
static void a_full_disk_leaves_what_was_there(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    static char large[300000];
    memset(large, 'l', sizeof large);
    put(scratch_path(&s, "f"), "old");
    assert_int_equal(mkdir(scratch_path(&s, "ckpt"), 0700), 0);
    put(scratch_path(&s, "ckpt/a"), "old");
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit before;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &(struct rlimit){100000, before.rlim_max}), 0);
    tp_writer *writer;
    assert_ok(&ctx, tp_writer_open(&ctx, scratch_path(&s, "f"), &writer));
    tp_status status = TP_OK;
    for (int i = 0; i < 100 && status == TP_OK; i++) status = tp_writer_write(&ctx, writer, large, 3000);
    assert_int_equal(status, TP_IO_WRITE);
    tp_ctx_clear(&ctx);
    assert_status(&ctx, TP_IO_WRITE, tp_writer_write(&ctx, writer, large, 1)); /* stays failed */
    assert_status(&ctx, TP_IO_WRITE, tp_writer_finish(&ctx, writer));
    assert_status(&ctx, TP_IO_WRITE, tp_file_write(&ctx, s.path, large, sizeof large));
    tp_publish *publish;
    assert_ok(&ctx, tp_publish_begin(&ctx, scratch_path(&s, "ckpt"), &publish));
    assert_ok(&ctx, tp_publish_add(&ctx, publish, "a", "new", 3));
    assert_status(&ctx, TP_IO_WRITE, tp_publish_add(&ctx, publish, "b", large, sizeof large));
    tp_publish_discard(publish);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    signal(SIGXFSZ, SIG_DFL);
    assert_content(scratch_path(&s, "f"), "old");
    assert_content(scratch_path(&s, "ckpt/a"), "old");
    assert_int_equal(entries_in(s.folder), 2);
    scratch_end(&s);
}

static void folders_are_made_and_removed(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    assert_ok(&ctx, tp_folder_make(&ctx, scratch_path(&s, "a/b//c/")));
    assert_ok(&ctx, tp_folder_make(&ctx, scratch_path(&s, "a/b/c")));
    assert_true(tp_path_is_folder(s.path));
    put(scratch_path(&s, "a/b/c/f"), "x");
    assert_status(&ctx, TP_IO_WRITE, tp_folder_make(&ctx, s.path));
    assert_status(&ctx, TP_IO_WRITE, tp_folder_make(&ctx, scratch_path(&s, "a/b/c/f/g")));
    /* Links inside are removed, what they point to is not. */
    assert_ok(&ctx, tp_folder_make(&ctx, scratch_path(&s, "kept")));
    put(scratch_path(&s, "kept/f"), "kept");
    assert_int_equal(symlink("../../kept", scratch_path(&s, "a/b/link")), 0);
    for (int i = 0; i < 50; i++) {
        char name[32];
        snprintf(name, sizeof name, "a/many%d/deep/er", i);
        assert_ok(&ctx, tp_folder_make(&ctx, scratch_path(&s, name)));
    }
    assert_ok(&ctx, tp_folder_remove(&ctx, scratch_path(&s, "a")));
    assert_false(tp_path_exists(s.path));
    assert_ok(&ctx, tp_folder_remove(&ctx, s.path)); /* nothing there: done already */
    assert_content(scratch_path(&s, "kept/f"), "kept");
    assert_int_equal(symlink("kept", scratch_path(&s, "link")), 0);
    assert_ok(&ctx, tp_folder_remove(&ctx, s.path));
    assert_content(scratch_path(&s, "kept/f"), "kept");
    /* Deeper than anything we write: refused with the descriptors closed, not followed without end. */
    tp_buf deep;
    tp_buf_init(&deep, 0);
    tp_buf_text(&deep, scratch_path(&s, "deep"));
    for (int i = 0; i < 70; i++) tp_buf_text(&deep, "/d");
    assert_ok(&ctx, tp_folder_make(&ctx, deep.data));
    assert_status(&ctx, TP_IO_WRITE, tp_folder_remove(&ctx, scratch_path(&s, "deep")));
    while (deep.len > strlen(s.path)) {
        assert_int_equal(rmdir(deep.data), 0);
        deep.data[deep.len -= 2] = '\0';
    }
    tp_buf_free(&deep);
    scratch_end(&s);
}

/* FIPS 180-2 examples. */
static void sha256_is_the_standard_one(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char *million = malloc(1000001);
    memset(million, 'a', 1000000);
    million[1000000] = '\0';
    const struct {
        const char *text, *hex;
    } cases[] = {{"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
                 {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
                 {million, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char hex[65];
        put(scratch_path(&s, "f"), cases[i].text);
        assert_ok(&ctx, tp_sha256_file(&ctx, s.path, hex));
        assert_string_equal(hex, cases[i].hex);
        tp_sha256_hex(cases[i].text, strlen(cases[i].text), hex);
        assert_string_equal(hex, cases[i].hex);
    }
    free(million);
    scratch_end(&s);
}

/* ---- publishing ---- */

static tp_status publish_two(tp_ctx *ctx, const char *path, const char *content, bool replace)
{
    tp_publish *p;
    TP_TRY(tp_publish_begin(ctx, path, &p));
    tp_status status = tp_publish_add(ctx, p, "a.txt", content, strlen(content));
    char *other = status == TP_OK ? tp_path_join(ctx, tp_publish_staging(p), "b.bin") : NULL;
    if (status == TP_OK) status = other != NULL ? tp_file_write(ctx, other, "written elsewhere", 17) : TP_NOMEM;
    if (status == TP_OK) status = tp_publish_adopt(ctx, p, "b.bin");
    tp_free(other);
    if (status == TP_OK) return tp_publish_commit(ctx, p, "{\"step\": 7, \"name\": \"\\u00e4\"}", replace);
    tp_publish_discard(p);
    return status;
}

static void folders_appear_when_complete(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char *manifest;
    assert_ok(&ctx, publish_two(&ctx, scratch_path(&s, "ckpt-7/"), "first", false));
    assert_content(scratch_path(&s, "ckpt-7/a.txt"), "first");
    assert_content(scratch_path(&s, "ckpt-7/b.bin"), "written elsewhere");
    assert_ok(&ctx, tp_publish_verify(&ctx, scratch_path(&s, "ckpt-7"), &manifest));
    /* sha256sum of "first" and "written elsewhere" */
    assert_string_equal(
        manifest,
        "{\n  \"step\": 7,\n  \"name\": \"\xc3\xa4\",\n  \"files\": {\n"
        "    \"a.txt\": {\"bytes\": 5, \"sha256\": \"a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e\"},\n"
        "    \"b.bin\": {\"bytes\": 17, \"sha256\": \"c2af69ca9f0fe51cc5a68f17496cc7768c2b2fa56e3bddd51f9370420537fcd7\"}\n  "
        "}\n}\n");
    tp_free(manifest);

    assert_status(&ctx, TP_INVALID, publish_two(&ctx, s.path, "second", false));
    assert_content(scratch_path(&s, "ckpt-7/a.txt"), "first");
    assert_ok(&ctx, publish_two(&ctx, scratch_path(&s, "ckpt-7"), "third", true));
    assert_content(scratch_path(&s, "ckpt-7/a.txt"), "third");
    assert_ok(&ctx, tp_publish_verify(&ctx, scratch_path(&s, "ckpt-7"), NULL));
    assert_ok(&ctx, publish_two(&ctx, scratch_path(&s, "fresh"), "x", true)); /* nothing to replace */
    put(scratch_path(&s, "file"), "a file");
    assert_status(&ctx, TP_INVALID, publish_two(&ctx, s.path, "x", false));
    assert_status(&ctx, TP_INVALID, publish_two(&ctx, s.path, "x", true));
    assert_content(s.path, "a file");
    assert_status(&ctx, TP_IO_WRITE, publish_two(&ctx, scratch_path(&s, "absent/ckpt"), "x", false));
    assert_int_equal(entries_in(s.folder), 3);

    tp_publish *p;
    assert_ok(&ctx, tp_publish_begin(&ctx, scratch_path(&s, "plain"), &p));
    assert_ok(&ctx, tp_publish_add(&ctx, p, "a", "1", 1));
    assert_ok(&ctx, tp_publish_commit(&ctx, p, NULL, false)); /* without manifest */
    assert_false(tp_path_exists(scratch_path(&s, "plain/manifest.json")));
    assert_status(&ctx, TP_CHECKPOINT, tp_publish_verify(&ctx, scratch_path(&s, "plain"), NULL));
    scratch_end(&s);
}

static void wrong_use_is_refused_and_cleaned_up(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    tp_publish *p;
    static const char *const names[] = {"", ".", "..", "a/b", "/a", "manifest.json", "twice"};
    assert_ok(&ctx, tp_publish_begin(&ctx, scratch_path(&s, "x"), &p));
    assert_ok(&ctx, tp_publish_add(&ctx, p, "twice", "1", 1));
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        assert_status(&ctx, TP_INTERNAL, tp_publish_add(&ctx, p, names[i], "1", 1));
        assert_status(&ctx, TP_INTERNAL, tp_publish_adopt(&ctx, p, names[i]));
    }
    assert_status(&ctx, TP_IO_READ, tp_publish_adopt(&ctx, p, "absent"));
    tp_publish_discard(p);
    tp_publish_discard(NULL);
    static const char *const manifests[] = {"[]", "{\"files\":1}"};
    for (size_t i = 0; i < sizeof manifests / sizeof manifests[0]; i++) {
        assert_ok(&ctx, tp_publish_begin(&ctx, scratch_path(&s, "x"), &p));
        assert_status(&ctx, TP_INTERNAL, tp_publish_commit(&ctx, p, manifests[i], false));
    }
    for (int kind = 0; kind < 2; kind++) { /* a file that was never added; one that changed after it was added (K14) */
        char path[2048];
        assert_ok(&ctx, tp_publish_begin(&ctx, scratch_path(&s, "x"), &p));
        assert_ok(&ctx, tp_publish_add(&ctx, p, "a", "1", 1));
        snprintf(path, sizeof path, "%s/%s", tp_publish_staging(p), kind == 0 ? "b" : "a");
        put(path, "2");
        assert_status(&ctx, kind == 0 ? TP_INTERNAL : TP_CHECKPOINT, tp_publish_commit(&ctx, p, "{}", false));
    }
    assert_int_equal(entries_in(s.folder), 0);
    scratch_end(&s);
}

/* K4: every flipped bit, cut and exchange is noticed, in the files and where it matters in the manifest. */
static void damage_is_noticed(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char folder[1024], *manifest = NULL;
    snprintf(folder, sizeof folder, "%s", scratch_path(&s, "ckpt"));
    static const char *const files[] = {"a.txt", "b.bin"};
    for (int f = 0; f < 2; f++) {
        char path[2048];
        snprintf(path, sizeof path, "%s/%s", folder, files[f]);
        for (int damage = 0; damage < 5; damage++) {
            assert_ok(&ctx, publish_two(&ctx, folder, "content", true));
            int fd = open(path, O_RDWR);
            char byte;
            assert_int_equal(pread(fd, &byte, 1, 3), 1);
            byte ^= 4;
            if (damage == 0) assert_int_equal(pwrite(fd, &byte, 1, 3), 1);
            if (damage == 1) assert_int_equal(ftruncate(fd, 4), 0);
            if (damage == 2) assert_int_equal(pwrite(fd, &byte, 1, 100), 1);
            if (damage == 3) assert_int_equal(unlink(path), 0);
            if (damage == 4) assert_int_equal(unlink(path) + mkdir(path, 0700), 0);
            close(fd);
            assert_status(&ctx, TP_CHECKPOINT, tp_publish_verify(&ctx, folder, &manifest));
            assert_null(manifest);
        }
    }
    static const char *const manifests[] = {"",
                                            "{",
                                            "[]",
                                            "{}",
                                            "{\"files\": []}",
                                            "{\"files\": {\"a.txt\": 1}}",
                                            "{\"files\": {\"a.txt\": {\"bytes\": 7}}}",
                                            "{\"files\": {\"../x\": {\"bytes\": 7, \"sha256\": \"\"}}}",
                                            "{\"files\": {\"a.txt\": {\"bytes\": 7, \"sha256\": \"\"}}}",
                                            "{\"files\": {\"a.txt\": {\"bytes\": -7, \"sha256\": \"\"}}}",
                                            "{\"files\": {\"\\u0000\": {\"bytes\": 7, \"sha256\": \"\"}}}"};
    assert_ok(&ctx, publish_two(&ctx, folder, "content", true));
    for (size_t i = 0; i < sizeof manifests / sizeof manifests[0]; i++) {
        put(scratch_path(&s, "ckpt/manifest.json"), manifests[i]);
        assert_int_equal(tp_publish_verify(&ctx, folder, NULL), TP_CHECKPOINT);
        assert_int_equal(ctx.status, TP_CHECKPOINT);
        tp_ctx_clear(&ctx);
    }
    assert_int_equal(unlink(s.path), 0);
    assert_status(&ctx, TP_CHECKPOINT, tp_publish_verify(&ctx, folder, NULL));
    assert_status(&ctx, TP_CHECKPOINT, tp_publish_verify(&ctx, scratch_path(&s, "absent"), NULL));
    scratch_end(&s);
}

/* K1, K15: a process killed in the middle leaves the old folder and something for the sweep. */
static void killed_saves_leave_only_staging(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char path[1024];
    assert_ok(&ctx, publish_two(&ctx, scratch_path(&s, "ckpt"), "old", false));
    snprintf(path, sizeof path, "%s", s.path);
    for (int stage = 0; stage < 3; stage++) {
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            tp_publish *p;
            tp_writer *w;
            if (stage == 0 && tp_writer_open(NULL, scratch_path(&s, "ckpt.log"), &w) != TP_OK) _exit(1);
            if (stage > 0 && tp_publish_begin(NULL, path, &p) != TP_OK) _exit(1);
            if (stage > 1 && tp_publish_add(NULL, p, "a.txt", "new", 3) != TP_OK) _exit(1);
            kill(getpid(), SIGKILL);
        }
        int status;
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        assert_int_equal(entries_in(s.folder), 2);
        assert_ok(&ctx, tp_publish_verify(&ctx, path, NULL));
        assert_content(scratch_path(&s, "ckpt/a.txt"), "old");
        assert_ok(&ctx, tp_publish_sweep(&ctx, s.folder, "other-"));
        assert_int_equal(entries_in(s.folder), 2);
        assert_ok(&ctx, tp_publish_sweep(&ctx, s.folder, "ckpt"));
        assert_int_equal(entries_in(s.folder), 1);
    }
    scratch_end(&s);
}

static void the_sweep_spares_what_is_not_ours(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char gone[64], alive[64], ours[64];
    pid_t child = fork();
    if (child == 0) _exit(0);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    snprintf(gone, sizeof gone, "c.tmp-%ld-0123abcd", (long)child);
    snprintf(alive, sizeof alive, "c.tmp-%ld-0123abcd", (long)getppid());
    snprintf(ours, sizeof ours, "c.tmp-%ld-0123abcd", (long)getpid()); /* of a process that had our number before us */
    const char *const kept[] = {alive,
                                "c",
                                "c.tmp-1-0123abc",
                                "c.tmp-1-0123ABCD",
                                "c.tmp-x-0123abcd",
                                "c.tmp--0123abcd",
                                "c.old-99-0123abcd",
                                ".tmp-99999-0123abcd",
                                "ctmp-99999-0123abcd"};
    put(scratch_path(&s, gone), "");
    assert_ok(&ctx, tp_folder_make(&ctx, scratch_path(&s, ours)));
    put(scratch_path(&s, "precious"), "precious");
    for (size_t i = 0; i < sizeof kept / sizeof kept[0]; i++) put(scratch_path(&s, kept[i]), "");
    tp_publish *live;
    tp_writer *writer;
    assert_ok(&ctx, tp_publish_begin(&ctx, scratch_path(&s, "c-live"), &live));
    assert_ok(&ctx, tp_publish_add(&ctx, live, "a", "1", 1));
    assert_ok(&ctx, tp_writer_open(&ctx, scratch_path(&s, "c-file"), &writer));
    assert_ok(&ctx, tp_publish_sweep(&ctx, s.folder, ""));
    assert_false(tp_path_exists(scratch_path(&s, gone)));
    assert_false(tp_path_exists(scratch_path(&s, ours)));
    for (size_t i = 0; i < sizeof kept / sizeof kept[0]; i++)
        if (!tp_path_exists(scratch_path(&s, kept[i]))) fail_msg("%s was removed", kept[i]);
    assert_ok(&ctx, tp_publish_commit(&ctx, live, "{}", false));
    assert_ok(&ctx, tp_writer_finish(&ctx, writer));
    assert_ok(&ctx, tp_publish_verify(&ctx, scratch_path(&s, "c-live"), NULL));
    assert_ok(&ctx, tp_publish_sweep(&ctx, scratch_path(&s, "no-such-folder"), ""));
    scratch_end(&s);
}

static tp_status verify_and_free(tp_ctx *ctx, const char *path)
{
    char *manifest;
    TP_TRY(tp_publish_verify(ctx, path, &manifest));
    tp_free(manifest);
    return TP_OK;
}

static void publishing_survives_failing_memory(void **state)
{
    (void)state;
    scratch s;
    scratch_begin(&s);
    tp_ctx ctx;
    tp_ctx_init(&ctx);
    char path[1024];
    snprintf(path, sizeof path, "%s", scratch_path(&s, "ckpt"));
    assert_ok(&ctx, publish_two(&ctx, path, "old", false));
    for (long n = 1;; n++) {
        fail_allocation(n, false);
        tp_status status = publish_two(&ctx, path, "new", true);
        bool failed = allocation_failed();
        fail_allocation(0, false);
        tp_ctx_clear(&ctx);
        /* Old or new, never in between, whatever failed; and new if the caller was told so. */
        char *text;
        size_t bytes;
        assert_ok(&ctx, tp_file_read(&ctx, scratch_path(&s, "ckpt/a.txt"), 100, &text, &bytes));
        assert_true(strcmp(text, "old") == 0 || strcmp(text, "new") == 0);
        if (status == TP_OK) assert_string_equal(text, "new");
        tp_free(text);
        assert_ok(&ctx, tp_publish_verify(&ctx, path, NULL));
        if (!failed) break;
    }
    assert_survives_failing_memory(&ctx, verify_and_free(&ctx, path));
    assert_survives_failing_memory(&ctx, tp_folder_make(&ctx, scratch_path(&s, "x/y")));
    assert_survives_failing_memory(&ctx, tp_publish_sweep(&ctx, s.folder, ""));
    scratch_end(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(whole_files_are_read),
        cmocka_unit_test(only_regular_files_are_opened),
        cmocka_unit_test(names_stay_beneath_their_folder),
        cmocka_unit_test(offsets_are_checked),
        cmocka_unit_test(files_that_change_are_noticed),
        cmocka_unit_test(foreign_faults_are_not_swallowed),
        cmocka_unit_test(guards_run_out_without_harm),
        cmocka_unit_test(files_appear_when_complete),
        cmocka_unit_test(a_full_disk_leaves_what_was_there),
        cmocka_unit_test(folders_are_made_and_removed),
        cmocka_unit_test(sha256_is_the_standard_one),
        cmocka_unit_test(folders_appear_when_complete),
        cmocka_unit_test(wrong_use_is_refused_and_cleaned_up),
        cmocka_unit_test(damage_is_noticed),
        cmocka_unit_test(killed_saves_leave_only_staging),
        cmocka_unit_test(the_sweep_spares_what_is_not_ours),
        cmocka_unit_test(publishing_survives_failing_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
