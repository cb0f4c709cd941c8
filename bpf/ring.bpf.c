/* The filters of the slow path's rings: which of the frames that `relay` passed on go to this worker's.
 *
 * Frames are let in when a rule on their interface names their destination; they are numbered, and a flow that is
 * installed keeps the number of its last, so that `relay` overtakes none of them. One object for each worker. */
#include "maps.h"
#include "parse.h"
#include "wanted.h"

#define WHOLE 0xffffffffU /* how many bytes to keep; 0 drops */

const volatile __u32 worker = 0; /* both set by the loader */
const volatile __u32 short_bytes = 0; /* the longest frame, link-layer header included, of the ring for short ones */

ALWAYS_INLINE _Bool load_head(const struct __sk_buff *skb, void *to, __u32 size)
{
    return !bpf_skb_load_bytes_relative(skb, 0, to, size, BPF_HDR_START_NET);
}

ALWAYS_INLINE struct flow *flow_of4(const struct __sk_buff *skb, __u16 vlan)
{
    struct head4 head;
    struct flow4_key key;
    if (!load_head(skb, &head, sizeof(head)) || !is_plain4(&head.ip))
        return 0;
    read_key4(&key, skb->ifindex, vlan, &head);
    return bpf_map_lookup_elem(&flows4, &key);
}

ALWAYS_INLINE struct flow *flow_of6(const struct __sk_buff *skb, __u16 vlan)
{
    struct head6 head;
    struct flow6_key key;
    if (!load_head(skb, &head, sizeof(head)) || !is_plain6(&head.ip))
        return 0;
    read_key6(&key, skb->ifindex, vlan, &head);
    return bpf_map_lookup_elem(&flows6, &key);
}

/* TAIL_UNKNOWN stays: `relay` replaces it by what `accepted` then is, which counts this frame. */
ALWAYS_INLINE void enter(struct flow *flow, __u64 number, _Bool counted)
{
    if (!flow)
        return;
    if (READ_ONCE(flow->tail) != TAIL_UNKNOWN)
        flow->tail = number;
    if (counted)
        __sync_fetch_and_add(&flow->entered, 1);
}

/* Whether `relay` marked it with this bit. */
ALWAYS_INLINE _Bool is_marked(const struct __sk_buff *skb, __u32 bit)
{
    return IS_OURS(skb->tc_index) && skb->tc_index & bit;
}

/* False: refuse it, for it comes with a VLAN that `relay` did not write. */
ALWAYS_INLINE _Bool read_vlan(const struct __sk_buff *skb, __u16 *vlan)
{
    struct told told;
    if (bpf_skb_load_bytes_relative(skb, 0, &told, offsetof(struct told, vlan) + sizeof(told.vlan), BPF_HDR_START_MAC))
        return 0;
    _Bool tagged = is_marked(skb, TAGGED);
    *vlan = tagged ? told.vlan : 0;
    return tagged == (told.mark == VLAN_MARK);
}

ALWAYS_INLINE __u32 let_in(const struct __sk_buff *skb, _Bool is_long)
{
    _Bool six = skb->protocol == htons(ETH_P_IPV6);
    __u32 index = worker;
    __u16 vlan;
    struct progress *slow = bpf_map_lookup_elem(&progress, &index);
    if (!slow || !read_vlan(skb, &vlan) || !is_wanted(skb, six))
        return 0;
    if (is_long)
        __sync_fetch_and_add(&slow->accepted_long, 1);
    __u64 number = __sync_fetch_and_add(&slow->accepted, 1) + 1;
    enter(six ? flow_of6(skb, vlan) : flow_of4(skb, vlan), number, is_marked(skb, COUNTED));
    return WHOLE;
}

ALWAYS_INLINE _Bool is_ip(const struct __sk_buff *skb)
{
    return (skb->protocol == htons(ETH_P_IP) || skb->protocol == htons(ETH_P_IPV6)) && !is_marked(skb, FOREIGN);
}

/* Fragments are put together before the other filter; one defragmenter must not get each twice. */
SEC("socket") int ring_short(struct __sk_buff *skb)
{
    _Bool is_mine = skb->len <= short_bytes && !is_marked(skb, FRAGMENT);
    return is_ip(skb) && is_mine ? let_in(skb, 0) : 0;
}

SEC("socket") int ring_long(struct __sk_buff *skb)
{
    _Bool is_mine = skb->len > short_bytes || is_marked(skb, FRAGMENT);
    return is_ip(skb) && is_mine ? let_in(skb, 1) : 0;
}

char _license[] SEC("license") = "Apache-2.0";
