/* For test_checksums.py: leaves what the kernel believes that the sum of a datagram to one of two ports is. */
#include "defs.h"

#define BEFORE 5000
#define AFTER 6000

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __uint(map_flags, BPF_F_MMAPABLE);
    __type(key, __u32);
    __type(value, __s64);
} sum SEC(".maps");

SEC("tc") int look(struct __sk_buff *skb)
{
    __u32 zero = 0, at = skb->protocol == htons(ETH_P_IP) ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
    __s64 *value = bpf_map_lookup_elem(&sum, &zero);
    struct udphdr udp;
    if (value && !bpf_skb_load_bytes_relative(skb, at, &udp, sizeof(udp), BPF_HDR_START_NET) &&
        (udp.dest == htons(BEFORE) || udp.dest == htons(AFTER)))
        *value = bpf_csum_update(skb, 0); /* skb->csum; negative when there is none */
    return TC_ACT_UNSPEC;
}

char _license[] SEC("license") = "Apache-2.0";
