/* What the programs need of the kernel's BPF interface: map and section macros, the helpers they call.
 * Numbers and types come from the kernel's own headers (linux/bpf.h), so nothing else is needed to build. */
#ifndef DEFS_H
#define DEFS_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>

#define SEC(name) __attribute__((section(name), used))
/* A map's definition, as libbpf reads it from the BTF of section ".maps". */
#define __uint(name, value) int(*name)[value]
#define __type(name, value) typeof(value) *name

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define htons(x) ((__be16)__builtin_bswap16(x)) /* built for bpfel only */
#define htonl(x) ((__be32)__builtin_bswap32(x))
#define ntohs(x) __builtin_bswap16(x)
#define offsetof(type, member) __builtin_offsetof(type, member)
#define READ_ONCE(x) (*(volatile typeof(x) *)&(x))

static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static __u32 (*const bpf_get_smp_processor_id)(void) = (void *)BPF_FUNC_get_smp_processor_id;
static long (*const bpf_loop)(__u32 count, void *callback, void *context, __u64 flags) = (void *)BPF_FUNC_loop;
static __u64 (*const bpf_ktime_get_ns)(void) = (void *)BPF_FUNC_ktime_get_ns;
static __u64 (*const bpf_jiffies64)(void) = (void *)BPF_FUNC_jiffies64;
static long (*const bpf_redirect)(__u32 ifindex, __u64 flags) = (void *)BPF_FUNC_redirect;
static long (*const bpf_redirect_map)(void *map, __u64 key, __u64 flags) = (void *)BPF_FUNC_redirect_map;
static long (*const bpf_clone_redirect)(struct __sk_buff *skb, __u32 ifindex, __u64 flags) =
    (void *)BPF_FUNC_clone_redirect;
static long (*const bpf_skb_load_bytes_relative)(const void *skb, __u32 offset, void *to, __u32 len,
                                                 __u32 start_header) = (void *)BPF_FUNC_skb_load_bytes_relative;
static long (*const bpf_skb_store_bytes)(struct __sk_buff *skb, __u32 offset, const void *from, __u32 len,
                                         __u64 flags) = (void *)BPF_FUNC_skb_store_bytes;
static long (*const bpf_skb_pull_data)(struct __sk_buff *skb, __u32 len) = (void *)BPF_FUNC_skb_pull_data;
static long (*const bpf_skb_change_tail)(struct __sk_buff *skb, __u32 len, __u64 flags) =
    (void *)BPF_FUNC_skb_change_tail;
static long (*const bpf_skb_vlan_pop)(struct __sk_buff *skb) = (void *)BPF_FUNC_skb_vlan_pop;
static long (*const bpf_xdp_adjust_meta)(struct xdp_md *xdp, int by) = (void *)BPF_FUNC_xdp_adjust_meta;
static long (*const bpf_xdp_adjust_tail)(struct xdp_md *xdp, int by) = (void *)BPF_FUNC_xdp_adjust_tail;
static __s64 (*const bpf_csum_update)(struct __sk_buff *skb, __wsum difference) = (void *)BPF_FUNC_csum_update;
static long (*const bpf_l4_csum_replace)(struct __sk_buff *skb, __u32 offset, __u64 from, __u64 to,
                                         __u64 flags) = (void *)BPF_FUNC_l4_csum_replace;
static struct bpf_sock *(*const bpf_sk_lookup_udp)(void *skb, struct bpf_sock_tuple *tuple, __u32 size,
                                                   __u64 netns, __u64 flags) = (void *)BPF_FUNC_sk_lookup_udp;
static long (*const bpf_sk_release)(void *sock) = (void *)BPF_FUNC_sk_release;

#endif
