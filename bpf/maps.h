/* The maps, the same in each object: the first one loaded makes them, the others reuse them. What `max_entries`
 * is comes from the loader (src/mrelay/ebpf/layout.py, Sizes.entries). */
#ifndef MAPS_H
#define MAPS_H

#include "defs.h"
#include "mrelay.h"

/* An array that Python maps into its memory. */
#define SHARED_ARRAY(name, kind)               \
    struct {                                   \
        __uint(type, BPF_MAP_TYPE_ARRAY);      \
        __uint(max_entries, 1);                \
        __uint(map_flags, BPF_F_MMAPABLE);     \
        __type(key, __u32);                    \
        __type(value, kind);                   \
    } name SEC(".maps")

#define FLOW_MAP(name, kind)                   \
    struct {                                   \
        __uint(type, BPF_MAP_TYPE_HASH);       \
        __uint(max_entries, 1);                \
        __type(key, kind);                     \
        __type(value, struct flow);            \
    } name SEC(".maps")

FLOW_MAP(flows4, struct flow4_key);
FLOW_MAP(flows6, struct flow6_key);
SHARED_ARRAY(route, __u32);
SHARED_ARRAY(outputs, struct output);
SHARED_ARRAY(hops, struct hop);
SHARED_ARRAY(counts, struct count);
SHARED_ARRAY(passed, __u64);
SHARED_ARRAY(limits, struct limit);
SHARED_ARRAY(progress, struct progress);

struct {
    __uint(type, BPF_MAP_TYPE_LPM_TRIE);
    __uint(max_entries, 1);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, struct range_key);
    __type(value, __u32);
} ranges SEC(".maps");

#endif
