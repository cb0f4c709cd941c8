"""The worker role: frames in, datagrams out. One process a core; it parses packets and has no privilege."""
