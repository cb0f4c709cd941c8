/* Makes a frame at tc what an output wants it to be.
 *
 * UDP's checksum may be whole, partial (a local sender, merged frames) or not there at all (IPv4), and the kernel
 * may hold a sum of the packet in skb->csum. Only bpf_l4_csum_replace knows which, but it takes two calls where a few
 * sums do: so it is left to frames that look partial. */
#ifndef REWRITE_H
#define REWRITE_H

#include "judge.h"

/* The UDP checksum after a change, if it may be partial. Addresses are in the pseudo-header, ports are not: of a
 * partial checksum only the former are part. Packet pointers are invalid afterwards. */
ALWAYS_INLINE void mend_any(struct __sk_buff *skb, __u32 ip, const struct change *change)
{
    __u32 check = ETHERNET + ip + offsetof(struct udphdr, check);
    bpf_l4_csum_replace(skb, check, 0, carry_in(change->addresses), BPF_F_PSEUDO_HDR | BPF_F_MARK_MANGLED_0);
    if (change->from != change->to)
        bpf_l4_csum_replace(skb, check, change->from, change->to, BPF_F_MARK_MANGLED_0 | sizeof(change->to));
}

/* bpf_csum_update changes skb->csum, and does nothing when there is no such sum. IPv4's header balances itself. */
ALWAYS_INLINE _Bool rewrite4(const struct frame *frame, const struct output *output, const struct hop *hop)
{
    struct ethhdr *eth = (void *)(long)frame->skb->data;
    struct head4 *head = (void *)(eth + 1);
    struct change change;
    if ((void *)(head + 1) > (void *)(long)frame->skb->data_end)
        return 0;
    write4(frame, output, hop, eth, &change);
    if (frame->partial)
        mend_any(frame->skb, sizeof(head->ip), &change);
    else
        bpf_csum_update(frame->skb, mend_whole(&head->udp, &change));
    return 1;
}

/* IPv6's header balances nothing; bpf_l4_csum_replace takes the addresses off as if it did (its BPF_F_IPV6 came with
 * Linux 6.16). */
ALWAYS_INLINE _Bool rewrite6(const struct frame *frame, const struct output *output, const struct hop *hop)
{
    struct ethhdr *eth = (void *)(long)frame->skb->data;
    struct head6 *head = (void *)(eth + 1);
    struct change change;
    if ((void *)(head + 1) > (void *)(long)frame->skb->data_end)
        return 0;
    write6(frame, output, hop, eth, &change);
    __u64 changed = change.start + change.addresses;
    if (frame->partial)
        mend_any(frame->skb, sizeof(head->ip), &change);
    else
        changed += mend_whole(&head->udp, &change);
    bpf_csum_update(frame->skb, carry_in(changed));
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
