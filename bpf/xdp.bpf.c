/* The fast path's second accelerator: in the driver, before the kernel makes an skb of a frame, carries the frames of
 * flows that GRO does not merge.
 *
 * It comes after tc: a flow is carried here once `relay` carries it, and once the last frame that was passed on from
 * here has come by there, as its stamp says. So this program need not know how far the slow path is, and overtakes
 * nothing. What it does not carry it passes on as it is; `relay` decides, and counts.
 *
 * There is no partial checksum to be seen here, nor a VLAN tag that the driver has taken off (the supervisor has that
 * switched off). Frames with a tag in them are passed on. */
#include "driver.h"
#include "round.h"

/* ---- passing on ---- */

/* Only looked at when a flow is about to be carried: one in 65,536 that only looks so does no harm. */
ALWAYS_INLINE _Bool is_partial(const struct frame *frame)
{
    struct ethhdr *eth = (void *)(long)frame->xdp->data;
    void *end = (void *)(long)frame->xdp->data_end;
    struct head4 *four = (void *)(eth + 1);
    struct head6 *six = (void *)(eth + 1);
    if (frame->headers == sizeof(*four))
        return (void *)(four + 1) > end || looks_partial4(four);
    return (void *)(six + 1) > end || looks_partial6(six);
}

/* False: the driver has no room for it. */
ALWAYS_INLINE _Bool put_stamp(struct xdp_md *xdp, __u64 stamp)
{
    if (bpf_xdp_adjust_meta(xdp, -(int)sizeof(stamp)))
        return 0;
    __u64 *at = (void *)(long)xdp->data_meta;
    if ((void *)(at + 1) > (void *)(long)xdp->data)
        return 0;
    *at = stamp;
    return 1;
}

ALWAYS_INLINE int say(struct flow *flow, __u32 why)
{
    if (flow->why != why)
        flow->why = why;
    return XDP_PASS;
}

/* Leave a flow's frames to tc until further notice, unmarked: they may be merged. */
ALWAYS_INLINE int leave(struct flow *flow, __u32 why)
{
    if (flow->given)
        flow->given = 0;
    return say(flow, why);
}

/* Leave to tc a frame of a flow that may be carried here. Every one gets a stamp of its own, but only those carry
 * theirs along that may open this path: frames with different stamps are not merged. */
ALWAYS_INLINE int pass(const struct frame *frame, struct flow *flow, __u32 why)
{
    __u64 stamp = bpf_ktime_get_ns();
    if (why == XDP_ORDER && flow->state >= CARRIED)
        why = is_partial(frame) ? XDP_PARTIAL : put_stamp(frame->xdp, stamp) ? XDP_ORDER : XDP_NO_ROOM;
    flow->given = stamp;
    return say(flow, why);
}

/* Whether the frame may be sent from here without overtaking any. */
ALWAYS_INLINE _Bool is_open(const struct flow *flow)
{
    __u64 given = flow->given;
    __u32 state = READ_ONCE(flow->state);
    if (!given || READ_ONCE(flow->seen) != given || state < CARRIED)
        return 0;
    struct trip *trip = state == CARRIED ? trip_of(flow->slot) : 0;
    return !trip || !READ_ONCE(trip->away);
}

/* ---- sending ---- */

/* Cut off what Ethernet padded. */
ALWAYS_INLINE _Bool trim(const struct frame *frame)
{
    __u32 len = frame->xdp->data_end - frame->xdp->data, wanted = ETHERNET + frame->headers + frame->payload;
    return len == wanted || !bpf_xdp_adjust_tail(frame->xdp, (int)(wanted - len));
}

/* Returns the flow's datagrams on this processor so far. */
ALWAYS_INLINE __u64 note_carried(const struct frame *frame, struct flow *flow)
{
    if (flow->state != CARRIED_XDP)
        flow->state = CARRIED_XDP;
    return count_carried(frame, flow);
}

ALWAYS_INLINE int send(const struct frame *frame, struct flow *flow, struct output *output, const struct hop *hop)
{
    if (!trim(frame) || !rewrite(frame, output, hop))
        return XDP_DROP; /* neither can be: the lengths were checked, and frames only get shorter */
    note_carried(frame, flow);
    return bpf_redirect(hop->ifindex, 0);
}

#define BROADCAST(n) \
    case n:          \
        return bpf_redirect_map(&devmap##n, 0, BPF_F_BROADCAST);

/* The frame as it is, with a ticket: copy.bpf.c makes of each copy what its output wants. */
ALWAYS_INLINE int send_copies(const struct frame *frame, struct flow *flow, __u32 number)
{
    struct ticket *ticket;
    if (bpf_xdp_adjust_meta(frame->xdp, -(int)sizeof(*ticket)))
        return pass(frame, flow, XDP_NO_ROOM);
    ticket = (void *)(long)frame->xdp->data_meta;
    if ((void *)(ticket + 1) > (void *)(long)frame->xdp->data)
        return XDP_DROP; /* can't be: there it is */
    ticket->stamp = note_carried(frame, flow) << 24 | (flow->slot & 0xffffff);
    ticket->number = number;
    ticket->start = frame->start;
    if (!trim(frame))
        return XDP_DROP;
    switch (number) {
        EACH_BROADCAST(BROADCAST)
    }
    return XDP_DROP; /* can't be: there is such a broadcast */
}

/* ---- a frame of an installed flow ---- */

ALWAYS_INLINE int carry_one(struct frame *frame, struct flow *flow, struct bpf_sock_tuple *tuple, __u32 size)
{
    struct output *output = output_at(flow->start);
    struct hop *hop = hop_of(output);
    if (!hop || !(hop->flags & HOP_XDP))
        return pass(frame, flow, XDP_HOP);
    if (!is_open(flow) || judge_output(frame, output, hop) != CARRIED || is_heard(frame->xdp, flow, tuple, size))
        return pass(frame, flow, XDP_ORDER);
    return send(frame, flow, output, hop);
}

struct checking {
    struct frame *frame;
    const struct broadcast *to;
    _Bool reached; /* the broadcast comes to each output so far */
};

/* For bpf_loop: 1 ends it. */
static long check_copy(__u32 index, void *context)
{
    struct checking *checking = context;
    struct frame *frame = checking->frame;
    struct output *output = output_at(frame->start + index);
    struct hop *hop = hop_of(output);
    if (!hop || index >= MAX_COPIES || !(hop->flags & HOP_XDP) || checking->to->ifindex[index] != hop->ifindex ||
        (__s32)(hop->changes - checking->to->changes) > 0) {
        checking->reached = 0;
        return 1;
    }
    frame->reason = judge_output(frame, output, hop);
    return frame->reason != CARRIED;
}

ALWAYS_INLINE int carry_many(struct frame *frame, struct flow *flow, struct bpf_sock_tuple *tuple, __u32 size)
{
    struct place *first = place_at(flow->start);
    __u32 number = first ? first->broadcast - 1 : 0;
    struct checking checking = {.frame = frame, .to = bpf_map_lookup_elem(&broadcasts, &number), .reached = 1};
    if (!checking.to)
        return leave(flow, number + 1 == BROADCAST_HOP ? XDP_HOP : XDP_OUTPUTS);
    frame->start = flow->start;
    bpf_loop(flow->length, check_copy, &checking, 0);
    if (!checking.reached)
        return pass(frame, flow, XDP_HOP);
    if (!is_open(flow) || frame->reason != CARRIED || is_heard(frame->xdp, flow, tuple, size))
        return pass(frame, flow, XDP_ORDER);
    return send_copies(frame, flow, number);
}

ALWAYS_INLINE int carry(struct frame *frame, struct flow *flow, struct bpf_sock_tuple *tuple, __u32 size)
{
    if (flow->limit)
        return leave(flow, XDP_RATE);
    if (flow->single < SINGLE)
        return leave(flow, XDP_MERGED);
    return flow->length == 1 ? carry_one(frame, flow, tuple, size) : carry_many(frame, flow, tuple, size);
}

ALWAYS_INLINE int relay4(struct xdp_md *xdp, const struct head4 *head, void *end)
{
    struct frame frame = {.xdp = xdp};
    struct flow4_key key;
    struct bpf_sock_tuple tuple;
    if ((void *)(head + 1) > end || !is_plain4(&head->ip) || !has_lengths4(head) || !has_sum4(head))
        return XDP_PASS;
    read_key4(&key, xdp->ingress_ifindex, 0, head);
    struct flow *flow = bpf_map_lookup_elem(&flows4, &key);
    read_head4(&frame, head);
    if (!flow || !set_sizes(&frame, ntohs(head->ip.tot_len), end - (void *)head))
        return XDP_PASS;
    set_tuple4(&tuple, &key, &frame);
    return carry(&frame, flow, &tuple, sizeof(tuple.ipv4));
}

ALWAYS_INLINE int relay6(struct xdp_md *xdp, const struct head6 *head, void *end)
{
    struct frame frame = {.xdp = xdp};
    struct flow6_key key;
    struct bpf_sock_tuple tuple;
    if ((void *)(head + 1) > end || !is_plain6(&head->ip) || !is_sound6(head))
        return XDP_PASS;
    read_key6(&key, xdp->ingress_ifindex, 0, head);
    struct flow *flow = bpf_map_lookup_elem(&flows6, &key);
    read_head6(&frame, head);
    if (!flow || !set_sizes(&frame, ntohs(head->ip.payload_len) + sizeof(head->ip), end - (void *)head))
        return XDP_PASS;
    set_tuple6(&tuple, &key, &frame);
    return carry(&frame, flow, &tuple, sizeof(tuple.ipv6));
}

SEC("xdp") int relay_xdp(struct xdp_md *xdp)
{
    struct ethhdr *eth = (void *)(long)xdp->data;
    void *end = (void *)(long)xdp->data_end;
    if ((void *)(eth + 1) > end)
        return XDP_PASS;
    if (eth->h_proto == htons(ETH_P_IP))
        return relay4(xdp, (void *)(eth + 1), end);
    if (eth->h_proto == htons(ETH_P_IPV6))
        return relay6(xdp, (void *)(eth + 1), end);
    return XDP_PASS;
}

char _license[] SEC("license") = "Apache-2.0";
