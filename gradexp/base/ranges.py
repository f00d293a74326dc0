"""Types of settings with a range. gradexp.engine.build checks configs against them, `require` what is passed from Python."""

from collections.abc import Sequence
from typing import Annotated, Any, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import ConfigDict, Strict, TypeAdapter

from gradexp.base.errors import UserError
from gradexp.base.typed import fault_of

Count = Annotated[int, Ge(1)]
Index = Annotated[int, Ge(0)]
Seed = Annotated[int, Ge(0), Lt(2**32)]  # NumPy takes no more
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Probability = Annotated[float, Ge(0), Lt(1)]  # of dropping: not everything
Fractions = Annotated[Sequence[Fraction], MinLen(1)]
Sigmas = Annotated[Sequence[NonNegative], MinLen(1)]  # standard deviations of noise
Gaussian = Annotated[tuple[float, NonNegative], Strict(False)]  # mean and standard deviation; YAML has lists, not tuples


def require(kind: Any, **settings: Any) -> None:
    """Raises UserError for the first setting that is not of the declared type `kind`, or outside its range."""
    adapter = TypeAdapter(kind, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    for name, value in settings.items():
        if fault := fault_of(adapter, value):
            raise UserError(f"{name}{fault}")


def require_fields(settings: Any) -> None:
    """The same for a dataclass: each field must be of the type that it declares."""
    for name, kind in get_type_hints(type(settings), include_extras=True).items():
        require(kind, **{name: getattr(settings, name)})
