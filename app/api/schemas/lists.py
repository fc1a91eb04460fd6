"""Lists as they leave, and the queries that ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from app.api.schemas.fields import Id, check_metadata, fault
from app.core.pages import Cursor


class ListItem(BaseModel):
    """Whatever stands in a list: pages go on from its id."""

    id: str


Item = TypeVar("Item", bound=ListItem)


class ListObject(BaseModel, Generic[Item]):
    """One page, in OpenAI's envelope."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


def list_object(items: Sequence[Item], *, has_more: bool) -> ListObject[Item]:
    """The envelope around one page."""
    return ListObject(
        data=list(items),
        first_id=items[0].id if items else None,
        last_id=items[-1].id if items else None,
        has_more=has_more,
    )


class PageQuery(BaseModel):
    """Where a page begins and how long it is. Null words of a query are the text itself, so none here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    after: Id | None = None
    limit: int = Field(default=20, ge=1, le=100)

    def cursor(self) -> Cursor:
        """The page as core knows it, newest first."""
        return Cursor(self.after, self.limit)


class OrderedQuery(PageQuery):
    """A page in either order by time, oldest first unless said otherwise."""

    order: Literal["asc", "desc"] = "asc"

    def cursor(self) -> Cursor:
        """The page as core knows it."""
        return Cursor(self.after, self.limit, self.order == "asc")


def _check_filter(value: object) -> object:
    if value is None or value == "null":
        return value
    if not isinstance(value, dict):
        raise fault("invalid_value", "Filter by metadata[key]=value, or by metadata=null alone.")
    return check_metadata(value)


class MetadataQuery(PageQuery):
    """`metadata[key]=value` keeps what has that pair, `metadata=null` what has none."""

    metadata: Annotated[dict[str, str] | str | None, BeforeValidator(_check_filter)] = None

    @model_validator(mode="before")
    @classmethod
    def _gather_metadata(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        pairs = {key[9:-1]: fields[key] for key in fields if key.startswith("metadata[") and key[-1] == "]"}
        rest = {key: value for key, value in fields.items() if not key.startswith("metadata[")}
        if not pairs:
            return rest
        return rest | {"metadata": "both" if "metadata" in rest else pairs}

    @property
    def pairs(self) -> dict[str, str] | None:
        """What the metadata must hold."""
        return self.metadata if isinstance(self.metadata, dict) else None

    @property
    def without(self) -> bool:
        """Whether there must be no metadata."""
        return self.metadata == "null"
