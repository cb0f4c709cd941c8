/* The fast path (tc) and the slow path's socket filter, which read one map of flows.
 *
 * A flow that is in the map, and due, is rewritten and redirected by `relay`; everything else goes on, and the
 * slow path's AF_PACKET socket gets it. Who decides, and how often, is the experiment:
 *
 *   relay + after      the socket is bound to ETH_P_IP, so it sees what relay let pass. One decision.
 *   relay + lookup     the socket is bound to ETH_P_ALL, so it sees frames before relay does, and its filter
 *                      looks each up as well. Two decisions, some hundred nanoseconds apart.
 *   obey + mark        ETH_P_ALL as well, but the filter writes its verdict into the packet (skb->cb).
 */
#include "bpf_defs.h"

/* ---- shared with Python (flow_map_layout.py) ---- */

struct flow_key {
    __u32 ifindex;
    __be32 source;
    __be32 group;
    __be16 port;
    __u16 vlan; /* VLAN identifier, 0 without a tag */
};

enum flow_state { FLOW_FAST = 1, FLOW_WHEN_DRAINED = 2 };

struct flow {
    __u64 tail; /* kernel's: the number of the last frame that the slow path may still have; 0: not known */
    __u32 state;
    __u32 route; /* index into `routes` */
};

struct output {
    __u32 ifindex;
    __be32 source;
    __be32 group;
    __be16 source_port;
    __be16 port;
    __u8 destination_mac[6];
    __u8 source_mac[6];
    __u8 ttl;
    __u8 reserved[3];
};

#define MAX_OUTPUTS 4
struct route {
    __u32 count;
    struct output outputs[MAX_OUTPUTS];
};

/* How far the slow path is; each writer has a cache line of its own. */
struct progress {
    __u64 accepted; /* kernel's: frames that the filter let into the ring */
    __u64 pad[7];
    __u64 drained; /* slow path's: value of `accepted` when it last had sent all of them on */
    __u64 pad2[7];
};

struct counters {
    __u64 frames;    /* forwarded by relay */
    __u64 datagrams; /* the same, segments of merged frames counted each */
    __u64 passed;    /* frames left to the slow path */
    __u64 unmarked;  /* frames that came to `obey` without a verdict */
};

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 65536);
    __type(key, struct flow_key);
    __type(value, struct flow);
} flows SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 64);
    __type(key, __u32);
    __type(value, struct route);
} routes SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __uint(map_flags, BPF_F_MMAPABLE);
    __type(key, __u32);
    __type(value, struct progress);
} progress SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, struct counters);
} counters SEC(".maps");

/* ---- the key, for both program types ---- */

#define PASS TCX_NEXT /* as TC_ACT_UNSPEC: the next program, and in the end the IP stack */
#define WHOLE 0xffffffffU
#define NOT_FIRST_OR_MORE 0x3fff /* of iphdr.frag_off: any fragment */

/* False for what is no plain UDP datagram in IPv4. */
ALWAYS_INLINE _Bool read_key(struct __sk_buff *skb, struct flow_key *key)
{
    struct {
        struct iphdr ip;
        struct udphdr udp;
    } head;
    if (skb->protocol != htons(ETH_P_IP))
        return 0;
    if (bpf_skb_load_bytes_relative(skb, 0, &head, sizeof(head), BPF_HDR_START_NET))
        return 0;
    if (head.ip.version != 4 || head.ip.ihl != 5 || head.ip.protocol != IPPROTO_UDP ||
        head.ip.frag_off & htons(NOT_FIRST_OR_MORE))
        return 0;
    key->ifindex = skb->ifindex;
    key->source = head.ip.saddr;
    key->group = head.ip.daddr;
    key->port = head.udp.dest;
    key->vlan = skb->vlan_present ? skb->vlan_tci & 0xfff : 0;
    return 1;
}

/* ---- forwarding ---- */

ALWAYS_INLINE int rewrite(struct __sk_buff *skb, const struct output *out)
{
    void *end = (void *)(long)skb->data_end;
    struct ethhdr *eth = (void *)(long)skb->data;
    struct iphdr *ip = (void *)(eth + 1);
    struct udphdr *udp = (void *)(ip + 1);
    if ((void *)(udp + 1) > end)
        return -1;
    __u16 *ttl = (void *)&ip->ttl; /* the 16-bit word of TTL and protocol */
    __be32 from[] = {ip->saddr, ip->daddr, *ttl}, *ports = (void *)udp, old_ports = *ports;
    __builtin_memcpy(eth->h_dest, out->destination_mac, sizeof(eth->h_dest));
    __builtin_memcpy(eth->h_source, out->source_mac, sizeof(eth->h_source));
    ip->saddr = out->source;
    ip->daddr = out->group;
    ip->ttl = out->ttl;
    udp->source = out->source_port;
    udp->dest = out->port;
    __be32 to[] = {ip->saddr, ip->daddr, *ttl}, new_ports = *ports;
    /* Addresses are in the pseudo-header, ports are not: of a partial checksum only the former are part. */
    __s64 addresses = bpf_csum_diff(from, 8, to, 8, 0), header = bpf_csum_diff(from, 12, to, 12, 0);
    __u32 check = UDP_OFFSET + offsetof(struct udphdr, check);
    bpf_l3_csum_replace(skb, IP_OFFSET + offsetof(struct iphdr, check), 0, header, 0);
    bpf_l4_csum_replace(skb, check, 0, addresses, BPF_F_PSEUDO_HDR | BPF_F_MARK_MANGLED_0);
    bpf_l4_csum_replace(skb, check, old_ports, new_ports, BPF_F_MARK_MANGLED_0 | sizeof(new_ports));
    return 0;
}

ALWAYS_INLINE int forward(struct __sk_buff *skb, __u32 index)
{
    __u32 zero = 0;
    struct route *route = bpf_map_lookup_elem(&routes, &index);
    struct counters *count = bpf_map_lookup_elem(&counters, &zero);
    if (!route || !count || bpf_skb_pull_data(skb, PAYLOAD_OFFSET))
        return TC_ACT_SHOT;
    count->frames++;
    count->datagrams += skb->gso_segs ?: 1;
    for (__u32 i = 0; i < MAX_OUTPUTS && i < route->count; i++) {
        const struct output *out = &route->outputs[i];
        if (rewrite(skb, out))
            return TC_ACT_SHOT;
        if (i + 1 == route->count)
            return bpf_redirect(out->ifindex, 0);
        bpf_clone_redirect(skb, out->ifindex, 0); /* packet pointers are invalid from here */
    }
    return TC_ACT_SHOT; /* a route without outputs */
}

/* Whether the fast path may have this flow: nothing of it is on its way through the slow path any more. */
ALWAYS_INLINE _Bool due(struct flow *flow)
{
    __u32 zero = 0;
    struct progress *slow;
    if (flow->state != FLOW_WHEN_DRAINED)
        return flow->state == FLOW_FAST;
    if (!(slow = bpf_map_lookup_elem(&progress, &zero)))
        return 0;
    if (!flow->tail) /* first seen here: what was let in before it was installed counts too */
        flow->tail = *(volatile __u64 *)&slow->accepted;
    if (*(volatile __u64 *)&slow->drained < flow->tail)
        return 0;
    flow->state = FLOW_FAST;
    return 1;
}

ALWAYS_INLINE int pass(void)
{
    __u32 zero = 0;
    struct counters *count = bpf_map_lookup_elem(&counters, &zero);
    if (count)
        count->passed++;
    return PASS;
}

SEC("tc") int relay(struct __sk_buff *skb)
{
    struct flow_key key;
    struct flow *flow;
    if (!read_key(skb, &key))
        return PASS;
    if (!(flow = bpf_map_lookup_elem(&flows, &key)) || !due(flow))
        return pass();
    return forward(skb, flow->route);
}

/* ---- socket filters: 0 drops, anything else is how many bytes to keep ---- */

/* Takes all that relay let pass; numbers the frames and leaves the last number with the flow. */
SEC("socket") int after(struct __sk_buff *skb)
{
    __u32 zero = 0;
    struct flow_key key;
    if (!read_key(skb, &key))
        return 0;
    struct progress *slow = bpf_map_lookup_elem(&progress, &zero);
    if (!slow)
        return 0;
    __u64 number = __sync_fetch_and_add(&slow->accepted, 1) + 1;
    struct flow *flow = bpf_map_lookup_elem(&flows, &key);
    if (flow)
        flow->tail = number;
    return WHOLE;
}

/* Takes what it does not find in the map. relay looks again, later. */
SEC("socket") int lookup(struct __sk_buff *skb)
{
    struct flow_key key;
    if (!read_key(skb, &key))
        return 0;
    return bpf_map_lookup_elem(&flows, &key) ? 0 : WHOLE;
}

/* ---- the verdict in the packet ---- */

#define MARK_1 0x6d72656cU /* "mrel" and "ayed": two words that nothing else leaves in skb->cb */
#define MARK_2 0x61796564U
#define TO_SLOW_PATH WHOLE

SEC("socket") int mark(struct __sk_buff *skb)
{
    struct flow_key key;
    struct flow *flow;
    if (!read_key(skb, &key))
        return 0;
    flow = bpf_map_lookup_elem(&flows, &key);
    skb->cb[0] = MARK_1;
    skb->cb[1] = MARK_2;
    skb->cb[2] = flow ? flow->route : TO_SLOW_PATH;
    return flow ? 0 : WHOLE;
}

SEC("tc") int obey(struct __sk_buff *skb)
{
    __u32 zero = 0;
    struct flow_key key;
    struct counters *count = bpf_map_lookup_elem(&counters, &zero);
    if (!count || !read_key(skb, &key))
        return PASS;
    if (skb->cb[0] != MARK_1 || skb->cb[1] != MARK_2) {
        count->unmarked++;
        return PASS;
    }
    return skb->cb[2] == TO_SLOW_PATH ? pass() : forward(skb, skb->cb[2]);
}

char _license[] SEC("license") = "Apache-2.0";
