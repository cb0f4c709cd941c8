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
SHARED_ARRAY(route, struct place);
SHARED_ARRAY(outputs, struct output);
SHARED_ARRAY(hops, struct hop);
SHARED_ARRAY(broadcasts, struct broadcast);
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

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct turn);
} turns SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct trip);
} trips SEC(".maps");

/* X(n) for each broadcast: a redirect names its map when it is compiled. */
#define EACH_BROADCAST(X)                                                                        \
    X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)        \
    X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29) X(30) X(31)

#define DEVMAP(n)                                      \
    struct {                                           \
        __uint(type, BPF_MAP_TYPE_DEVMAP);             \
        __uint(max_entries, MAX_COPIES);               \
        __type(key, __u32);                            \
        __type(value, struct bpf_devmap_val);          \
    } devmap##n SEC(".maps");

EACH_BROADCAST(DEVMAP)

#endif
