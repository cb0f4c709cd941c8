/* Makes a frame what an output wants it to be: link-layer addresses, IP and UDP headers, checksums.
 *
 * IPv4's header checksum is always whole, so it is summed anew. UDP's may be whole, partial (a local sender,
 * merged frames) or not there at all (IPv4), and the kernel may hold a sum of the packet in skb->csum: only
 * bpf_l4_csum_replace knows which. Addresses are in the pseudo-header, ports are not: of a partial checksum
 * only the former are part. */
#ifndef REWRITE_H
#define REWRITE_H

#include "frame.h"
#include "maps.h"

#define DONT_FRAGMENT 0x4000 /* of iphdr.frag_off: as UDP sockets send */

/* A 32-bit sum, from one's complement additions of such. */
ALWAYS_INLINE __u32 carry_in(__u64 sum)
{
    sum = (sum & 0xffffffff) + (sum >> 32);
    return (sum & 0xffffffff) + (sum >> 32);
}

ALWAYS_INLINE __u64 sum_inverse(const void *from, int words)
{
    const __u32 *word = from;
    __u64 sum = 0;
    for (int i = 0; i < words; i++)
        sum += (__u32)~word[i];
    return sum;
}

ALWAYS_INLINE _Bool is_zero(const __u8 *address)
{
    const __u64 *half = (const void *)address;
    return !(half[0] | half[1]);
}

/* The source address that `output` sends from. */
ALWAYS_INLINE const void *source_of(const struct frame *frame, const struct output *output, const struct hop *hop)
{
    if (output->keep)
        return frame->source;
    return is_zero(output->source) ? hop->source : output->source;
}

ALWAYS_INLINE __u8 ttl_of(const struct frame *frame, const struct output *output)
{
    return output->ttl ?: frame->ttl - 1;
}

ALWAYS_INLINE __u8 tos_of(const struct frame *frame, const struct output *output)
{
    return output->dscp == DSCP_KEEP ? frame->tos : (output->dscp << 2) | (frame->tos & 3);
}

/* RFC 1112 §6.4, RFC 2464 §7 */
ALWAYS_INLINE void set_ethernet(struct ethhdr *eth, const struct output *output, const struct hop *hop, _Bool six)
{
    const __u8 *to = output->address;
    __builtin_memcpy(eth->h_source, hop->own_mac, sizeof(eth->h_source));
    if (!output->multicast) {
        __builtin_memcpy(eth->h_dest, hop->mac, sizeof(eth->h_dest));
    } else if (six) {
        __u8 mac[] = {0x33, 0x33, to[12], to[13], to[14], to[15]};
        __builtin_memcpy(eth->h_dest, mac, sizeof(mac));
    } else {
        __u8 mac[] = {0x01, 0x00, 0x5e, to[1] & 0x7f, to[2], to[3]};
        __builtin_memcpy(eth->h_dest, mac, sizeof(mac));
    }
}

/* The UDP checksum after the addresses changed by `addresses`, and the ports. Packet pointers are invalid
 * afterwards. */
ALWAYS_INLINE void mend_checksum(struct __sk_buff *skb, __u32 udp, __u32 addresses, __u32 from, __u32 to)
{
    __u32 check = ETHERNET + udp + offsetof(struct udphdr, check);
    bpf_l4_csum_replace(skb, check, 0, addresses, BPF_F_PSEUDO_HDR | BPF_F_MARK_MANGLED_0);
    if (from != to)
        bpf_l4_csum_replace(skb, check, from, to, BPF_F_MARK_MANGLED_0 | sizeof(to));
}

ALWAYS_INLINE _Bool rewrite4(const struct frame *frame, const struct output *output, const struct hop *hop)
{
    struct ethhdr *eth = (void *)(long)frame->skb->data;
    struct head4 *head = (void *)(eth + 1);
    if ((void *)(head + 1) > (void *)(long)frame->skb->data_end)
        return 0;
    __u32 *ports = (void *)&head->udp, from = *ports, to = output->source_port | (__u32)output->port << 16;
    __u64 addresses = sum_inverse(&head->ip.saddr, 2);
    set_ethernet(eth, output, hop, 0);
    head->ip.tos = tos_of(frame, output);
    head->ip.ttl = ttl_of(frame, output);
    head->ip.frag_off = htons(DONT_FRAGMENT);
    head->ip.saddr = *(const __u32 *)source_of(frame, output, hop);
    head->ip.daddr = *(const __u32 *)output->address;
    head->ip.check = 0;
    head->ip.check = ~fold(sum_words(&head->ip, 5));
    *ports = to;
    addresses += sum_words(&head->ip.saddr, 2);
    mend_checksum(frame->skb, sizeof(head->ip), carry_in(addresses), from, to);
    return 1;
}

/* Nothing in IPv6's header balances a change of it in skb->csum, and bpf_l4_csum_replace takes the addresses off
 * as if something did (its BPF_F_IPV6 came with Linux 6.16): bpf_csum_update adds both. It does nothing when
 * there is no such sum. */
ALWAYS_INLINE _Bool rewrite6(const struct frame *frame, const struct output *output, const struct hop *hop)
{
    struct ethhdr *eth = (void *)(long)frame->skb->data;
    struct head6 *head = (void *)(eth + 1);
    if ((void *)(head + 1) > (void *)(long)frame->skb->data_end)
        return 0;
    __u32 *ports = (void *)&head->udp, from = *ports, to = output->source_port | (__u32)output->port << 16;
    __u64 start = sum_inverse(head, 2), addresses = sum_inverse(&head->ip.saddr, 8);
    set_ethernet(eth, output, hop, 1);
    __be32 *word = (void *)head; /* version, traffic class, flow label */
    *word = (*word & ~htonl(0xff << 20)) | htonl((__u32)tos_of(frame, output) << 20);
    head->ip.hop_limit = ttl_of(frame, output);
    __builtin_memcpy(&head->ip.saddr, source_of(frame, output, hop), 16);
    __builtin_memcpy(&head->ip.daddr, output->address, 16);
    *ports = to;
    start += sum_words(head, 2);
    addresses += sum_words(&head->ip.saddr, 8);
    mend_checksum(frame->skb, sizeof(head->ip), carry_in(addresses), from, to);
    bpf_csum_update(frame->skb, carry_in(start + addresses));
    return 1;
}

/* The interface that the frame, rewritten, leaves by; 0 if that is not known any more. */
ALWAYS_INLINE __u32 rewrite(const struct frame *frame, const struct output *output)
{
    __u32 number = output->hop;
    struct hop *hop = bpf_map_lookup_elem(&hops, &number);
    if (!hop)
        return 0;
    _Bool six = frame->headers == sizeof(struct head6);
    return (six ? rewrite6(frame, output, hop) : rewrite4(frame, output, hop)) ? hop->ifindex : 0;
}

#endif
