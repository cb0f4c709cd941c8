/* A frame as tc has it: not all of it is linear, and it may be a merged one. */
#ifndef SKB_H
#define SKB_H

#include "frame.h"

/* As set_sizes, for a frame that may be of several segments. */
ALWAYS_INLINE _Bool set_merged_sizes(struct frame *frame, __u32 total)
{
    struct __sk_buff *skb = frame->skb;
    __u32 room = skb->len - ETHERNET, segment = skb->gso_size;
    if (!set_sizes(frame, total, room) || (segment && total != room))
        return 0;
    if (segment) { /* who injects a merged frame (tun, a guest) need not say how many there are */
        frame->size = segment + frame->headers;
        frame->datagrams = skb->gso_segs ?: (frame->payload + segment - 1) / segment;
    }
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
    struct __sk_buff *skb = frame->skb;
    struct iphdr *ip = network_header(skb, sizeof(*ip));
    if (!ip || !is_plain4(ip)) /* most foreign traffic leaves here */
        return 0;
    struct head4 *head = network_header(skb, sizeof(*head));
    if (!head || !has_lengths4(head) || (!skb->gso_size && !has_sum4(head))) /* GRO has checked merged frames */
        return 0;
    read_key4(key, skb->ifindex, vlan_of(skb), head);
    read_head4(frame, head);
    frame->partial = looks_partial4(head);
    return set_merged_sizes(frame, ntohs(head->ip.tot_len));
}

ALWAYS_INLINE _Bool read_frame6(struct frame *frame, struct flow6_key *key)
{
    struct __sk_buff *skb = frame->skb;
    struct ipv6hdr *ip = network_header(skb, sizeof(*ip));
    if (!ip || !is_plain6(ip))
        return 0;
    struct head6 *head = network_header(skb, sizeof(*head));
    if (!head || !is_sound6(head))
        return 0;
    read_key6(key, skb->ifindex, vlan_of(skb), head);
    read_head6(frame, head);
    frame->partial = looks_partial6(head);
    return set_merged_sizes(frame, ntohs(head->ip.payload_len) + sizeof(*ip));
}

#endif
