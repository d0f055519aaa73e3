"""Who may be context: the training set in two pools, diseased and normal."""

import random
import re
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from medxray.types import SpecError


class PoolSettings(BaseModel):
    """How the two pools are told apart.

    `keyword`: the report holds the word (R2GenCSR: `note`). `label`: the label is 0 in diseased and 1 in normal
    studies (`No Finding`); any other label is diseased where it is 1 and normal where it is 0. `random`: a coin.
    """

    model_config = ConfigDict(extra="forbid")

    by: Literal["keyword", "label", "random"] = "label"
    keyword: str = "note"
    label: str = "No Finding"
    seed: int = Field(42, ge=0, description="of the draw from each pool")
    size: int = Field(30, gt=0, description="studies drawn from each pool by the fixed retriever")


def split(
    settings: PoolSettings, reports: Sequence[str], labels: Sequence[dict[str, int | None]]
) -> tuple[list[int], list[int]]:
    """Rows of the (diseased, normal) pool among n training studies.

    Raises:
        SpecError: the label is not one that the data set has, or a pool stays empty.
    """
    rows = range(len(reports))
    if settings.by == "keyword":
        word = re.compile(rf"\b{re.escape(settings.keyword)}", re.IGNORECASE)
        diseased = [bool(word.search(report)) for report in reports]
        known = [True] * len(reports)
    elif settings.by == "random":
        coin = random.Random(settings.seed)
        diseased = [coin.random() < 0.5 for _ in rows]
        known = [True] * len(reports)
    else:
        names = sorted({name for row in labels for name in row})
        if settings.label in names:
            values = [row.get(settings.label) for row in labels]
            sick = 0 if settings.label == "No Finding" else 1
            diseased = [value == sick for value in values]
            known = [value in (0, 1) for value in values]
        elif settings.label == "No Finding" and names:
            # Without such a column a study is normal when all its labels are known to be absent.
            diseased = [any(v == 1 for v in row.values()) for row in labels]
            known = [sick or all(v == 0 for v in row.values()) for sick, row in zip(diseased, labels, strict=True)]
        else:
            raise SpecError(
                f"retriever.pools.label: the data set has no label {settings.label!r} "
                f"(found: {', '.join(names) or 'none'}); name one of them, or use by: keyword"
            )
    positive = [i for i in rows if known[i] and diseased[i]]
    negative = [i for i in rows if known[i] and not diseased[i]]
    for name, pool in (("diseased", positive), ("normal", negative)):
        if not pool:
            raise SpecError(
                f"retriever.pools: no training study is {name} (by: {settings.by}); choose another rule"
            )
    return positive, negative


def draw(pool: Sequence[int], patients: Sequence[str], size: int, seed: int) -> list[int]:
    """`size` rows of a pool drawn with a seed, no patient twice: then at most one of them can be refused to a study."""
    order = list(pool)
    random.Random(seed).shuffle(order)
    seen: set[str] = set()
    drawn = []
    for row in order:
        if patients[row] and patients[row] in seen:
            continue
        seen.add(patients[row])
        drawn.append(row)
        if len(drawn) == size:
            break
    return drawn
