/* At the ingress of lo: where what `relay` sent round lands, and goes on. Everything else passes. */
#include "round.h"

SEC("tc") int land(struct __sk_buff *skb)
{
    enum round kind = round_of(skb);
    if (kind != ROUND_COPY && kind != ROUND_FRAME)
        return TC_ACT_UNSPEC;
    struct trip *trip = trip_of(skb->mark & SLOT_MASK);
    if (!trip)
        return TC_ACT_SHOT; /* can't be: the slot is of a flow */
    if (kind == ROUND_FRAME) {
        set_index(skb, ROUND_INDEX + RETURNED);
        if (bpf_clone_redirect(skb, trip->iif, BPF_F_INGRESS)) /* dropped, as any that comes in by then */
            come_back(trip);
        return TC_ACT_SHOT;
    }
    skb->mark = 0;
    set_index(skb, 0);
    come_back(trip);
    return bpf_redirect(trip->ifindex, 0);
}

char _license[] SEC("license") = "Apache-2.0";
