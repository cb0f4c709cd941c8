"""The kernel fast path: programs that forward installed flows, and the maps they share with us."""
