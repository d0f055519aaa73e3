"""Who may be context: the training set in two pools, diseased and normal."""

import random
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from medxray.registry import nearest
from medxray.types import SpecError


class PoolSettings(BaseModel):
    """How the two pools are told apart.

    `keyword`: the report holds the word (R2GenCSR: `note`). `label`: the label is 0 in diseased and 1 in normal
    studies (`No Finding`); any other label is diseased where it is 1 and normal where it is 0. `rule`: diseased where
    the rule is true and normal where it is false. `random`: a coin. What is uncertain or missing puts a study in neither
    pool where it leaves a label or a rule open.
    """

    model_config = ConfigDict(extra="forbid")

    by: Literal["keyword", "label", "rule", "random"] = "label"
    keyword: str = "note"
    label: str = "No Finding"
    rule: str = Field(
        "not No Finding",
        description="labels joined by not, and, or, which bind in this order, such as Edema or Pleural Effusion",
    )
    seed: int = Field(42, ge=0, description="of the draw from each pool, and of the coin")
    size: int = Field(30, gt=0, description="studies drawn from each pool by the fixed retriever")


def split(
    settings: PoolSettings, reports: Sequence[str], labels: Sequence[dict[str, int | None]]
) -> tuple[list[int], list[int]]:
    """Rows of the (diseased, normal) pool among n training studies.

    Raises:
        SpecError: a label is not one that the data set has, or a pool stays empty.
    """
    n = len(reports)
    if settings.by == "keyword":
        word = re.compile(rf"\b{re.escape(settings.keyword)}", re.IGNORECASE)
        diseased = np.array([bool(word.search(report)) for report in reports], dtype=float)
    elif settings.by == "random":
        coin = random.Random(settings.seed)
        diseased = np.array([coin.random() < 0.5 for _ in range(n)], dtype=float)
    elif settings.by == "rule":
        diseased = follow(settings.rule, labels)
    else:
        names = sorted({name for row in labels for name in row})
        if settings.label == "No Finding" and names and settings.label not in names:
            # Without such a column a study is normal when all its labels are known to be absent.
            columns = np.stack([_column(name, labels) for name in names])
            diseased = np.where((columns == 1).any(0), 1.0, np.where((columns == 0).all(0), 0.0, np.nan))
        else:
            diseased = _known(settings.label, labels, "label")
            if settings.label == "No Finding":
                diseased = 1 - diseased
    pools = [np.flatnonzero(diseased == value).tolist() for value in (1, 0)]
    if not all(pools):
        how = {"keyword": f"the word {settings.keyword!r}", "label": f"the label {settings.label!r}",
               "rule": f"the rule {settings.rule!r}", "random": "a coin"}[settings.by]  # fmt: skip
        raise SpecError(
            f"retriever.pools: by {how}, {len(pools[0])} of {n} training studies are diseased and {len(pools[1])} normal; "
            "both pools need some, choose another rule"
        )
    return pools[0], pools[1]


def follow(rule: str, labels: Sequence[dict[str, int | None]]) -> NDArray[np.float64]:
    """What a rule says of n studies: 1 true, 0 false, NaN where uncertain or missing labels leave it open.

    Raises:
        SpecError: a label is not one that the data set has, or a word is missing.
    """

    def term(text: str) -> NDArray[np.float64]:
        negated = re.match(r"not\s+", text, re.IGNORECASE)
        if negated:
            return 1 - term(text[negated.end() :])
        return _known(text, labels, "rule")

    def joined(text: str, word: str) -> list[str]:
        return [part.strip() for part in re.split(rf"\b{word}\b", text, flags=re.IGNORECASE)]

    alternatives = [[term(part) for part in joined(all_of, "and")] for all_of in joined(rule, "or")]
    # Kleene's logic: what is open stays open unless the rest decides, so it lies between false and true.
    found = [np.min([np.nan_to_num(value, nan=0.5) for value in all_of], axis=0) for all_of in alternatives]
    decided = np.max(found, axis=0)
    return np.where(decided == 0.5, np.nan, decided)


def _column(name: str, labels: Sequence[dict[str, int | None]]) -> NDArray[np.float64]:
    """1 present, 0 absent, NaN uncertain or missing."""
    values = [row.get(name) for row in labels]
    return np.array([value if value in (0, 1) else np.nan for value in values], dtype=float)


def _known(name: str, labels: Sequence[dict[str, int | None]], setting: str) -> NDArray[np.float64]:
    names = sorted({known for row in labels for known in row})
    if name not in names:
        raise SpecError(
            f"retriever.pools.{setting}: the data set has no label {name!r}{nearest(name, names)} "
            f"(found: {', '.join(names) or 'none'}); name one of them, or use by: keyword"
        )
    return _column(name, labels)


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
