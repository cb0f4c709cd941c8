/* One frame on its way through `relay`, and whether its lengths and checksum are what it says.
 *
 * Frames are checked as strictly as the slow path would send them: what is odd (bytes behind the UDP datagram,
 * no checksum in IPv6) goes there, so that both paths send the same bytes. */
#ifndef FRAME_H
#define FRAME_H

#include "defs.h"
#include "parse.h"

#define ETHERNET ((__u32)sizeof(struct ethhdr))

/* What each output's rewriting starts from, because the packet holds what the output before it left. */
struct frame {
    struct __sk_buff *skb;
    __u32 source[4]; /* IPv4 in the first */
    __u32 headers;   /* bytes of IP and UDP header: 28 or 48 */
    __u32 payload;   /* bytes of UDP payload, of all segments */
    __u32 size;      /* IP bytes of the largest datagram */
    __u32 datagrams; /* segments, 1 for a frame that is not merged */
    __u32 start;     /* its outputs: route[start] ... */
    __u32 reason;    /* of the last output looked at: enum passed, or CARRIED */
    __be16 port;     /* source port */
    __u8 ttl;
    __u8 tos; /* or traffic class */
};

ALWAYS_INLINE __u16 fold(__u64 sum)
{
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return (sum & 0xffff) + (sum >> 16);
}

ALWAYS_INLINE __u64 sum_words(const void *from, int words)
{
    const __u32 *word = from;
    __u64 sum = 0;
    for (int i = 0; i < words; i++)
        sum += word[i];
    return sum;
}

/* Set the sizes from IP's total length. False: leave it to the slow path. */
ALWAYS_INLINE _Bool set_sizes(struct frame *frame, __u32 total)
{
    struct __sk_buff *skb = frame->skb;
    __u32 room = skb->len - ETHERNET, segment = skb->gso_size;
    if (total < frame->headers || total > room || (segment && total != room))
        return 0;
    frame->payload = total - frame->headers;
    frame->size = segment ? segment + frame->headers : total;
    frame->datagrams = 1;
    if (segment) /* who injects a merged frame (tun, a guest) need not say how many there are */
        frame->datagrams = skb->gso_segs ?: (frame->payload + segment - 1) / segment;
    return 1;
}

/* Cut off what Ethernet padded: not every link that the frame goes to has padding. False: no memory. Packet
 * pointers are invalid afterwards. */
ALWAYS_INLINE _Bool trim(const struct frame *frame)
{
    __u32 len = ETHERNET + frame->headers + frame->payload;
    return frame->skb->len == len || !bpf_skb_change_tail(frame->skb, len, 0);
}

/* The IP header, `len` bytes of headers from there are linear; NULL if the frame is too short. */
ALWAYS_INLINE void *network_header(struct __sk_buff *skb, __u32 len)
{
    if ((void *)(long)skb->data + ETHERNET + len > (void *)(long)skb->data_end &&
        bpf_skb_pull_data(skb, ETHERNET + len))
        return 0;
    void *ip = (void *)(long)skb->data + ETHERNET;
    return ip + len > (void *)(long)skb->data_end ? 0 : ip;
}

/* Fill both from the packet. False: leave it to the slow path. */
ALWAYS_INLINE _Bool read_frame4(struct frame *frame, struct flow4_key *key)
{
    struct iphdr *ip = network_header(frame->skb, sizeof(*ip));
    if (!ip || !is_plain4(ip)) /* most foreign traffic leaves here */
        return 0;
    struct head4 *head = network_header(frame->skb, sizeof(*head));
    if (!head || ntohs(head->udp.len) + sizeof(*ip) != ntohs(head->ip.tot_len))
        return 0;
    if (!frame->skb->gso_size && fold(sum_words(&head->ip, 5)) != 0xffff) /* GRO has checked merged frames */
        return 0;
    read_key4(key, frame->skb, head);
    frame->source[0] = head->ip.saddr;
    frame->port = head->udp.source;
    frame->ttl = head->ip.ttl;
    frame->tos = head->ip.tos;
    frame->headers = sizeof(*head);
    return set_sizes(frame, ntohs(head->ip.tot_len));
}

ALWAYS_INLINE _Bool read_frame6(struct frame *frame, struct flow6_key *key)
{
    struct ipv6hdr *ip = network_header(frame->skb, sizeof(*ip));
    if (!ip || !is_plain6(ip))
        return 0;
    struct head6 *head = network_header(frame->skb, sizeof(*head));
    if (!head || head->udp.len != head->ip.payload_len || !head->udp.check)
        return 0;
    read_key6(key, frame->skb, head);
    __builtin_memcpy(frame->source, &head->ip.saddr, sizeof(frame->source));
    frame->port = head->udp.source;
    frame->ttl = head->ip.hop_limit;
    frame->tos = ntohs(*(__be16 *)head) >> 4;
    frame->headers = sizeof(*head);
    return set_sizes(frame, ntohs(head->ip.payload_len) + sizeof(*ip));
}

#endif
