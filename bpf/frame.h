/* One frame on its way through a program at ingress, and whether its lengths and header checksum are what it says.
 *
 * Frames are checked as strictly as the slow path would send them: what is odd (bytes behind the UDP datagram,
 * no checksum in IPv6) goes there, so that all paths send the same bytes. */
#ifndef FRAME_H
#define FRAME_H

#include "defs.h"
#include "parse.h"

#define ETHERNET ((__u32)sizeof(struct ethhdr))

/* What each output's rewriting starts from, because the packet holds what the output before it left. */
struct frame {
    union {
        struct __sk_buff *skb; /* at tc */
        struct xdp_md *xdp;
    };
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
    __u8 returned; /* tc: it has been round */
    __u8 partial; /* tc: UDP's checksum may be partial */
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

/* Whether UDP's checksum is the sum of the pseudo-header alone, for hardware to complete: so are those of local
 * senders and of merged frames. One in 65,536 others looks like it. */
ALWAYS_INLINE _Bool looks_partial(const void *addresses, int words, const struct udphdr *udp)
{
    return udp->check == fold(sum_words(addresses, words) + htons(IPPROTO_UDP) + udp->len);
}

ALWAYS_INLINE _Bool looks_partial4(const struct head4 *head)
{
    return looks_partial(&head->ip.saddr, 2, &head->udp);
}

ALWAYS_INLINE _Bool looks_partial6(const struct head6 *head)
{
    return looks_partial(&head->ip.saddr, 8, &head->udp);
}

/* Whether the lengths in the headers say the same. */
ALWAYS_INLINE _Bool has_lengths4(const struct head4 *head)
{
    return ntohs(head->udp.len) + sizeof(head->ip) == ntohs(head->ip.tot_len);
}

ALWAYS_INLINE _Bool has_sum4(const struct head4 *head)
{
    return fold(sum_words(&head->ip, 5)) == 0xffff;
}

ALWAYS_INLINE _Bool is_sound6(const struct head6 *head)
{
    return head->udp.len == head->ip.payload_len && head->udp.check;
}

/* From the headers, which were found to be sound: all but the sizes. */
ALWAYS_INLINE void read_head4(struct frame *frame, const struct head4 *head)
{
    frame->source[0] = head->ip.saddr;
    frame->port = head->udp.source;
    frame->ttl = head->ip.ttl;
    frame->tos = head->ip.tos;
    frame->headers = sizeof(*head);
}

ALWAYS_INLINE void read_head6(struct frame *frame, const struct head6 *head)
{
    __builtin_memcpy(frame->source, &head->ip.saddr, sizeof(frame->source));
    frame->port = head->udp.source;
    frame->ttl = head->ip.hop_limit;
    frame->tos = ntohs(*(__be16 *)head) >> 4;
    frame->headers = sizeof(*head);
}

/* Set the sizes from IP's total length, in a frame of one datagram with `room` bytes behind the Ethernet header.
 * False: leave it to the slow path. */
ALWAYS_INLINE _Bool set_sizes(struct frame *frame, __u32 total, __u32 room)
{
    if (total < frame->headers || total > room)
        return 0;
    frame->payload = total - frame->headers;
    frame->size = total;
    frame->datagrams = 1;
    return 1;
}

#endif
