"""Tables and figures from records; nothing here trains, and nothing imports torch."""
