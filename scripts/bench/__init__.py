"""What steps, maps, photographs and whole runs cost on this machine (make bench)."""
