"""What every section of a config is made of."""

from typing import Annotated

import pydantic
from pydantic import Field

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

MAX_ROWS = 2**31 - 1  # row ids are int32, offsets included


class Frozen(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(
    frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
  )


def require(ok: bool, message: str) -> None:
  if not ok:
    raise ValueError(message)
