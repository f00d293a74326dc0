"""Networks of the thesis."""
