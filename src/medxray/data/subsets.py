"""A share of the training patients: stratified, and the smaller inside the larger."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medxray.data.seeds import seed_of
from medxray.types import Study


def subset(studies: Sequence[Study], fraction: float) -> list[Study]:
    """Studies of the first `fraction` of the training patients, in the order given; other splits whole.

    Patients stand in one order, which follows from their names and labels alone, so that any subset lies in every
    larger one. Of each label, positive patients and those for whom it is known come at even distances in it, rare
    labels' most exactly. At least one patient is taken; a study without a patient is one of its own.
    """
    train = [study for study in studies if study["split"] == "train"]
    patients = sorted({owner_of(study) for study in train})
    if fraction == 1 or not patients:
        return list(studies)
    order = ranked(traits(train, patients), np.array([seed_of("subset", name) for name in patients]))
    taken = {patients[row] for row in order[: max(1, round(fraction * len(patients)))]}
    return [study for study in studies if study["split"] != "train" or owner_of(study) in taken]


def owner_of(study: Study) -> str:
    """The patient of a study; a study without one is its own."""
    return study["patient_id"] or study["study_id"]


def traits(studies: Sequence[Study], patients: Sequence[str]) -> NDArray[np.bool_]:
    """Of each of n patients, by any of the studies: (n, 2K), the K labels that are present, and those that are known."""
    rows = {patient: row for row, patient in enumerate(patients)}
    labels = {label: column for column, label in enumerate(sorted({name for s in studies for name in s["labels"]}))}
    positive, known = np.zeros((2, len(patients), len(labels)), dtype=bool)
    for study in studies:
        row = rows[owner_of(study)]
        for label, value in study["labels"].items():
            positive[row, labels[label]] |= value == 1
            known[row, labels[label]] |= value in (0, 1)
    return np.concatenate([positive, known], 1)


def ranked(groups: NDArray[np.bool_], keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """An order of n things in which the members of each of m groups are spread evenly.

    Every thing gets a time in [0, 1], group by group from the smallest on: a group of g members has g slots, the
    i-th at (i + 1/2) / g. Members that a smaller group has placed take the slots next to their times, the others, by
    their keys, what is left. It is iterative stratification (Sechidis et al., ECML 2011) for all fractions at once.

    Args:
        groups: (n, m), who belongs to what.
        keys: (n,), which decide among equals.
    """
    n = len(keys)
    times = np.full(n, np.nan)
    shuffled = np.argsort(keys, kind="stable")
    everyone = np.ones((n, 1), dtype=bool)
    members = np.concatenate([groups, everyone], 1)[shuffled]
    for column in np.argsort(members.sum(0), kind="stable"):
        own = np.flatnonzero(members[:, column])
        placed = ~np.isnan(times[own])
        old, new = own[placed], own[~placed]
        old = old[np.argsort(times[old], kind="stable")]
        # Each wants the slot of its time; where several want one, they move apart to both sides.
        steps = np.arange(len(old))
        wanted = np.floor(times[old] * len(own)).astype(np.int64) - steps
        later = np.minimum(np.maximum.accumulate(wanted), len(own) - len(old))
        earlier = np.maximum(np.minimum.accumulate(wanted[::-1])[::-1], 0)
        slots = steps + (earlier + later) // 2
        free = np.ones(len(own), dtype=bool)
        free[slots] = False
        times[new] = (np.flatnonzero(free) + 0.5) / len(own)
        if len(own) == n:
            times[old] = (slots + 0.5) / n
    return shuffled[np.argsort(times, kind="stable")]
