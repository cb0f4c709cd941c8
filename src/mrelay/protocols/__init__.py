"""Wire codecs and state machines: they take (event, now), return what it means, and do no I/O."""
