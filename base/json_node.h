/* How a JSON document lies in memory: shared by json.c (parse and look up) and json_write.c. */
#ifndef TP_BASE_JSON_NODE_H
#define TP_BASE_JSON_NODE_H

#include "base/json.h"

/* 24 bytes. The children of a container are contiguous: elements of an array; key, value, key, value ... of an object.
 * A large object's children are preceded by one node that holds its hash index (see `indexed`). */
struct tp_json {
    union {
        const char *text;        /* string (decoded) or number (as written) */
        const tp_json *children; /* array or object */
        const uint32_t *slots;   /* hash index, see find_slot */
    } at;
    uint32_t len;    /* bytes of text; elements or members; number of slots - 1 */
    uint32_t offset; /* of the first byte in the document's text, for messages */
    uint32_t parent; /* open container: where its own container lies on the stack; key being indexed: its hash */
    uint8_t type;    /* tp_json_type */
    bool flag;       /* BOOL: its value.  STRING: has escapes */
    bool indexed;    /* OBJECT: children[-1] is its hash index */
};

#endif
