"""Drawing functions, a file for each kind of figure: (spec, series) -> (figure, plotted values)."""
