/* Makes a frame at tc what an output wants it to be.
 *
 * UDP's checksum may be whole, partial (a local sender, merged frames) or not there at all (IPv4), and the kernel
 * may hold a sum of the packet in skb->csum: only bpf_l4_csum_replace knows which. Addresses are in the
 * pseudo-header, ports are not: of a partial checksum only the former are part. */
#ifndef REWRITE_H
#define REWRITE_H

#include "judge.h"

/* The UDP checksum after a change. Packet pointers are invalid afterwards. */
ALWAYS_INLINE void mend_checksum(struct __sk_buff *skb, __u32 ip, const struct change *change)
{
    __u32 check = ETHERNET + ip + offsetof(struct udphdr, check);
    bpf_l4_csum_replace(skb, check, 0, carry_in(change->addresses), BPF_F_PSEUDO_HDR | BPF_F_MARK_MANGLED_0);
    if (change->from != change->to)
        bpf_l4_csum_replace(skb, check, change->from, change->to, BPF_F_MARK_MANGLED_0 | sizeof(change->to));
}

ALWAYS_INLINE _Bool rewrite4(const struct frame *frame, const struct output *output, const struct hop *hop)
{
    struct ethhdr *eth = (void *)(long)frame->skb->data;
    struct change change;
    if ((void *)(eth + 1) + sizeof(struct head4) > (void *)(long)frame->skb->data_end)
        return 0;
    write4(frame, output, hop, eth, &change);
    mend_checksum(frame->skb, sizeof(struct iphdr), &change);
    return 1;
}

/* Nothing in IPv6's header balances a change of it in skb->csum, and bpf_l4_csum_replace takes the addresses off
 * as if something did (its BPF_F_IPV6 came with Linux 6.16): bpf_csum_update adds both. It does nothing when
 * there is no such sum. */
ALWAYS_INLINE _Bool rewrite6(const struct frame *frame, const struct output *output, const struct hop *hop)
{
    struct ethhdr *eth = (void *)(long)frame->skb->data;
    struct change change;
    if ((void *)(eth + 1) + sizeof(struct head6) > (void *)(long)frame->skb->data_end)
        return 0;
    write6(frame, output, hop, eth, &change);
    mend_checksum(frame->skb, sizeof(struct ipv6hdr), &change);
    bpf_csum_update(frame->skb, carry_in(change.start + change.addresses));
    return 1;
}

/* The interface that the frame, rewritten, leaves by; 0 if that is not known any more. */
ALWAYS_INLINE __u32 rewrite(const struct frame *frame, const struct output *output)
{
    struct hop *hop = hop_of(output);
    if (!hop)
        return 0;
    _Bool six = frame->headers == sizeof(struct head6);
    return (six ? rewrite6(frame, output, hop) : rewrite4(frame, output, hop)) ? hop->ifindex : 0;
}

#endif
