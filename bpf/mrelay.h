/* What the kernel programs share with Python (src/mrelay/ebpf/layout.py; tests compare sizes and offsets).
 *
 * Who writes: F the programs at ingress, of which X is XDP's, R the rings' filters, W a worker, C control. Nobody
 * else does.
 * Maps with BPF_F_MMAPABLE are memory that Python reads and writes without a system call.
 */
#ifndef MRELAY_H
#define MRELAY_H

#include <linux/types.h>

/* ---- flows4, flows6: hash, one entry a flow that the fast path may carry (W; `tail`, `waited`, `state`, `unheard`:
 * F, R) ---- */

struct flow4_key {
    __be32 source;
    __be32 group;
    __u32 ifindex;
    __be16 port;
    __u16 vlan; /* VLAN identifier, 0 without a tag */
};

struct flow6_key {
    __u8 source[16];
    __u8 group[16];
    __u32 ifindex;
    __be16 port;
    __u16 vlan;
};

#define TAIL_UNKNOWN (~0ULL) /* written at installation: what was let in before counts too */

struct flow {
    __u64 tail;    /* number of the flow's last frame in its worker's rings; carried here once drained >= tail */
    __u32 worker;  /* index into `progress` */
    __u32 slot;    /* index into `counts`, of one processor */
    __u32 start;   /* its outputs: route[start] ... */
    __u32 length;  /* ... route[start + length - 1]; at least one */
    __u32 waited;  /* frames left to the slow path since `tail` was set */
    __u32 state;   /* what became of its last frame: enum passed, CARRIED or CARRIED_XDP when it was sent on */
    __u64 given;   /* X: stamp of the last frame that XDP passed on; 0: none yet */
    __u64 seen;    /* F at tc: stamp of the last frame that came with one */
    __u32 why;     /* X: enum why_not_xdp, of the last frame that XDP passed on */
    __u32 left;    /* F at tc: frames left to the slow path ... */
    __u32 entered; /* R: ... and those that came to its rings: the kernel may hold some of a list in between */
    __u32 unheard; /* F, X: the tick at which no listener was found */
    __u32 limit;   /* of the one rule that all its outputs are from: index into `limits` + 1; 0: no rate */
    __u32 single;  /* F at tc: so many frames in a row were not merged; SINGLE at most */
};

/* ---- route: mmapped array (W) ---- */

struct place {
    __u32 output;    /* index into `outputs` */
    __u32 broadcast; /* of a route's first: index into `broadcasts` + 1; else 0, or BROADCAST_HOP */
};

#define BROADCAST_HOP (~0U) /* none, for an interface that takes no frames from XDP */

/* ---- broadcasts: mmapped array, the interfaces that routes of several outputs leave by (W); one of devmap0 …
 * each says the same to the kernel ---- */

#define BROADCASTS 32
#define MAX_COPIES 16

struct broadcast {
    __u32 changes;             /* the devmap is good for hops that have not changed since */
    __u32 repeats;             /* 1: some leave by one interface */
    __u32 ifindex[MAX_COPIES]; /* of a route's outputs, in order; 0: no more */
};

/* ---- outputs: mmapped array, one concrete destination each, of the flow's own family (W; `errors`: F, atomically) ---- */

struct output {
    __u8 address[16];   /* destination; IPv4 in the first four bytes */
    __u8 source[16];    /* all zeros: the hop's */
    __be16 port;
    __be16 source_port;
    __u32 hop;          /* index into `hops` */
    __u8 ttl;           /* 0: decrement */
    __u8 dscp;          /* 0..63, DSCP_KEEP */
    __u8 keep;          /* 1: the datagram's own source address */
    __u8 multicast;     /* 1: the link-layer address follows from `address` (RFC 1112 §6.4, RFC 2464 §7) */
    __u32 reserved;
    __u64 errors;       /* datagrams that the interface refused */
    __u64 reserved2;
}; /* 64 bytes */

#define DSCP_KEEP 0xff

/* ---- turns: per-CPU array, [broadcast][place of the first output by an interface that has several] (F): up to which
 * place they had their copies of the last frame. An interface sends the copies in order, though not always all of
 * a frame at once ---- */

struct turn {
    __u64 stamp; /* of that frame */
    __u64 next;  /* place */
};

/* ---- hops: mmapped array, one for each egress socket's number (C) ---- */

struct hop {
    __u32 flags;   /* HOP_*; 0: not now, leave the frame to the slow path */
    __u32 ifindex;
    __u32 mtu;
    __u8 mac[6];       /* the next hop's; unused for multicast, and where there is no link-layer header */
    __u8 own_mac[6];   /* the interface's */
    __u8 source[16];   /* for outputs that have none of their own; all zeros: leave it to the slow path */
    __u32 changes;     /* of all hops together, up to this one's last */
    __u32 reserved;
}; /* 48 bytes */

#define HOP_READY 1
#define HOP_XDP 2 /* the interface takes frames from XDP */

/* ---- counts: mmapped array, [processor][slot] (F, each processor its own) ---- */

struct count {
    __u64 packets; /* datagrams: segments of merged frames counted each */
    __u64 bytes;   /* of UDP payload */
    __u64 limited; /* datagrams that ended here, for their rule's rate */
};

/* ---- trips: array, [slot of `counts`] (F at tc): what of a flow is on its way round by lo (round.h) ---- */

struct trip {
    __u64 moved;   /* when the first left of those that are away, or one last came back, in jiffies */
    __u64 again;   /* not before, in jiffies */
    __u32 away;    /* copies and frames (atomically) */
    __u32 place;   /* the copies' place in `route`; NO_PLACE: there are frames */
    __u32 ifindex; /* the copies leave by it */
    __u32 iif;     /* the frames came in by it */
};

/* ---- limits: mmapped array, [worker][rule]: token buckets of rules with a rate (W; `due`: F, atomically) ---- */

struct meter {
    __u64 cost;  /* of one unit, in 2^-16 ns; 0: no limit */
    __u64 burst; /* ns that may be saved */
    __u64 due;   /* CLOCK_MONOTONIC in ns, up to which what passed is paid for */
};

struct limit {
    struct meter datagrams;
    struct meter bytes; /* of UDP payload */
};

/* ---- passed: mmapped array of __u64, [processor][PASSED_REASONS]: frames left to the slow path (F) ---- */

enum passed {
    PASSED_NO_FLOW,   /* not installed: new, or one that this path can't carry */
    PASSED_SHAPE,     /* options, fragments, malformed or unusual headers */
    PASSED_TTL,
    PASSED_TOO_BIG,   /* for an output's MTU */
    PASSED_HOP,       /* an output's next hop is not known, its interface is down, or of another kind */
    PASSED_WAITING,   /* frames of the flow are still on their way through the slow path */
    PASSED_LISTENER,  /* a socket of this host wants it too */
    PASSED_REASONS = 8,
};

#define CARRIED PASSED_REASONS
#define CARRIED_XDP (CARRIED + 1)

/* Why XDP left a flow's last frame to tc. */
enum why_not_xdp {
    XDP_SAW_NONE,
    XDP_ORDER,      /* tc carries it, or will, and frames of the flow may still be on their way there */
    XDP_OUTPUTS,    /* more than MAX_COPIES, or no room in `broadcasts` */
    XDP_HOP,        /* its output's interface takes none from XDP */
    XDP_PARTIAL,    /* the UDP checksum is for hardware to complete: the sender is on this host */
    XDP_NO_ROOM,    /* the driver has no room for a stamp */
    XDP_RATE,       /* its rule has a rate, which tc keeps */
    XDP_MERGED,     /* GRO merges its frames: tc carries more of those than XDP of single ones */
};

/* ---- progress: mmapped array, one for each worker; each writer has a cache line of its own ---- */

struct progress {
    __u64 accepted;      /* R: frames let into the worker's rings */
    __u64 accepted_long; /* R: those of them let into rings for long frames */
    __u64 pad[6];
    __u64 drained;   /* W: what `accepted` was when it had last sent all of them on */
    __u64 half;      /* W: which half of its routes and outputs new ones go to, 0 or 1 */
    __u64 sent;      /* W: frames that came out of the rings, about: a worker that ended may have left it wrong */
    __u64 sent_long; /* W: likewise, of those for long frames */
    __u64 room;      /* W: so many short frames may wait; with more, flows overtake before the ring is full */
    __u64 room_long; /* W: likewise, long ones */
    __u64 pad2[2];
};

/* ---- ranges: LPM trie, the groups and addresses that rules on an interface name (C) ---- */

struct range_key {
    __u32 prefixlen;   /* bits of what follows: 64 + the prefix of `address` */
    __u32 ifindex;
    __u32 family;      /* 4 or 6 */
    __u8 address[16];  /* IPv4 in the first four bytes */
};

#define SINGLE 16 /* frames in a row that GRO did not merge: XDP may carry the flow */
#define PATIENCE 16384 /* frames that a flow waits for the slow path to be drained; then it overtakes, once */
#define VLAN_MARK 0x65726d02 /* 02:6d:72:65, locally administered: before the VLAN of a frame that tc left */
#define HELD_MARK 0x6d72656c /* SO_MARK of the sockets that hold unicast inputs' ports: no listener's */

#endif
