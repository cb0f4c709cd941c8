/* The fast path: at tc ingress, carries the frames of installed flows to all outputs of their routes.
 *
 * All or nothing: outputs are looked at first, and a frame that one of them can't take here is left to the slow
 * path as a whole, which gets every frame that this program passes on. A frame that ends here was counted. */
#include "judge.h"
#include "limit.h"
#include "maps.h"
#include "rewrite.h"
#include "round.h"
#include "skb.h"
#include "wanted.h"

#define QUEUED_AT_LIMIT 2 /* NET_XMIT_CN, linux/netdevice.h: queued, with a warning */

const volatile __u32 short_bytes = 0; /* as in ring.bpf.c; set by the loader */

/* ---- passing on ---- */

ALWAYS_INLINE _Bool is_fragment4(const struct __sk_buff *skb)
{
    __be16 fragment;
    return skb->protocol == htons(ETH_P_IP) &&
           !bpf_skb_load_bytes_relative(skb, offsetof(struct iphdr, frag_off), &fragment, sizeof(fragment),
                                        BPF_HDR_START_NET) &&
           fragment & htons(ANY_FRAGMENT);
}

ALWAYS_INLINE void set_mark(struct __sk_buff *skb, __u32 mark)
{
    __u32 old = skb->tc_index;
    if (mark || IS_OURS(old)) /* ours: of a relay before this one, on this host */
        set_index(skb, mark);
}

/* Bits for a frame with this tag, which is written into it if the slow path wants it. */
ALWAYS_INLINE __u32 tell_vlan(struct __sk_buff *skb, __u16 vlan)
{
    struct told told = {.mark = VLAN_MARK, .vlan = vlan};
    __u32 size = offsetof(struct told, vlan) + sizeof(told.vlan);
    if (!is_wanted(skb, skb->protocol == htons(ETH_P_IPV6)) || bpf_skb_store_bytes(skb, 0, &told, size, 0))
        return FOREIGN;
    return TAGGED;
}

ALWAYS_INLINE int pass(struct __sk_buff *skb, __u32 reason, __u32 bits)
{
    __u16 vlan = vlan_of(skb);
    if (vlan)
        bits |= tell_vlan(skb, vlan);
    set_mark(skb, bits ? OURS | bits : 0);
    __u32 index = bpf_get_smp_processor_id() * PASSED_REASONS + reason;
    __u64 *count = bpf_map_lookup_elem(&passed, &index);
    if (count)
        ++*count;
    return TC_ACT_UNSPEC; /* TCX_NEXT as well: the next program, and in the end the IP stack */
}

/* Whether the slow path is too slow: soon there would be no room for a frame of this length. */
ALWAYS_INLINE _Bool is_crowded(const struct progress *slow, _Bool is_long)
{
    __s64 waiting_long = READ_ONCE(slow->accepted_long) - READ_ONCE(slow->sent_long);
    __s64 waiting = READ_ONCE(slow->accepted) - READ_ONCE(slow->sent) - waiting_long;
    return is_long ? waiting_long > (__s64)slow->room_long : waiting > (__s64)slow->room;
}

/* Whether nothing of the flow is on its way through the slow path any more, or it must not wait any longer. */
ALWAYS_INLINE _Bool is_due(struct flow *flow, _Bool is_long)
{
    __u32 worker = flow->worker;
    struct progress *slow = bpf_map_lookup_elem(&progress, &worker);
    if (!slow)
        return 0;
    if (READ_ONCE(flow->tail) == TAIL_UNKNOWN) {
        flow->tail = READ_ONCE(slow->accepted);
        flow->left = READ_ONCE(flow->entered);
        flow->waited = 0;
    }
    /* This order: a frame that has entered has moved the tail before. */
    _Bool all_entered = (__s32)(flow->left - READ_ONCE(flow->entered)) <= 0;
    if (!all_entered || READ_ONCE(slow->drained) < READ_ONCE(flow->tail)) {
        if (flow->waited < PATIENCE && !is_crowded(slow, is_long)) {
            flow->waited++;
            return 0;
        }
        flow->tail = 0;
        flow->left = READ_ONCE(flow->entered);
    }
    if (flow->waited)
        flow->waited = 0;
    return 1;
}

/* ---- outputs ---- */

/* For bpf_loop: 1 ends it. */
static long check_output(__u32 index, void *context)
{
    struct frame *frame = context;
    struct output *output = output_at(frame->start + index);
    frame->reason = judge_output(frame, output, hop_of(output));
    return frame->reason != CARRIED;
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

/* Send the copy for a place round, if nothing else is on its way or all of that follows the same route. False: send
 * it directly. */
ALWAYS_INLINE _Bool send_last_round(const struct frame *frame, struct trip *trip, __u32 slot, __u32 place)
{
    _Bool away = is_away(trip);
    if (away ? trip->place != place : !may_go(frame->skb, trip, frame->datagrams))
        return 0;
    struct output *output = output_at(place);
    __u32 ifindex = output ? rewrite(frame, output) : 0;
    if (!ifindex || (away && ifindex != trip->ifindex))
        return 0;
    if (!away) {
        trip->moved = bpf_jiffies64();
        trip->place = place;
        trip->ifindex = ifindex;
    }
    if (send_round(frame->skb, trip, slot, ROUND_COPY))
        return 1;
    trip->again = bpf_jiffies64() + LONG_AGO;
    if (away) /* directly it would overtake */
        count_error(frame, output);
    return away;
}

/* Have a frame wait for what it must not overtake. */
ALWAYS_INLINE _Bool send_frame_round(const struct frame *frame, struct trip *trip, __u32 slot)
{
    trip->place = NO_PLACE;
    trip->iif = frame->skb->ifindex;
    return send_round(frame->skb, trip, slot, ROUND_FRAME);
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
    if (is_heard(frame->skb, flow, tuple, size))
        return PASSED_LISTENER;
    frame->start = flow->start;
    frame->reason = PASSED_HOP; /* of a route without outputs */
    if (length == 1)
        check_output(0, frame);
    else
        bpf_loop(length, check_output, frame, 0);
    if (frame->reason == CARRIED && !is_due(flow, frame->skb->len > short_bytes))
        return PASSED_WAITING;
    return frame->reason;
}

/* XDP waits for the frame that it stamped last to come by here. Whatever else writes such data, it writes no
 * stamp of ours. The exchange is for its order: on another processor XDP then sees `state` as this frame left it. */
ALWAYS_INLINE void note_stamp(const struct __sk_buff *skb, struct flow *flow)
{
    __u64 *stamp = (void *)(long)skb->data_meta;
    if ((void *)(stamp + 1) <= (void *)(long)skb->data && *stamp != flow->seen)
        __sync_lock_test_and_set(&flow->seen, *stamp);
}

/* XDP leaves flows alone whose frames GRO merges. */
ALWAYS_INLINE void note_merging(const struct frame *frame, struct flow *flow)
{
    __u32 before = flow->single, single = frame->datagrams > 1 ? 0 : before < SINGLE ? before + 1 : before;
    if (single != before)
        flow->single = single;
}

/* Whether a frame must not overtake what is on its way round: what goes another way, or what only follows as a whole. */
ALWAYS_INLINE _Bool must_wait(const struct frame *frame, const struct flow *flow, struct trip *trip, __u32 reason)
{
    if (!trip || frame->returned || !is_away(trip))
        return 0;
    return reason != CARRIED || flow->length == 1 || trip->place != frame->start + flow->length - 1;
}

/* To all outputs, each of which can take it. */
ALWAYS_INLINE int send_all(struct frame *frame, struct flow *flow, struct trip *trip)
{
    __u32 last = flow->length - 1, place = frame->start + last;
    if (frame->skb->vlan_present)
        bpf_skb_vlan_pop(frame->skb);
    if (!last)
        return send_last(frame, place);
    _Bool round = trip && send_last_round(frame, trip, flow->slot, place);
    if (last > round)
        bpf_loop(last - round, send_copy, frame, 0);
    return send_last(frame, place - round);
}

ALWAYS_INLINE int carry(struct frame *frame, struct flow *flow, struct bpf_sock_tuple *tuple, __u32 size)
{
    __u32 reason = judge(frame, flow, tuple, size);
    if (reason == CARRIED && !trim(frame))
        reason = PASSED_SHAPE;
    if (flow->state != reason)
        flow->state = reason;
    note_merging(frame, flow);
    note_stamp(frame->skb, flow);
    struct trip *trip = round_id ? trip_of(flow->slot) : 0;
    if (must_wait(frame, flow, trip, reason) && send_frame_round(frame, trip, flow->slot))
        return TC_ACT_SHOT;
    if (reason != CARRIED) {
        __sync_fetch_and_add(&flow->left, 1);
        return pass(frame->skb, reason, COUNTED);
    }
    if (flow->limit && !admit(frame, flow))
        return TC_ACT_SHOT;
    count_carried(frame, flow);
    return send_all(frame, flow, trip);
}

ALWAYS_INLINE int relay4(struct __sk_buff *skb, _Bool returned)
{
    struct frame frame = {.skb = skb, .returned = returned};
    struct flow4_key key;
    struct bpf_sock_tuple tuple;
    if (!read_frame4(&frame, &key))
        return pass(skb, PASSED_SHAPE, is_fragment4(skb) ? FRAGMENT : 0);
    struct flow *flow = bpf_map_lookup_elem(&flows4, &key);
    if (!flow)
        return pass(skb, PASSED_NO_FLOW, 0);
    set_tuple4(&tuple, &key, &frame);
    return carry(&frame, flow, &tuple, sizeof(tuple.ipv4));
}

ALWAYS_INLINE int relay6(struct __sk_buff *skb, _Bool returned)
{
    struct frame frame = {.skb = skb, .returned = returned};
    struct flow6_key key;
    struct bpf_sock_tuple tuple;
    if (!read_frame6(&frame, &key))
        return pass(skb, PASSED_SHAPE, is_fragment4(skb) ? FRAGMENT : 0);
    struct flow *flow = bpf_map_lookup_elem(&flows6, &key);
    if (!flow)
        return pass(skb, PASSED_NO_FLOW, 0);
    set_tuple6(&tuple, &key, &frame);
    return carry(&frame, flow, &tuple, sizeof(tuple.ipv6));
}

/* A frame is not away any more. */
ALWAYS_INLINE void take_back(struct __sk_buff *skb)
{
    struct trip *trip = trip_of(skb->mark & SLOT_MASK);
    if (trip)
        come_back(trip);
    skb->mark = 0;
    set_index(skb, 0);
}

SEC("tc") int relay(struct __sk_buff *skb)
{
    _Bool returned = round_id && round_of(skb) == RETURNED;
    if (returned)
        take_back(skb);
    if (skb->protocol == htons(ETH_P_IP))
        return relay4(skb, returned);
    if (skb->protocol == htons(ETH_P_IPV6))
        return relay6(skb, returned);
    return TC_ACT_UNSPEC;
}

char _license[] SEC("license") = "Apache-2.0";
