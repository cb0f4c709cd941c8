/* For numbered.py: `source` (XDP, run on live frames) numbers datagrams, spreads them over flows and paces them;
 * `sink` (tc ingress) writes down for each number how often it came, with which TTL, and whether it came late. */
#include "defs.h"

#define HEADERS 42 /* Ethernet, IPv4, UDP */
#define MAGIC 0x6e756d62U
#define NUMBERS (1 << 20) /* of each output */
#define OUTPUTS 2
#define FLOWS 1024
#define FIRST_PORT 6000 /* output i is sent to port FIRST_PORT + i */
#define SPINS 4000      /* looks at the clock, ~20 ns each: bounds the wait for the verifier */
#define MAX_LATE 1000000 /* ns that are made up for by sending faster */
#define MAX_SEGMENTS 128

static long (*const bpf_skb_load_bytes)(const void *skb, __u32 offset, void *to, __u32 len) =
    (void *)BPF_FUNC_skb_load_bytes;

struct state {
    __u64 next;  /* ktime of the next frame, ns */
    __u64 gap;   /* ns between two frames */
    __u64 count; /* frames so far: the next frame's number */
    __u64 stop;
    __u32 flows; /* number modulo `flows` is the flow: its source address is 10.99.0.1 + flow */
    __u32 ifindex;
    __u16 ip_sum; /* one's complement sums of the template, in which number and flow are 0 */
    __u16 udp_sum;
    __u8 head[44];
};

struct stamp { /* the first bytes of each payload */
    __u32 number;
    __u32 magic;
};

struct tally {
    __u32 copies;
    __u32 ttl; /* of the last copy */
};

struct came {
    __u64 datagrams;
    __u64 late; /* came after one of their flow with a higher number */
};

#define SHARED(name, kind, entries)        \
    struct {                               \
        __uint(type, BPF_MAP_TYPE_ARRAY);  \
        __uint(max_entries, entries);      \
        __uint(map_flags, BPF_F_MMAPABLE); \
        __type(key, __u32);                \
        __type(value, kind);               \
    } name SEC(".maps")

SHARED(state, struct state, 1);
SHARED(tallies, struct tally, NUMBERS *OUTPUTS);
SHARED(came, struct came, OUTPUTS);
SHARED(last, __u64, FLOWS *OUTPUTS); /* by output and flow: one more than the highest number */

ALWAYS_INLINE __u16 fold(__u64 sum)
{
    sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    return (sum & 0xffff) + (sum >> 16);
}

ALWAYS_INLINE void wait(struct state *state)
{
    __u64 now = bpf_ktime_get_ns();
    for (int i = 0; i < SPINS && now < state->next; i++)
        now = bpf_ktime_get_ns();
    state->next = (now > state->next + MAX_LATE ? now : state->next) + state->gap;
}

SEC("xdp") int source(struct xdp_md *ctx)
{
    __u32 zero = 0;
    struct state *own = bpf_map_lookup_elem(&state, &zero);
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    struct iphdr *ip = data + sizeof(struct ethhdr);
    struct udphdr *udp = (void *)(ip + 1);
    struct stamp *stamp = (void *)(udp + 1);
    if (!own || !own->flows || (void *)(stamp + 1) > end || READ_ONCE(own->stop))
        return XDP_DROP;
    __builtin_memcpy(data, own->head, HEADERS); /* who had the page before may have changed it */
    __u32 number = own->count++;
    __u16 flow = htons((__u16)(number % own->flows + 1)), sum;
    wait(own);
    *stamp = (struct stamp){number, MAGIC};
    ((__u16 *)&ip->saddr)[1] = flow;
    ip->check = ~fold((__u64)own->ip_sum + flow);
    sum = ~fold((__u64)own->udp_sum + flow + number + MAGIC);
    udp->check = sum ?: 0xffff;
    return bpf_redirect(own->ifindex, 0);
}

ALWAYS_INLINE void note_order(__u32 number, __u32 output, struct came *count)
{
    __u32 zero = 0;
    struct state *own = bpf_map_lookup_elem(&state, &zero);
    if (!own || !own->flows)
        return;
    __u32 index = output * FLOWS + number % own->flows % FLOWS;
    __u64 *highest = bpf_map_lookup_elem(&last, &index);
    if (highest && number + 1 >= *highest)
        *highest = number + 1;
    else
        __sync_fetch_and_add(&count->late, 1);
}

ALWAYS_INLINE void note(__u32 number, __u32 output, __u8 ttl, struct came *count)
{
    __u32 index = output * NUMBERS + number;
    if (number >= NUMBERS)
        return;
    struct tally *tally = bpf_map_lookup_elem(&tallies, &index);
    if (!tally)
        return;
    __sync_fetch_and_add(&tally->copies, 1);
    tally->ttl = ttl;
    __sync_fetch_and_add(&count->datagrams, 1);
    note_order(number, output, count);
}

SEC("tc") int sink(struct __sk_buff *skb)
{
    __u8 ttl;
    __be16 port;
    struct stamp stamp;
    if (bpf_skb_load_bytes(skb, HEADERS, &stamp, sizeof(stamp)) || stamp.magic != MAGIC ||
        bpf_skb_load_bytes(skb, HEADERS - 8 + offsetof(struct udphdr, dest), &port, sizeof(port)) ||
        bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct iphdr, ttl), &ttl, sizeof(ttl)))
        return TC_ACT_UNSPEC;
    __u32 output = ntohs(port) - FIRST_PORT, segments = skb->gso_segs ?: 1;
    struct came *count = bpf_map_lookup_elem(&came, &output);
    if (!count || output >= OUTPUTS)
        return TC_ACT_UNSPEC;
    for (__u32 i = 0; i < MAX_SEGMENTS && i < segments; i++)
        if (!bpf_skb_load_bytes(skb, HEADERS + i * skb->gso_size, &stamp, sizeof(stamp)))
            note(stamp.number, output, ttl, count);
    return TC_ACT_SHOT;
}

char _license[] SEC("license") = "Apache-2.0";
