/* Resource limits, and the memory of control groups: version 1 and 2 differ in where the number lies. */
#include "base/allowance.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>

#include "base/text.h"

/* Version 1 writes "none" as the largest multiple of a page. */
#define UNREAL_BYTES ((uint64_t)1 << 62)

static uint64_t resource(int which)
{
    struct rlimit limit;
    return getrlimit(which, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY ? TP_NO_LIMIT : (uint64_t)limit.rlim_cur;
}

/* The number in a file of one line; TP_NO_LIMIT for "max", a missing file and numbers that no machine has. */
static uint64_t read_number(const char *path)
{
    char line[64];
    uint64_t value = TP_NO_LIMIT;
    FILE *file = fopen(path, "re");
    if (file == NULL) return TP_NO_LIMIT;
    if (fgets(line, sizeof line, file) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        if (!tp_parse_u64(line, &value) || value >= UNREAL_BYTES) value = TP_NO_LIMIT;
    }
    fclose(file);
    return value;
}

/* The lowest limit of a group and all groups around it. A container may see its group's path but not the folders: those above
 * are tried, and the uppermost is the container's own. */
static uint64_t group_bytes(const char *root, const char *tree, const char *group, const char *name)
{
    char folder[PATH_MAX], path[PATH_MAX + 64];
    uint64_t least = TP_NO_LIMIT;
    int n = snprintf(folder, sizeof folder, "%s%s%s", root, tree, group), top = (int)(strlen(root) + strlen(tree));
    if (n < 0 || n >= (int)sizeof folder) return least;
    for (;;) {
        snprintf(path, sizeof path, "%s/%s", folder, name);
        uint64_t bytes = read_number(path);
        if (bytes < least) least = bytes;
        char *slash = strrchr(folder + top, '/');
        if (slash == NULL) return least;
        *slash = '\0';
    }
}

/* Lines "number:controllers:group"; version 2 has one with number 0 and no controllers. */
static uint64_t container_bytes(const char *root)
{
    char path[PATH_MAX], line[PATH_MAX];
    uint64_t least = TP_NO_LIMIT;
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *file = fopen(path, "re");
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':'), *group = controllers != NULL ? strchr(controllers + 1, ':') : NULL;
        if (group == NULL) continue;
        *group++ = '\0';
        uint64_t bytes = TP_NO_LIMIT;
        if (controllers[1] == '\0')
            bytes = group_bytes(root, "/sys/fs/cgroup", group, "memory.max");
        else if (strcmp(controllers + 1, "memory") == 0)
            bytes = group_bytes(root, "/sys/fs/cgroup/memory", group, "memory.limit_in_bytes");
        if (bytes < least) least = bytes;
    }
    if (file != NULL) fclose(file);
    return least;
}

void tp_allowance_read(const char *root, tp_allowance *a)
{
    *a = (tp_allowance){.container_bytes = container_bytes(root),
                        .address_bytes = resource(RLIMIT_AS),
                        .file_bytes = resource(RLIMIT_FSIZE),
                        .open_files = resource(RLIMIT_NOFILE)};
}
