"""Drawing functions, one kind of figure a file: (spec, series) -> (figure, plotted values)."""
