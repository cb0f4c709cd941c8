"""How large the counters' shared memory is: apart from counters.py, because the supervisor has no NumPy."""

import mmap
from typing import Final

MAX_RULES: Final = 16384  # slots
RULE_ROWS: Final = 8  # of each: packets, bytes, and a row for each of counters.RULE_DROPS
MAX_LINKS: Final = 65536  # slots, one for each (rule, output)
HEADER: Final = 64  # u64 words: magic, flow capacity, then totals from word 8, drops from word 16


def counters_size(flow_limit: int) -> int:
    """Bytes of shared memory for a table of `flow_limit` flows."""
    words = HEADER + 13 * flow_limit + RULE_ROWS * MAX_RULES + 3 * MAX_LINKS
    return -(-words * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
