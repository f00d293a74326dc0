"""Used by all other packages: errors, declared types and ranges, atomic writes."""
