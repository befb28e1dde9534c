"""What every block of a recipe is, and the kinds of value that recur."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=100)]
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# For tuples, which a recipe writes as lists: after a validator of a whole block, pydantic's strict mode refuses those.
LIST = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)


class Block(BaseModel):
    """A mapping in the recipe. Unknown keys are errors; values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
