"""gradexp: the experiments of *Gradient-based Methods for Deep Model Interpretability* (S. Srinivas, EPFL 2021)."""

__version__ = "0.1.0"
