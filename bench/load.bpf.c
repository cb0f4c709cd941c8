/* For traffic.py: `source` (XDP, run on live frames) paces datagrams, spreads them over flows and writes into each
 * when it was sent; `sink` (tc ingress) counts what arrives, drops it and, when asked to, keeps delays and gaps;
 * `pass` does nothing. */
#include "defs.h"

#define HEADERS 42 /* Ethernet, IPv4, UDP */
#define INTERFACES 2048
#define SPINS (1 << 17) /* looks at the clock, ~20 ns each: the longest wait between two frames */
#define MAX_LATE 1000000 /* ns that are made up for by sending faster */
#define UNSUMMED (~0ULL) /* a flow whose datagrams carry no UDP checksum */
#define FINE 6 /* bits: a bucket of a histogram is 1/64 of its value wide */
#define BUCKETS ((64 - FINE + 1) << FINE)

static long (*const bpf_skb_load_bytes)(const void *skb, __u32 offset, void *to, __u32 len) =
    (void *)BPF_FUNC_skb_load_bytes;

const volatile __u32 payload = 0; /* set by the loader: frames with less are not ours */

struct load {
    __u64 next; /* ktime of the next frame, ns */
    __u64 gap;  /* ns between two frames */
    __u64 sent;
    __u64 stop;
    __u32 flows;
    __u32 flow; /* whose turn it is */
    __u32 ifindex;
    __u32 pad[5];
    __u32 timed; /* the sink keeps delays and gaps; the line before is in the source's cache */
};

struct head { /* of a flow: headers in whole words, and the UDP checksum's sum for a payload of zeros */
    __u64 words[6];
    __u64 sum;
};

struct tally {
    __u64 datagrams; /* segments */
    __u64 bytes;     /* of payload */
    __u64 frames;
    __u64 first; /* ktime of the first and the last frame */
    __u64 last;
};

#define SHARED(name, kind, entries)        \
    struct {                               \
        __uint(type, BPF_MAP_TYPE_ARRAY);  \
        __uint(max_entries, entries);      \
        __uint(map_flags, BPF_F_MMAPABLE); \
        __type(key, __u32);                \
        __type(value, kind);               \
    } name SEC(".maps")

SHARED(load, struct load, 1);
SHARED(heads, struct head, 1);             /* as many as flows */
SHARED(tallies, struct tally, INTERFACES); /* by ifindex */
SHARED(delays, __u64, BUCKETS);
SHARED(gaps, __u64, BUCKETS);

ALWAYS_INLINE __u16 fold(__u64 sum)
{
    sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32 & 0xffff) + (sum >> 48);
    sum = (sum & 0xffff) + (sum >> 16);
    return (sum & 0xffff) + (sum >> 16);
}

static long is_due(__u32 spin __attribute__((unused)), __u64 *next)
{
    return bpf_ktime_get_ns() >= *next;
}

/* The time at which the frame leaves. */
ALWAYS_INLINE __u64 wait(struct load *own)
{
    __u64 now = bpf_ktime_get_ns(), next = own->next;
    if (now < next) {
        bpf_loop(SPINS, is_due, &next, 0);
        now = bpf_ktime_get_ns();
    }
    own->next = (now > next + MAX_LATE ? now : next) + own->gap;
    return now;
}

SEC("xdp") int source(struct xdp_md *ctx)
{
    __u32 zero = 0, flow;
    struct load *own = bpf_map_lookup_elem(&load, &zero);
    void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    struct udphdr *udp = data + HEADERS - sizeof(*udp);
    __u64 *stamp = data + HEADERS;
    struct head *head;
    __u16 sum;
    if (!own || (void *)(stamp + 1) > end || READ_ONCE(own->stop))
        return XDP_DROP;
    flow = own->flow;
    if (!(head = bpf_map_lookup_elem(&heads, &flow)))
        return XDP_DROP;
    own->flow = flow + 1 < own->flows ? flow + 1 : 0;
    own->sent++;
    __builtin_memcpy(data, head->words, sizeof(head->words)); /* who had the page before may have changed it */
    *stamp = wait(own);
    sum = ~fold(head->sum + fold(*stamp));
    if (head->sum != UNSUMMED)
        udp->check = sum ?: 0xffff;
    return bpf_redirect(own->ifindex, 0);
}

/* At an interface whose GRO is off: `keep_polling` in traffic.py. */
SEC("xdp") int pass(struct xdp_md *ctx __attribute__((unused)))
{
    return XDP_PASS;
}

/* Of 64 in each octave; histogram.py knows what they stand for. */
ALWAYS_INLINE __u32 bucket(__u64 value)
{
    __u32 octave = 0;
    for (__u32 step = 32; step; step /= 2)
        if (value >> (octave + step))
            octave += step;
    if (octave < FINE)
        return value;
    return ((octave - FINE + 1) << FINE) + (value >> (octave - FINE) & ((1 << FINE) - 1));
}

ALWAYS_INLINE void note(void *histogram, __u64 value)
{
    __u32 index = bucket(value);
    __u64 *count = bpf_map_lookup_elem(histogram, &index);
    if (count)
        __sync_fetch_and_add(count, 1);
}

struct arrival {
    struct __sk_buff *skb;
    __u64 now;
    __u64 last; /* when the frame before came; 0: there was none */
};

static long note_segment(__u32 segment, struct arrival *arrival)
{
    __u64 stamp;
    if (bpf_skb_load_bytes(arrival->skb, HEADERS + segment * payload, &stamp, sizeof(stamp)))
        return 1;
    note(&delays, arrival->now - stamp);
    if (segment || arrival->last)
        note(&gaps, segment ? 0 : arrival->now - arrival->last); /* a merged frame's arrive at once */
    return 0;
}

SEC("tc") int sink(struct __sk_buff *skb)
{
    __u32 zero = 0, index = skb->ifindex, segments = skb->gso_segs ?: 1;
    struct load *own = bpf_map_lookup_elem(&load, &zero);
    struct tally *tally = bpf_map_lookup_elem(&tallies, &index);
    __u64 last;
    if (!own || !tally || skb->len < HEADERS + payload)
        return TC_ACT_UNSPEC; /* ARP, IGMP */
    __sync_fetch_and_add(&tally->datagrams, segments);
    __sync_fetch_and_add(&tally->bytes, skb->len - HEADERS);
    __sync_fetch_and_add(&tally->frames, 1);
    if (tally->first && !own->timed)
        return TC_ACT_SHOT;
    last = tally->last;
    tally->last = bpf_ktime_get_ns();
    if (!tally->first)
        tally->first = tally->last;
    if (own->timed) {
        struct arrival arrival = {skb, tally->last, last};
        bpf_loop(segments, note_segment, &arrival, 0);
    }
    return TC_ACT_SHOT;
}

char _license[] SEC("license") = "Apache-2.0";
