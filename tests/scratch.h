/* A folder for the files that a test makes: scratch_begin in the test, scratch_end removes it. */
#ifndef TP_TESTS_SCRATCH_H
#define TP_TESTS_SCRATCH_H

#include <stdio.h>
#include <stdlib.h>

#include "base/file.h"

typedef struct scratch {
    char folder[512];
    char path[1024]; /* of the last scratch_path */
} scratch;

static inline void scratch_begin(scratch *s)
{
    const char *parent = getenv("TMPDIR");
    snprintf(s->folder, sizeof s->folder, "%s/tapeft-test-XXXXXX", parent != NULL && parent[0] != '\0' ? parent : P_tmpdir);
    if (mkdtemp(s->folder) == NULL) fail_msg("%s: cannot make it", s->folder);
}

static inline const char *scratch_path(scratch *s, const char *name)
{
    snprintf(s->path, sizeof s->path, "%s/%s", s->folder, name);
    return s->path;
}

static inline void scratch_end(scratch *s)
{
    if (tp_folder_remove(NULL, s->folder) != TP_OK) fail_msg("%s: cannot remove it", s->folder);
}

#endif
