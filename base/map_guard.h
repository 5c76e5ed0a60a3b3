/* Registry of guarded mappings: a page that vanishes under a registered mapping reads as zeros. For file.c only. */
#ifndef TP_BASE_MAP_GUARD_H
#define TP_BASE_MAP_GUARD_H

#include <stdbool.h>
#include <stddef.h>

/* A ticket for [begin, begin + bytes), or -1 if the table is full. */
int tp_map_guard_add(const void *begin, size_t bytes);
void tp_map_guard_remove(int ticket); /* before munmap */
bool tp_map_guard_lost(int ticket);

#endif
