"""Lists as they leave, and the queries that ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from app.api.schemas.fields import Id
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
