/* The filters of the slow path's rings: which of the frames that `relay` passed on go to this worker's.
 *
 * Frames are let in when a rule on their interface names their destination; they are numbered, and a flow that is
 * installed keeps the number of its last, so that `relay` overtakes none of them. One object for each worker. */
#include "maps.h"
#include "parse.h"

#define WHOLE 0xffffffffU /* how many bytes to keep; 0 drops */
#define PREFIX_BEFORE_ADDRESS 64 /* bits of range_key: ifindex and family */

const volatile __u32 worker = 0; /* both set by the loader */
const volatile __u32 short_bytes = 0; /* the longest frame, link-layer header included, of the ring for short ones */

ALWAYS_INLINE _Bool load_head(const struct __sk_buff *skb, void *to, __u32 size)
{
    return !bpf_skb_load_bytes_relative(skb, 0, to, size, BPF_HDR_START_NET);
}

ALWAYS_INLINE _Bool is_wanted(const struct __sk_buff *skb, _Bool six)
{
    struct range_key key = {.ifindex = skb->ifindex, .family = six ? 6 : 4};
    __u32 bytes = six ? 16 : 4;
    __u32 at = six ? offsetof(struct ipv6hdr, daddr) : offsetof(struct iphdr, daddr);
    key.prefixlen = PREFIX_BEFORE_ADDRESS + 8 * bytes;
    if (bpf_skb_load_bytes_relative(skb, at, key.address, bytes, BPF_HDR_START_NET))
        return 0;
    return bpf_map_lookup_elem(&ranges, &key) != 0;
}

ALWAYS_INLINE struct flow *flow_of4(const struct __sk_buff *skb)
{
    struct head4 head;
    struct flow4_key key;
    if (!load_head(skb, &head, sizeof(head)) || !is_plain4(&head.ip))
        return 0;
    read_key4(&key, skb->ifindex, vlan_of(skb), &head);
    return bpf_map_lookup_elem(&flows4, &key);
}

ALWAYS_INLINE struct flow *flow_of6(const struct __sk_buff *skb)
{
    struct head6 head;
    struct flow6_key key;
    if (!load_head(skb, &head, sizeof(head)) || !is_plain6(&head.ip))
        return 0;
    read_key6(&key, skb->ifindex, vlan_of(skb), &head);
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

ALWAYS_INLINE __u32 let_in(const struct __sk_buff *skb, _Bool is_long)
{
    _Bool six = skb->protocol == htons(ETH_P_IPV6);
    __u32 index = worker;
    struct progress *slow = bpf_map_lookup_elem(&progress, &index);
    if (!slow || !is_wanted(skb, six))
        return 0;
    if (is_long)
        __sync_fetch_and_add(&slow->accepted_long, 1);
    __u64 number = __sync_fetch_and_add(&slow->accepted, 1) + 1;
    enter(six ? flow_of6(skb) : flow_of4(skb), number, skb->tc_index == COUNTED);
    return WHOLE;
}

ALWAYS_INLINE _Bool is_untagged_ip(const struct __sk_buff *skb)
{
    return (skb->protocol == htons(ETH_P_IP) || skb->protocol == htons(ETH_P_IPV6)) && skb->tc_index != TAGGED;
}

/* Fragments are put together before the other filter; one defragmenter must not get each twice. */
SEC("socket") int ring_short(struct __sk_buff *skb)
{
    _Bool is_mine = skb->len <= short_bytes && skb->tc_index != FRAGMENT;
    return is_untagged_ip(skb) && is_mine ? let_in(skb, 0) : 0;
}

SEC("socket") int ring_long(struct __sk_buff *skb)
{
    _Bool is_mine = skb->len > short_bytes || skb->tc_index == FRAGMENT;
    return is_untagged_ip(skb) && is_mine ? let_in(skb, 1) : 0;
}

char _license[] SEC("license") = "Apache-2.0";
