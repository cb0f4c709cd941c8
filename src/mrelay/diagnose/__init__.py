"""Why a rule forwards, or where it stops: facts in, findings out; no I/O."""
