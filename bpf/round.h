/* The way round: by the ingress of lo, for copies that should leave last.
 *
 * bpf_clone_redirect gives the clone the frame's own head and us a copy of it, and it is the frame's own that hands
 * the pages back to the driver's page pool, if nobody else holds them any more (docs/decisions/D51). So the last
 * output's copy goes round: lo's backlog holds it until the others are gone, and `land` sends it on.
 *
 * What of its flow comes meanwhile must not overtake it. Copies by the same route follow it; a frame that goes another
 * way follows as a whole, back to its interface, and is looked at when it is there again. The backlog keeps the order
 * of one processor; a flow that moves to another may be overtaken, as everywhere in the kernel. */
#ifndef ROUND_H
#define ROUND_H

#include "maps.h"

/* The kernel's number of `trips`, for there may be other relays, each with a `land`. 0: nothing goes round; set by the
 * loader. */
const volatile __u32 round_id = 0;

/* Of what is on its way skb->tc_index says so and what it is, and skb->mark has the flow's slot. Both have a part of
 * `round_id`. */
enum round {
    ROUND_COPY,
    ROUND_FRAME,
    RETURNED, /* a frame, where it came in */
    NOT_OURS,
};

#define ROUND_INDEX (0x8000 | (round_id & 0x1fff) << 2)
#define SLOT_BITS 23 /* layout.py, _COUNTS_MOST */
#define ROUND_MARK (round_id >> 13 << SLOT_BITS)
#define SLOT_MASK ((1U << SLOT_BITS) - 1)

#define LOOPBACK 1      /* LOOPBACK_IFINDEX, net/net_namespace.h */
#define MANY 8          /* segments: from so many on the pages are worth it */
#define LONG_AGO 100    /* jiffies: 0.1 to 1 s */
#define A_WHILE 100000  /* jiffies: 2 to 17 minutes */
#define NO_PLACE (~0U)

ALWAYS_INLINE enum round round_of(const struct __sk_buff *skb)
{
    __u32 kind = skb->tc_index - ROUND_INDEX;
    return kind < NOT_OURS && (skb->mark & ~SLOT_MASK) == ROUND_MARK ? kind : NOT_OURS;
}

ALWAYS_INLINE struct trip *trip_of(__u32 slot)
{
    return bpf_map_lookup_elem(&trips, &slot);
}

/* Whether something of the flow is on its way. What does not come back is lost: an interface went away, or something
 * else is at lo that takes it; so the flow is not sent that way for a while. */
ALWAYS_INLINE _Bool is_away(struct trip *trip)
{
    if (!READ_ONCE(trip->away))
        return 0;
    __u64 now = bpf_jiffies64();
    if (now - READ_ONCE(trip->moved) < LONG_AGO)
        return 1;
    trip->away = 0;
    trip->again = now + A_WHILE;
    return 0;
}

ALWAYS_INLINE void come_back(struct trip *trip)
{
    trip->moved = bpf_jiffies64();
    if (READ_ONCE(trip->away)) /* 0: it was taken for lost */
        __sync_fetch_and_add(&trip->away, -1);
}

ALWAYS_INLINE void set_index(struct __sk_buff *skb, __u32 index)
{
    /* By hand: clang computes an address first, which the verifier refuses. */
    asm volatile("*(u32 *)(%0 + %1) = %2"
                 :
                 : "r"(skb), "i"(offsetof(struct __sk_buff, tc_index)), "r"(index)
                 : "memory");
}

/* A clone of the frame as it is. False: lo takes none, it is down or the backlog full. */
ALWAYS_INLINE _Bool send_round(struct __sk_buff *skb, struct trip *trip, __u32 slot, enum round kind)
{
    __u32 mark = skb->mark, index = skb->tc_index;
    __sync_fetch_and_add(&trip->away, 1);
    skb->mark = ROUND_MARK | slot;
    set_index(skb, ROUND_INDEX + kind);
    _Bool taken = !bpf_clone_redirect(skb, LOOPBACK, BPF_F_INGRESS);
    skb->mark = mark;
    set_index(skb, index);
    if (!taken)
        __sync_fetch_and_add(&trip->away, -1);
    return taken;
}

/* Whether a copy may go round when nothing else does. What others noted in the skb would be lost on the way. */
ALWAYS_INLINE _Bool may_go(const struct __sk_buff *skb, const struct trip *trip, __u32 datagrams)
{
    return datagrams >= MANY && !skb->mark && !skb->priority &&
           bpf_jiffies64() >= trip->again;
}

#endif
