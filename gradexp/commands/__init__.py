"""From what a user types to runs: composed, counted, sent to processes or a cluster, checked."""
