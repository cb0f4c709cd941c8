/* What the programs here need of the kernel's BPF interface: map and section macros, the helpers they call.
 * Numbers and types come from the kernel's own headers; Debian's libbpf-dev is not needed to build. */
#pragma once
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>

#define SEC(name) __attribute__((section(name), used))
/* A map's definition, as libbpf reads it from the BTF of section ".maps". */
#define __uint(name, value) int(*name)[value]
#define __type(name, value) typeof(value) *name

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define htons(x) __builtin_bswap16(x) /* built for bpfel only */
#define offsetof(type, member) __builtin_offsetof(type, member)

#define IP_OFFSET (__u32)sizeof(struct ethhdr)
#define UDP_OFFSET (IP_OFFSET + (__u32)sizeof(struct iphdr))
#define PAYLOAD_OFFSET (UDP_OFFSET + (__u32)sizeof(struct udphdr))

static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static __u64 (*const bpf_ktime_get_ns)(void) = (void *)BPF_FUNC_ktime_get_ns;
static long (*const bpf_redirect)(__u32 ifindex, __u64 flags) = (void *)BPF_FUNC_redirect;
static long (*const bpf_clone_redirect)(struct __sk_buff *skb, __u32 ifindex, __u64 flags) =
    (void *)BPF_FUNC_clone_redirect;
static long (*const bpf_skb_load_bytes)(const void *skb, __u32 offset, void *to, __u32 len) =
    (void *)BPF_FUNC_skb_load_bytes;
static long (*const bpf_skb_load_bytes_relative)(const void *skb, __u32 offset, void *to, __u32 len,
                                                 __u32 start_header) = (void *)BPF_FUNC_skb_load_bytes_relative;
static long (*const bpf_skb_pull_data)(struct __sk_buff *skb, __u32 len) = (void *)BPF_FUNC_skb_pull_data;
static __s64 (*const bpf_csum_diff)(__be32 *from, __u32 from_size, __be32 *to, __u32 to_size, __wsum seed) =
    (void *)BPF_FUNC_csum_diff;
static long (*const bpf_l3_csum_replace)(struct __sk_buff *skb, __u32 offset, __u64 from, __u64 to,
                                         __u64 size) = (void *)BPF_FUNC_l3_csum_replace;
static long (*const bpf_l4_csum_replace)(struct __sk_buff *skb, __u32 offset, __u64 from, __u64 to,
                                         __u64 flags) = (void *)BPF_FUNC_l4_csum_replace;
