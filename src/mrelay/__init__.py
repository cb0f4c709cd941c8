"""mrelay: a multicast relay for Linux. ARCHITECTURE.md says which package does what."""

__version__ = "0.1.0"
