# SPDX-License-Identifier: Apache-2.0
"""Business rules as data: what a list must not hold, how much of one kind, and how alike its items may be."""

from typing import Annotated

from pydantic import Field

from recsys.core.config import Config


class Quota(Config):
    """At most ``most`` items of any one value of an item attribute. An item without a value is not limited.

    Attributes:
        attribute: a column of the bundle's items; of lists, an item counts for each of its values.
        most: 0 or more.
    """

    attribute: Annotated[str, Field(min_length=1, max_length=128)]
    most: Annotated[int, Field(ge=0)]


class Rules(Config):
    """The rules of a list. What is None is as the bundle has it, see `over`.

    Attributes:
        exclude: ids of items that are not shown; unknown ones exclude nothing.
        quotas: all of which hold.
        diversity: 0 is the order of the scores; 1 chooses the items that are least alike, beginning with the best.
    """

    exclude: tuple[str, ...] = ()
    quotas: tuple[Quota, ...] | None = None
    diversity: Annotated[float, Field(ge=0, le=1)] | None = None

    @property
    def choose(self) -> bool:
        """Whether they may pass over an item that has not been excluded."""
        return bool(self.quotas or self.diversity)

    def over(self, default: "Rules") -> "Rules":
        """These rules, with those of ``default`` where they say nothing; what either excludes is excluded."""
        return Rules(
            exclude=tuple(dict.fromkeys((*default.exclude, *self.exclude))),
            quotas=default.quotas if self.quotas is None else self.quotas,
            diversity=default.diversity if self.diversity is None else self.diversity,
        )


NO_RULES = Rules(quotas=(), diversity=0.0)
"""Rules that change nothing, whatever the defaults, but for what those exclude."""
