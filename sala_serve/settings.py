"""What the sections of the settings share; each package has its own in its ``settings.py``.

``sala_serve/config.py`` puts them together and is the only one that reads files and the environment.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Seconds = Annotated[FiniteFloat, Field(gt=0)]
"""A duration above zero."""
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of every section: frozen, and a field it does not know is an error.

    The string under a field is its description, in these pages and in error messages.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )
