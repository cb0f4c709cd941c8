/* What an output makes of a frame's headers: link-layer addresses, IP and UDP, and IPv4's own checksum, which is
 * always whole and so is summed anew. UDP's is left to whoever calls, with what changed that it covers: only tc sees
 * partial ones. */
#ifndef OUTPUT_H
#define OUTPUT_H

#include "frame.h"

#define DONT_FRAGMENT 0x4000 /* of iphdr.frag_off: as UDP sockets send */

/* Differences in one's complement. Addresses are in UDP's pseudo-header, and ports in what it covers. */
struct change {
    __u64 addresses;
    __u64 start; /* of the first two words of IPv6's header, which no checksum covers; IPv4: 0 */
    __u32 from;  /* ports before and after */
    __u32 to;
};

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

ALWAYS_INLINE void set_ports(struct udphdr *udp, const struct output *output, struct change *change)
{
    __u32 *ports = (void *)udp;
    change->from = *ports;
    change->to = *ports = output->source_port | (__u32)output->port << 16;
}

/* A whole one, incrementally (RFC 1624); 0 says that there is none. The difference in the UDP header's own sum: the
 * ports' change, which a checksum takes off again, and the addresses' with it. */
ALWAYS_INLINE __u32 mend_whole(struct udphdr *udp, const struct change *change)
{
    __u64 ports = (__u64)(__u32)~change->from + change->to;
    if (!udp->check)
        return carry_in(ports);
    __u16 check = ~fold((__u16)~udp->check + change->addresses + ports);
    udp->check = check ?: 0xffff;
    return ~carry_in(change->addresses);
}

/* `eth` and the headers behind it lie in the packet, within bounds. */
ALWAYS_INLINE void write4(const struct frame *frame, const struct output *output, const struct hop *hop,
                          struct ethhdr *eth, struct change *change)
{
    struct head4 *head = (void *)(eth + 1);
    change->start = 0;
    change->addresses = sum_inverse(&head->ip.saddr, 2);
    set_ethernet(eth, output, hop, 0);
    head->ip.tos = tos_of(frame, output);
    head->ip.ttl = ttl_of(frame, output);
    head->ip.frag_off = htons(DONT_FRAGMENT);
    head->ip.saddr = *(const __u32 *)source_of(frame, output, hop);
    head->ip.daddr = *(const __u32 *)output->address;
    head->ip.check = 0;
    head->ip.check = ~fold(sum_words(&head->ip, 5));
    change->addresses += sum_words(&head->ip.saddr, 2);
    set_ports(&head->udp, output, change);
}

ALWAYS_INLINE void write6(const struct frame *frame, const struct output *output, const struct hop *hop,
                          struct ethhdr *eth, struct change *change)
{
    struct head6 *head = (void *)(eth + 1);
    change->start = sum_inverse(head, 2);
    change->addresses = sum_inverse(&head->ip.saddr, 8);
    set_ethernet(eth, output, hop, 1);
    __be32 *word = (void *)head; /* version, traffic class, flow label */
    *word = (*word & ~htonl(0xff << 20)) | htonl((__u32)tos_of(frame, output) << 20);
    head->ip.hop_limit = ttl_of(frame, output);
    __builtin_memcpy(&head->ip.saddr, source_of(frame, output, hop), 16);
    __builtin_memcpy(&head->ip.daddr, output->address, 16);
    change->start += sum_words(head, 2);
    change->addresses += sum_words(&head->ip.saddr, 8);
    set_ports(&head->udp, output, change);
}

#endif
