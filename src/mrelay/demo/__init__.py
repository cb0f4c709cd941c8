"""`mrelay demo`: a source without a route back, the relay and two receivers, in namespaces of their own.

Nothing else in the package imports this.
"""
