/* From a frame's headers to the key of its flow, for every program. The headers may lie in the packet (tc,
 * XDP) or on the stack (rings' filters). */
#ifndef PARSE_H
#define PARSE_H

#include "defs.h"
#include "mrelay.h"

#define ANY_FRAGMENT 0x3fff /* of iphdr.frag_off: more fragments, or an offset */
#define PLAIN4 0x45         /* first byte of an IPv4 header without options */

/* What the rings' filters can't see, `relay` writes into skb->tc_index of frames that it passes on: OURS and bits. */
#define OURS 0x6d70
#define FRAGMENT 1 /* of an IPv4 datagram; what the kernel puts together keeps the mark */
#define COUNTED 2  /* in `left` of its flow */
#define TAGGED 4   /* it had a VLAN tag, which the kernel takes off in between: `struct told` says which */
#define FOREIGN 8  /* the same, but no rule names its destination */
#define IS_OURS(mark) (((mark) & 0xfff0) == OURS)

#define PLAIN6 0x60         /* first byte of an IPv6 header, traffic class left out */

struct head4 {
    struct iphdr ip;
    struct udphdr udp;
};

struct head6 {
    struct ipv6hdr ip;
    struct udphdr udp;
};

/* In place of the destination's link-layer address, which says nothing that the slow path wants to know. */
struct told {
    __u32 mark; /* VLAN_MARK */
    __u16 vlan;
};

/* 0 for a tag that gives a priority only. */
ALWAYS_INLINE __u16 vlan_of(const struct __sk_buff *skb)
{
    return skb->vlan_present ? skb->vlan_tci & 0xfff : 0;
}

/* UDP in IPv4, whole, and without options: what a flow's key can be read from. */
ALWAYS_INLINE _Bool is_plain4(const struct iphdr *ip)
{
    return *(const __u8 *)ip == PLAIN4 && ip->protocol == IPPROTO_UDP && !(ip->frag_off & htons(ANY_FRAGMENT));
}

/* The same for IPv6: UDP follows, without extension headers. */
ALWAYS_INLINE _Bool is_plain6(const struct ipv6hdr *ip)
{
    return (*(const __u8 *)ip & 0xf0) == PLAIN6 && ip->nexthdr == IPPROTO_UDP;
}

ALWAYS_INLINE void read_key4(struct flow4_key *key, __u32 ifindex, __u16 vlan, const struct head4 *head)
{
    key->source = head->ip.saddr;
    key->group = head->ip.daddr;
    key->ifindex = ifindex;
    key->port = head->udp.dest;
    key->vlan = vlan;
}

ALWAYS_INLINE void read_key6(struct flow6_key *key, __u32 ifindex, __u16 vlan, const struct head6 *head)
{
    __builtin_memcpy(key->source, &head->ip.saddr, sizeof(key->source));
    __builtin_memcpy(key->group, &head->ip.daddr, sizeof(key->group));
    key->ifindex = ifindex;
    key->port = head->udp.dest;
    key->vlan = vlan;
}

#endif
