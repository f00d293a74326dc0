"""Tasks, one per file: what a run does, from its upstream runs to its metrics and arrays."""
