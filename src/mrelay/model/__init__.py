"""Rules, endpoints and settings: pure, no I/O."""
