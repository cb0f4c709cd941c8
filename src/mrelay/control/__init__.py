"""The control process: rules, links, API, metrics, state. It has no privilege and opens no raw socket."""
