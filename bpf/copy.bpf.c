/* The second half of XDP's broadcasts: runs on each copy before it leaves (BPF_XDP_DEVMAP), and makes of it what the
 * output wants that leaves by that interface.
 *
 * It is the same program in each devmap: the kernel runs the first frame's program on all that an interface sends
 * at once. */
#include "driver.h"

/* The first place from `from` on, among a route's outputs, of one that leaves by this interface; MAX_COPIES if there
 * is none. */
ALWAYS_INLINE __u32 find(const struct broadcast *to, __u32 ifindex, __u32 from)
{
    for (__u32 place = 0; place < MAX_COPIES; place++)
        if (place >= from && to->ifindex[place] == ifindex)
            return place;
    return MAX_COPIES;
}

/* Of several outputs by one interface, from `first` on: the one whose turn it is. */
ALWAYS_INLINE __u32 take_turn(const struct ticket *ticket, const struct broadcast *to, __u32 ifindex, __u32 first)
{
    __u32 index = ticket->number * MAX_COPIES + first;
    struct turn *turn = bpf_map_lookup_elem(&turns, &index);
    if (!turn)
        return MAX_COPIES;
    __u32 place = turn->stamp == ticket->stamp ? find(to, ifindex, turn->next) : first;
    turn->stamp = ticket->stamp;
    turn->next = place + 1;
    return place;
}

/* NULL: the route has changed since the frame came. */
ALWAYS_INLINE struct output *output_of(const struct ticket *ticket, __u32 ifindex)
{
    __u32 number = ticket->number;
    struct broadcast *to = bpf_map_lookup_elem(&broadcasts, &number);
    __u32 place = to ? find(to, ifindex, 0) : MAX_COPIES;
    if (to && to->repeats && place < MAX_COPIES)
        place = take_turn(ticket, to, ifindex, place);
    return place < MAX_COPIES ? output_at(ticket->start + place) : 0;
}

/* `frame.xdp` is set. The headers are those that `relay_xdp` looked at. */
ALWAYS_INLINE _Bool read_frame(struct frame *frame)
{
    struct ethhdr *eth = (void *)(long)frame->xdp->data;
    void *end = (void *)(long)frame->xdp->data_end;
    struct head4 *four = (void *)(eth + 1);
    struct head6 *six = (void *)(eth + 1);
    if ((void *)(four + 1) > end)
        return 0;
    if (eth->h_proto == htons(ETH_P_IP)) {
        read_head4(frame, four);
        return 1;
    }
    if ((void *)(six + 1) > end)
        return 0;
    read_head6(frame, six);
    return 1;
}

SEC("xdp/devmap") int copy_xdp(struct xdp_md *xdp)
{
    struct frame frame = {.xdp = xdp};
    struct ticket *ticket = (void *)(long)xdp->data_meta;
    if ((void *)(ticket + 1) > (void *)(long)xdp->data)
        return XDP_DROP;
    struct output *output = output_of(ticket, xdp->egress_ifindex);
    struct hop *hop = hop_of(output);
    if (!output || !hop)
        return XDP_DROP;
    /* Whoever receives it would take the ticket for one of its own, and merge no frames for it. */
    if (bpf_xdp_adjust_meta(xdp, sizeof(*ticket)) || !read_frame(&frame) || !rewrite(&frame, output, hop))
        return XDP_DROP;
    return XDP_PASS;
}

char _license[] SEC("license") = "Apache-2.0";
