/* What the two XDP programs share: a frame's rewriting, and what the first says to the second. */
#ifndef DRIVER_H
#define DRIVER_H

#include "judge.h"

/* In the data before a frame that is broadcast: what each copy needs to know of its outputs. */
struct ticket {
    __u64 stamp;  /* of the frame: the one before on this processor had another */
    __u32 number; /* index into `broadcasts` */
    __u32 start;  /* as in struct flow */
};

ALWAYS_INLINE _Bool rewrite(const struct frame *frame, const struct output *output, const struct hop *hop)
{
    struct ethhdr *eth = (void *)(long)frame->xdp->data;
    void *end = (void *)(long)frame->xdp->data_end;
    struct head4 *four = (void *)(eth + 1);
    struct head6 *six = (void *)(eth + 1);
    struct change change;
    if (frame->headers == sizeof(*four)) {
        if ((void *)(four + 1) > end)
            return 0;
        write4(frame, output, hop, eth, &change);
        mend_whole(&four->udp, &change);
    } else {
        if ((void *)(six + 1) > end)
            return 0;
        write6(frame, output, hop, eth, &change);
        mend_whole(&six->udp, &change);
    }
    return 1;
}

#endif
