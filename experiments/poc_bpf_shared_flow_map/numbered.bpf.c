/* The experiment's load and its proof: numbered datagrams out of one interface, a tally of numbers at another.
 *
 * `source` (XDP, run by BPF_PROG_TEST_RUN) numbers and stamps datagrams, spreads them over flows and paces
 * them. `sink` (tc ingress) writes down for each number how often it came, by which path, when, and how long
 * it took.
 */
#include "bpf_defs.h"

/* ---- shared with Python (flow_map_layout.py) ---- */

struct source_state {
    __u64 next;  /* ktime of the next frame, ns */
    __u64 gap;   /* ns between two frames */
    __u64 count; /* frames so far: the next frame's number */
    __u32 flows; /* number modulo `flows` is the flow: its source address is 10.99.0.0 + flow + 1 */
    __u32 ifindex;
    __u16 ip_sum; /* one's complement sums of the template, in which number, time and flow are 0 */
    __u16 udp_sum;
    __u8 head[44]; /* the template's Ethernet, IP and UDP header */
};

struct stamp { /* the first bytes of each payload */
    __u32 number;
    __u32 magic;
    __u64 sent; /* ktime, ns */
};
#define MAGIC 0x6d72656cU

struct tally {
    __u64 arrived; /* ktime of the first copy, ns */
    __u32 delay;   /* ns */
    __u16 slow;    /* copies by each path */
    __u16 fast;
};

struct sink_state {
    __u64 frames;
    __u64 datagrams;
    __u64 action; /* what becomes of them: TC_ACT_SHOT, or TC_ACT_OK for the IP stack to have them too */
};

#define NUMBERS (1 << 19) /* of each output */
#define OUTPUTS 2
#define FIRST_PORT 6000 /* output i is sent to port FIRST_PORT + i */
#define SLOW_TTL 9      /* what the slow path's datagrams carry, so that they can be told apart */
#define SPINS 4000      /* looks at the clock, ~20 ns each: bounds the wait for the verifier */
#define MAX_SEGMENTS 128
#define MAX_LATE 1000000 /* ns that are made up for by sending faster */

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __uint(map_flags, BPF_F_MMAPABLE);
    __type(key, __u32);
    __type(value, struct source_state);
} source_state SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, NUMBERS *OUTPUTS);
    __uint(map_flags, BPF_F_MMAPABLE);
    __type(key, __u32);
    __type(value, struct tally);
} tallies SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, OUTPUTS);
    __uint(map_flags, BPF_F_MMAPABLE);
    __type(key, __u32);
    __type(value, struct sink_state);
} sink_state SEC(".maps");

/* ---- source ---- */

ALWAYS_INLINE __u16 fold(__u64 sum)
{
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return (sum & 0xffff) + (sum >> 16);
}

/* Of 64 bits: their two halves, which `fold` sees as 16-bit words. */
ALWAYS_INLINE __u64 words(__u64 value)
{
    return (value & 0xffffffff) + (value >> 32);
}

ALWAYS_INLINE __u64 wait(struct source_state *state)
{
    __u64 now = bpf_ktime_get_ns();
    for (int i = 0; i < SPINS && now < state->next; i++)
        now = bpf_ktime_get_ns();
    state->next = (now > state->next + MAX_LATE ? now : state->next) + state->gap;
    return now;
}

SEC("xdp") int source(struct xdp_md *ctx)
{
    __u32 zero = 0;
    struct source_state *state = bpf_map_lookup_elem(&source_state, &zero);
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    struct iphdr *ip = data + IP_OFFSET;
    struct udphdr *udp = data + UDP_OFFSET;
    struct stamp *stamp = data + PAYLOAD_OFFSET;
    if (!state || !state->flows || (void *)(stamp + 1) > end)
        return XDP_DROP;
    __builtin_memcpy(data, state->head, PAYLOAD_OFFSET); /* who had the page before may have changed it */
    __u32 number = state->count++;
    __u16 flow = htons((__u16)(number % state->flows + 1)), sum;
    __u64 now = wait(state);
    *stamp = (struct stamp){number, MAGIC, now};
    ((__u16 *)&ip->saddr)[1] = flow;
    ip->check = ~fold((__u64)state->ip_sum + flow);
    sum = ~fold((__u64)state->udp_sum + flow + number + MAGIC + words(now));
    udp->check = sum ?: 0xffff;
    return bpf_redirect(state->ifindex, 0);
}

/* ---- sink ---- */

ALWAYS_INLINE void note(const struct stamp *stamp, __u32 output, _Bool slow, __u64 now)
{
    __u32 index = output * NUMBERS + stamp->number;
    if (stamp->number >= NUMBERS)
        return;
    struct tally *tally = bpf_map_lookup_elem(&tallies, &index);
    if (!tally)
        return;
    /* both counts in one word: copies may come on two processors at once */
    __u32 before = __sync_fetch_and_add((__u32 *)&tally->slow, slow ? 1 : 1 << 16);
    if (before)
        return;
    tally->arrived = now;
    tally->delay = now - stamp->sent;
}

SEC("tc") int sink(struct __sk_buff *skb)
{
    __u8 ttl;
    __be16 port;
    struct stamp stamp;
    __u64 now = bpf_ktime_get_ns();
    if (bpf_skb_load_bytes(skb, PAYLOAD_OFFSET, &stamp, sizeof(stamp)) || stamp.magic != MAGIC ||
        bpf_skb_load_bytes(skb, UDP_OFFSET + offsetof(struct udphdr, dest), &port, sizeof(port)) ||
        bpf_skb_load_bytes(skb, IP_OFFSET + offsetof(struct iphdr, ttl), &ttl, sizeof(ttl)))
        return TCX_NEXT;
    __u32 output = htons(port) - FIRST_PORT, segments = skb->gso_segs ?: 1;
    struct sink_state *state = bpf_map_lookup_elem(&sink_state, &output);
    if (!state || output >= OUTPUTS)
        return TCX_NEXT;
    __sync_fetch_and_add(&state->frames, 1);
    __sync_fetch_and_add(&state->datagrams, segments);
    for (__u32 i = 0; i < MAX_SEGMENTS && i < segments; i++)
        if (!bpf_skb_load_bytes(skb, PAYLOAD_OFFSET + i * skb->gso_size, &stamp, sizeof(stamp)))
            note(&stamp, output, ttl == SLOW_TTL, now);
    return state->action;
}

char _license[] SEC("license") = "Apache-2.0";
