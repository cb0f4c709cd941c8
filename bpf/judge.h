/* What the programs at ingress make of a frame of an installed flow: whether its outputs can take it, whether this
 * host listens to it, and its count. */
#ifndef JUDGE_H
#define JUDGE_H

#include "frame.h"
#include "maps.h"
#include "output.h"

const volatile __u32 flows_per_processor = 1; /* set by the loader */

/* ---- who else wants it ---- */

ALWAYS_INLINE void set_tuple4(struct bpf_sock_tuple *tuple, const struct flow4_key *key, const struct frame *frame)
{
    tuple->ipv4.saddr = key->source;
    tuple->ipv4.daddr = key->group;
    tuple->ipv4.sport = frame->port;
    tuple->ipv4.dport = key->port;
}

ALWAYS_INLINE void set_tuple6(struct bpf_sock_tuple *tuple, const struct flow6_key *key, const struct frame *frame)
{
    __builtin_memcpy(tuple->ipv6.saddr, key->source, sizeof(key->source));
    __builtin_memcpy(tuple->ipv6.daddr, key->group, sizeof(key->group));
    tuple->ipv6.sport = frame->port;
    tuple->ipv6.dport = key->port;
}

/* Whether a socket of this host, none of the relay's own, is bound to where the frame goes. `context`: the
 * program's. */
ALWAYS_INLINE _Bool has_listener(void *context, struct bpf_sock_tuple *tuple, __u32 size)
{
    struct bpf_sock *sock = bpf_sk_lookup_udp(context, tuple, size, BPF_F_CURRENT_NETNS, 0);
    if (!sock)
        return 0;
    _Bool foreign = sock->mark != HELD_MARK;
    bpf_sk_release(sock);
    return foreign;
}

/* The same, looked up once a tick (1 to 10 ms) of each flow that nobody listens to. */
ALWAYS_INLINE _Bool is_heard(void *context, struct flow *flow, struct bpf_sock_tuple *tuple, __u32 size)
{
    __u32 tick = bpf_jiffies64();
    if (flow->unheard == tick)
        return 0;
    if (has_listener(context, tuple, size))
        return 1;
    flow->unheard = tick;
    return 0;
}

/* ---- outputs ---- */

ALWAYS_INLINE struct place *place_at(__u32 place)
{
    return bpf_map_lookup_elem(&route, &place);
}

ALWAYS_INLINE struct output *output_at(__u32 place)
{
    struct place *at = place_at(place);
    return at ? bpf_map_lookup_elem(&outputs, &at->output) : 0;
}

ALWAYS_INLINE struct hop *hop_of(const struct output *output)
{
    if (!output)
        return 0;
    __u32 number = output->hop;
    return bpf_map_lookup_elem(&hops, &number);
}

/* `hop`: the output's; NULL when there is no output. */
ALWAYS_INLINE __u32 judge_output(const struct frame *frame, const struct output *output, const struct hop *hop)
{
    if (!hop || !(hop->flags & HOP_READY) ||
        (!output->keep && is_zero(output->source) && is_zero(hop->source)))
        return PASSED_HOP;
    if (!output->ttl && frame->ttl <= 1)
        return PASSED_TTL;
    return frame->size > hop->mtu ? PASSED_TOO_BIG : CARRIED;
}

ALWAYS_INLINE void count_error(const struct frame *frame, struct output *output)
{
    __sync_fetch_and_add(&output->errors, frame->datagrams);
}

ALWAYS_INLINE struct count *count_of(const struct flow *flow)
{
    __u32 index = bpf_get_smp_processor_id() * flows_per_processor + flow->slot;
    return bpf_map_lookup_elem(&counts, &index);
}

/* Returns the flow's datagrams on this processor so far. */
ALWAYS_INLINE __u64 count_carried(const struct frame *frame, const struct flow *flow)
{
    struct count *count = count_of(flow);
    if (!count)
        return 0;
    count->bytes += frame->payload;
    return count->packets += frame->datagrams;
}

#endif
