"""gradexp: the experiments of *Gradient-based Methods for Deep Model Interpretability* (S. Srinivas, EPFL 2021)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradexp.report.records import records as records

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`gradexp.records` is imported when it is first used: pandas and Hydra take a second."""
    if name == "records":
        from gradexp.report.records import records

        return records
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
