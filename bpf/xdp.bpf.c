/* The fast path's second accelerator: in the driver, before the kernel makes an skb of a frame, carries the frames of
 * flows with one output.
 *
 * It comes after tc: a flow is carried here once `relay` carries it, and once the last frame that was passed on from
 * here has come by there, as its stamp says. So this program need not know how far the slow path is, and overtakes
 * nothing. What it does not carry it passes on as it is; `relay` decides, and counts.
 *
 * There is no partial checksum to be seen here, nor a VLAN tag that the driver has taken off (the supervisor has that
 * switched off). Frames with a tag in them are passed on. */
#include "judge.h"
#include "maps.h"
#include "output.h"

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

/* Leave a frame of a flow with one output to tc. Every one gets a stamp of its own, but only those carry theirs
 * along that may open this path: frames with different stamps are not merged. */
ALWAYS_INLINE int pass(const struct frame *frame, struct flow *flow, __u32 why)
{
    __u64 stamp = bpf_ktime_get_ns();
    if (why == XDP_ORDER && flow->state >= CARRIED)
        why = is_partial(frame) ? XDP_PARTIAL : put_stamp(frame->xdp, stamp) ? XDP_ORDER : XDP_NO_ROOM;
    flow->given = stamp;
    if (flow->why != why)
        flow->why = why;
    return XDP_PASS;
}

/* Whether the frame may be sent from here without overtaking any. */
ALWAYS_INLINE _Bool is_open(const struct flow *flow)
{
    __u64 given = flow->given;
    return given && READ_ONCE(flow->seen) == given && READ_ONCE(flow->state) >= CARRIED;
}

/* ---- sending ---- */

ALWAYS_INLINE _Bool rewrite(const struct frame *frame, const struct output *output, const struct hop *hop)
{
    struct ethhdr *eth = (void *)(long)frame->xdp->data;
    void *end = (void *)(long)frame->xdp->data_end;
    struct head4 *four = (void *)(eth + 1);
    struct head6 *six = (void *)(eth + 1);
    struct change change;
    if (frame->headers == sizeof(*four)) {
        if ((void *)(four + 1) > end)
            return 0;
        write4(frame, output, hop, eth, &change);
        mend_whole(&four->udp, &change);
    } else {
        if ((void *)(six + 1) > end)
            return 0;
        write6(frame, output, hop, eth, &change);
        mend_whole(&six->udp, &change);
    }
    return 1;
}

/* Cut off what Ethernet padded. */
ALWAYS_INLINE _Bool trim(const struct frame *frame)
{
    __u32 len = frame->xdp->data_end - frame->xdp->data, wanted = ETHERNET + frame->headers + frame->payload;
    return len == wanted || !bpf_xdp_adjust_tail(frame->xdp, (int)(wanted - len));
}

ALWAYS_INLINE int send(const struct frame *frame, struct flow *flow, struct output *output, const struct hop *hop)
{
    if (!trim(frame) || !rewrite(frame, output, hop))
        return XDP_DROP; /* neither can be: the lengths were checked, and frames only get shorter */
    count_carried(frame, flow);
    if (flow->state != CARRIED_XDP)
        flow->state = CARRIED_XDP;
    return bpf_redirect(hop->ifindex, 0);
}

/* ---- a frame of an installed flow ---- */

ALWAYS_INLINE int carry(struct frame *frame, struct flow *flow, struct bpf_sock_tuple *tuple, __u32 size)
{
    if (flow->length != 1 || flow->limit) {
        __u32 why = flow->limit ? XDP_RATE : XDP_OUTPUTS;
        if (flow->why != why)
            flow->why = why;
        return XDP_PASS;
    }
    struct output *output = output_at(flow->start);
    struct hop *hop = output ? hop_of(output) : 0;
    if (!output || !hop || !(hop->flags & HOP_XDP))
        return pass(frame, flow, XDP_HOP);
    if (!is_open(flow) || judge_output(frame, output) != CARRIED || is_heard(frame->xdp, flow, tuple, size))
        return pass(frame, flow, XDP_ORDER);
    return send(frame, flow, output, hop);
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
