"""Test traffic: numbered, timestamped datagrams, sent at a rate and accounted for where they arrive.

Used by `mrelay send`, `mrelay receive` and `mrelay demo`. Nothing here needs privilege, and the relay
itself never imports it.
"""
