"""What every table of a recipe shares: strictness, number types, mistakes reported together."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Mistakes(ValueError):
    """What is wrong with one table, a text for each mistake."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__("; ".join(texts))
        self.texts = tuple(texts)


def refuse(texts: Sequence[str]) -> None:
    """Raise `Mistakes` if there are any."""
    if texts:
        raise Mistakes(texts)


def refuse_credentials(field: str, address: str | None, instead: str) -> None:
    """Raise `Mistakes` if an address holds a user name or password: lineage and logs repeat it."""
    authority = (address or "").partition("://")[2].partition("/")[0]
    if "@" in authority:
        refuse([f"{field} holds credentials (…@…), which logs repeat; use {instead} instead"])


def repeated(names: Iterable[str]) -> list[str]:
    """Names that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


class Config(BaseModel):
    """Base of every table: unknown keys are errors and values never change after loading.

    Infinite numbers are refused because the canonical JSON behind stage hashes cannot hold them.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        strict=False,
        allow_inf_nan=False,
    )
