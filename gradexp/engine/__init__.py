"""From what a user types to a record: config, run, upstream runs, locks, hardware, and many runs at a time."""
