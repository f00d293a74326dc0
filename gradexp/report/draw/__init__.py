"""Drawing functions, in a file each for curves and pictures: (spec, series) -> (figure, plotted values)."""
