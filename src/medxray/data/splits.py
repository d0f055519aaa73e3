"""Train, val and test by patient: at random, or so that each has its share of every label."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medxray.data.seeds import seed_of
from medxray.data.subsets import owner_of, ranked, traits
from medxray.types import DataError, Study

SPLITS = ("train", "val", "test")


def divide(studies: Sequence[Study], how: Literal["official", "patient", "stratified"], shares: Sequence[float]) -> list[Study]:
    """Studies with their splits, in the order given.

    All studies of a patient are in one split; a study without a patient is one of its own. The numbers of patients are
    those of the shares to within one; a split with a share is empty only where there are fewer patients than splits.
    The division follows from the names of the patients, and for "stratified" from their labels, alone. When patients
    come or go, few others move.

    Args:
        studies: of all splits.
        how: "official" leaves the splits as they are; "patient" orders patients by a hash of their names; "stratified"
            spreads those who have a label, and those for whom it is known, evenly over that order (`ranked`).
        shares: of the patients, for train, val and test; their sum is 1.

    Raises:
        DataError: fewer patients than splits with a share.
    """
    if how == "official":
        return list(studies)
    patients = sorted({owner_of(study) for study in studies})
    keys = np.array([seed_of("split", name) for name in patients], np.int64)
    groups = traits(studies, patients) if how == "stratified" else np.zeros((len(patients), 0), dtype=bool)
    order = ranked(groups, keys)
    sizes = _sizes(len(patients), shares)
    names = np.repeat(SPLITS, sizes)
    split_of = {patients[row]: str(split) for row, split in zip(order, names, strict=True)}
    return [Study(**{**study, "split": split_of[owner_of(study)]}) for study in studies]


def _sizes(n: int, shares: Sequence[float]) -> NDArray[np.int64]:
    """How many of n things each share gets: rounded so that they sum up, at least one where it is not zero."""
    wanted = np.array(shares, dtype=float)
    asked = wanted > 0
    if n < asked.sum():
        raise DataError(
            f"data.split_shares: {n} patients cannot be divided among {asked.sum()} splits; leave out a split (share 0), or "
            "name the column of patients in data.reader"
        )
    sizes = np.floor(n * wanted + 1e-9).astype(np.int64)
    rest = n * wanted - sizes
    for split in np.argsort(-rest, kind="stable")[: n - sizes.sum()]:
        sizes[split] += 1
    for split in np.flatnonzero(asked & (sizes == 0)):
        sizes[sizes.argmax()] -= 1
        sizes[split] = 1
    return sizes
