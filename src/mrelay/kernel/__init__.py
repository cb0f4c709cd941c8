"""Thin wrappers over kernel interfaces: one file an interface, standard library only."""
