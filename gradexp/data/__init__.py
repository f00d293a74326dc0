"""Data sets: one a file; sources, subsets and the on-device loader are shared."""
