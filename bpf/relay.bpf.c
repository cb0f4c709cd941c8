/* The fast path: at tc ingress, carries the frames of installed flows to all outputs of their routes.
 *
 * All or nothing: outputs are looked at first, and a frame that one of them can't take here is left to the slow
 * path as a whole, which gets every frame that this program passes on. A frame that ends here was counted. */
#include "frame.h"
#include "maps.h"
#include "rewrite.h"

#define QUEUED_AT_LIMIT 2 /* NET_XMIT_CN, linux/netdevice.h: queued, with a warning */

const volatile __u32 flows_per_processor = 1; /* set by the loader */

/* ---- passing on ---- */

/* The kernel takes the tag off before the slow path's rings see the frame, so that it looked untagged: mark it. */
ALWAYS_INLINE void mark_tagged(struct __sk_buff *skb)
{
    volatile __u32 *mark = &skb->tc_index; /* volatile, or clang computes an address that the verifier refuses */
    if (vlan_of(skb))
        *mark = TAGGED;
    else if (*mark == TAGGED)
        *mark = 0;
}

ALWAYS_INLINE int pass(struct __sk_buff *skb, __u32 reason)
{
    mark_tagged(skb);
    __u32 index = bpf_get_smp_processor_id() * PASSED_REASONS + reason;
    __u64 *count = bpf_map_lookup_elem(&passed, &index);
    if (count)
        ++*count;
    return TC_ACT_UNSPEC; /* TCX_NEXT as well: the next program, and in the end the IP stack */
}

/* Whether nothing of the flow is on its way through the slow path any more, or it has waited long enough. */
ALWAYS_INLINE _Bool is_due(struct flow *flow)
{
    __u32 worker = flow->worker;
    struct progress *slow = bpf_map_lookup_elem(&progress, &worker);
    if (!slow)
        return 0;
    __u64 tail = READ_ONCE(flow->tail);
    if (tail == TAIL_UNKNOWN) {
        flow->tail = tail = READ_ONCE(slow->accepted);
        flow->waited = 0;
    }
    if (READ_ONCE(slow->drained) < tail) {
        if (flow->waited < PATIENCE) {
            flow->waited++;
            return 0;
        }
        flow->tail = 0;
    }
    if (flow->waited)
        flow->waited = 0;
    return 1;
}

/* Whether a socket of this host, none of the relay's own, is bound to where the frame goes. */
ALWAYS_INLINE _Bool has_listener(struct __sk_buff *skb, struct bpf_sock_tuple *tuple, __u32 size)
{
    struct bpf_sock *sock = bpf_sk_lookup_udp(skb, tuple, size, BPF_F_CURRENT_NETNS, 0);
    if (!sock)
        return 0;
    _Bool foreign = sock->mark != HELD_MARK;
    bpf_sk_release(sock);
    return foreign;
}

/* ---- outputs ---- */

ALWAYS_INLINE struct output *output_at(__u32 place)
{
    __u32 *index = bpf_map_lookup_elem(&route, &place);
    return index ? bpf_map_lookup_elem(&outputs, index) : 0;
}

ALWAYS_INLINE __u32 judge_output(const struct frame *frame, const struct output *output)
{
    if (!output)
        return PASSED_HOP;
    __u32 number = output->hop;
    struct hop *hop = bpf_map_lookup_elem(&hops, &number);
    if (!hop || !(hop->flags & HOP_READY) ||
        (!output->keep && is_zero(output->source) && is_zero(hop->source)))
        return PASSED_HOP;
    if (!output->ttl && frame->ttl <= 1)
        return PASSED_TTL;
    return frame->size > hop->mtu ? PASSED_TOO_BIG : CARRIED;
}

/* For bpf_loop: 1 ends it. */
static long check_output(__u32 index, void *context)
{
    struct frame *frame = context;
    frame->reason = judge_output(frame, output_at(frame->start + index));
    return frame->reason != CARRIED;
}

ALWAYS_INLINE void count_error(const struct frame *frame, struct output *output)
{
    __sync_fetch_and_add(&output->errors, frame->datagrams);
}

/* For bpf_loop: a copy to one output. */
static long send_copy(__u32 index, void *context)
{
    struct frame *frame = context;
    struct output *output = output_at(frame->start + index);
    if (!output)
        return 0;
    __u32 ifindex = rewrite(frame, output);
    long result = ifindex ? bpf_clone_redirect(frame->skb, ifindex, 0) : -1;
    if (result && result != QUEUED_AT_LIMIT)
        count_error(frame, output);
    return 0;
}

/* The frame itself to the route's last output, or nowhere: too late for the slow path. */
ALWAYS_INLINE int send_last(const struct frame *frame, __u32 place)
{
    struct output *output = output_at(place);
    if (!output)
        return TC_ACT_SHOT;
    __u32 ifindex = rewrite(frame, output);
    if (ifindex)
        return bpf_redirect(ifindex, 0);
    count_error(frame, output);
    return TC_ACT_SHOT;
}

/* ---- a frame of an installed flow ---- */

/* Waiting comes last: it passes by itself, so of several reasons it is the one that says least. */
ALWAYS_INLINE __u32 judge(struct frame *frame, struct flow *flow, struct bpf_sock_tuple *tuple, __u32 size)
{
    __u32 length = flow->length;
    if (has_listener(frame->skb, tuple, size))
        return PASSED_LISTENER;
    frame->start = flow->start;
    frame->reason = PASSED_HOP; /* of a route without outputs */
    if (length == 1)
        check_output(0, frame);
    else
        bpf_loop(length, check_output, frame, 0);
    if (frame->reason == CARRIED && !is_due(flow))
        return PASSED_WAITING;
    return frame->reason;
}

ALWAYS_INLINE void count_carried(const struct frame *frame, const struct flow *flow)
{
    __u32 index = bpf_get_smp_processor_id() * flows_per_processor + flow->slot;
    struct count *count = bpf_map_lookup_elem(&counts, &index);
    if (!count)
        return;
    count->packets += frame->datagrams;
    count->bytes += frame->payload;
}

ALWAYS_INLINE int carry(struct frame *frame, struct flow *flow, struct bpf_sock_tuple *tuple, __u32 size)
{
    __u32 last = flow->length - 1, reason = judge(frame, flow, tuple, size);
    if (reason == CARRIED && !trim(frame))
        reason = PASSED_SHAPE;
    if (flow->state != reason)
        flow->state = reason;
    if (reason != CARRIED)
        return pass(frame->skb, reason);
    count_carried(frame, flow);
    if (frame->skb->vlan_present)
        bpf_skb_vlan_pop(frame->skb);
    if (last)
        bpf_loop(last, send_copy, frame, 0);
    return send_last(frame, frame->start + last);
}

ALWAYS_INLINE int relay4(struct __sk_buff *skb)
{
    struct frame frame = {.skb = skb};
    struct flow4_key key;
    struct bpf_sock_tuple tuple;
    if (!read_frame4(&frame, &key))
        return pass(skb, PASSED_SHAPE);
    struct flow *flow = bpf_map_lookup_elem(&flows4, &key);
    if (!flow)
        return pass(skb, PASSED_NO_FLOW);
    tuple.ipv4.saddr = key.source;
    tuple.ipv4.daddr = key.group;
    tuple.ipv4.sport = frame.port;
    tuple.ipv4.dport = key.port;
    return carry(&frame, flow, &tuple, sizeof(tuple.ipv4));
}

ALWAYS_INLINE int relay6(struct __sk_buff *skb)
{
    struct frame frame = {.skb = skb};
    struct flow6_key key;
    struct bpf_sock_tuple tuple;
    if (!read_frame6(&frame, &key))
        return pass(skb, PASSED_SHAPE);
    struct flow *flow = bpf_map_lookup_elem(&flows6, &key);
    if (!flow)
        return pass(skb, PASSED_NO_FLOW);
    __builtin_memcpy(tuple.ipv6.saddr, key.source, sizeof(key.source));
    __builtin_memcpy(tuple.ipv6.daddr, key.group, sizeof(key.group));
    tuple.ipv6.sport = frame.port;
    tuple.ipv6.dport = key.port;
    return carry(&frame, flow, &tuple, sizeof(tuple.ipv6));
}

SEC("tc") int relay(struct __sk_buff *skb)
{
    if (skb->protocol == htons(ETH_P_IP))
        return relay4(skb);
    if (skb->protocol == htons(ETH_P_IPV6))
        return relay6(skb);
    return TC_ACT_UNSPEC;
}

char _license[] SEC("license") = "Apache-2.0";
