/* Runs a fuzz target over stored inputs, without a fuzzer: every file of the folders and files named on the command line.
 *
 * Linked with one fuzz_NAME.c into replay_NAME. An input that once broke a reader stays in tests/fuzz/corpus/NAME and is tried
 * in every `make test`. Output is TAP: one line for the whole corpus, or the process dies on the input whose name was printed
 * last. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The buffer has exactly the size of the input, so that a sanitizer sees a read past its end. */
static int replay_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    struct stat info;
    if (file == NULL || stat(path, &info) != 0) {
        perror(path);
        if (file != NULL) fclose(file);
        return -1;
    }
    size_t size = (size_t)info.st_size;
    uint8_t *data = malloc(size > 0 ? size : 1);
    int result = -1;
    if (data != NULL && fread(data, 1, size, file) == size) {
        printf("# %s\n", path);
        fflush(stdout);
        result = LLVMFuzzerTestOneInput(data, size);
    }
    free(data);
    fclose(file);
    return result;
}

/* Returns the number of inputs replayed, or -1. */
static long replay_folder(const char *folder)
{
    struct dirent **entries;
    int n = scandir(folder, &entries, NULL, alphasort);
    long replayed = n < 0 ? -1 : 0;
    for (int i = 0; i < n; i++) {
        char path[4096];
        snprintf(path, sizeof path, "%s/%s", folder, entries[i]->d_name);
        if (entries[i]->d_name[0] != '.' && replayed >= 0) replayed = replay_file(path) == 0 ? replayed + 1 : -1;
        free(entries[i]);
    }
    if (n >= 0) free(entries);
    return replayed;
}

int main(int argc, char **argv)
{
    long total = 0;
    for (int i = 1; i < argc && total >= 0; i++) {
        struct stat info;
        long replayed = -1;
        if (stat(argv[i], &info) != 0)
            perror(argv[i]);
        else if (S_ISDIR(info.st_mode))
            replayed = replay_folder(argv[i]);
        else
            replayed = replay_file(argv[i]) == 0 ? 1 : -1;
        total = replayed < 0 ? -1 : total + replayed;
    }
    printf("%s 1 - replayed %ld inputs\n", total > 0 ? "ok" : "not ok", total);
    return total > 0 ? 0 : 1;
}
