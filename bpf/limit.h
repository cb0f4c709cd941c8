/* The rate of a flow's rule: token buckets, kept as the time up to which what passed is paid for.
 *
 * As the slow path's (src/mrelay/worker/limits.py): a frame passes while both buckets hold anything, and may leave
 * them in debt. Processors share them without a lock: two that look at once may both pass a frame on the last
 * token, and both pay. */
#ifndef LIMIT_H
#define LIMIT_H

#include "judge.h"

#define ROUND (1 << 15) /* half of the least that `cost` can say, for rounding to ns */

ALWAYS_INLINE _Bool is_paid(const struct meter *meter, __u64 now)
{
    return !meter->cost || (__s64)(READ_ONCE(meter->due) - now) < 0;
}

ALWAYS_INLINE void pay(struct meter *meter, __u64 now, __u64 units)
{
    if (!meter->cost)
        return;
    __u64 due = READ_ONCE(meter->due), least = now - meter->burst;
    if ((__s64)(due - least) < 0) /* no more is saved; if it has changed, another processor did this */
        __sync_val_compare_and_swap(&meter->due, due, least);
    __sync_fetch_and_add(&meter->due, (units * meter->cost + ROUND) >> 16);
}

/* Whether the frame may pass, which is paid for then, and counted if not. */
ALWAYS_INLINE _Bool admit(const struct frame *frame, const struct flow *flow)
{
    __u32 index = flow->limit - 1;
    struct limit *limit = bpf_map_lookup_elem(&limits, &index);
    if (!limit)
        return 1;
    __u64 now = bpf_ktime_get_ns();
    if (is_paid(&limit->datagrams, now) && is_paid(&limit->bytes, now)) {
        pay(&limit->datagrams, now, frame->datagrams);
        pay(&limit->bytes, now, frame->payload);
        return 1;
    }
    struct count *count = count_of(flow);
    if (count)
        count->limited += frame->datagrams;
    return 0;
}

#endif
