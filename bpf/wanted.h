/* Whether a rule on a frame's interface names its destination: what the slow path's rings let in. */
#ifndef WANTED_H
#define WANTED_H

#include "maps.h"

#define PREFIX_BEFORE_ADDRESS 64 /* bits of range_key: ifindex and family */

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

#endif
