"""The supervisor role: the one process with privilege. Standard library, mrelay.messages, mrelay.kernel."""
