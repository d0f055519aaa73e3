"""What holds of splits and subsets for any patients and labels."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medxray.data.splits import divide
from medxray.data.subsets import owner_of, subset
from medxray.types import DataError, Study

OWN: list[Any] = ["patient", "stratified"]
SHARES = [(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.7, 0.3, 0.0), (1.0, 0.0, 0.0), (0.34, 0.33, 0.33)]

labels = st.dictionaries(st.sampled_from(["Edema", "Mass", "No Finding"]), st.sampled_from([1, 0, -1, None]), max_size=3)
patients = st.sampled_from(["", *(f"p{i}" for i in range(30))])


@st.composite
def cohorts(draw: st.DrawFn) -> list[Study]:
    told = draw(st.lists(st.tuples(patients, labels, st.sampled_from(["train", "train", "val", "test"])), max_size=40))
    return [study(f"s{i}", *one) for i, one in enumerate(told)]


def study(name: str, patient: str, labels: dict[str, int | None], split: str) -> Study:
    return Study(
        study_id=name, patient_id=patient, images=[f"{name}.png"], views=["PA"], findings="", impression="", report="",
        labels=labels, split=split,
    )  # fmt: skip


def divided(studies: list[Study], how: Any, shares: tuple[float, ...]) -> dict[str, str]:
    return {study["study_id"]: study["split"] for study in divide(studies, how, shares)}


@pytest.mark.parametrize("how", OWN)
@given(studies=cohorts(), shares=st.sampled_from(SHARES), data=st.data())
def test_patients_are_whole_shares_are_kept_and_the_order_does_not_matter(
    how: Any, studies: list[Study], shares: tuple[float, ...], data: st.DataObject
) -> None:
    owners = {study["study_id"]: owner_of(study) for study in studies}
    n, asked = len({*owners.values()}), sum(share > 0 for share in shares)
    if n < asked:
        with pytest.raises(DataError, match=f"{n} patients cannot be divided among {asked} splits"):
            divide(studies, how, shares)
        return
    found = divide(studies, how, shares)
    assert [study["study_id"] for study in found] == list(owners), "in the order given"
    assert all({**study, "split": ""} == {**other, "split": ""} for study, other in zip(found, studies, strict=True))
    splits = divided(studies, how, shares)
    by_patient = {(owners[name], split) for name, split in splits.items()}
    assert len(by_patient) == n, "a patient in two splits"
    for split, share in zip(("train", "val", "test"), shares, strict=True):
        count = sum(one == split for _, one in by_patient)
        assert abs(count - n * share) < 1 + 1e-9 or (share and count == 1) or split == "train"
        assert (count > 0) == (share > 0)
    shuffled = data.draw(st.permutations(studies))
    assert divided([Study(**{**one, "split": "train"}) for one in shuffled], how, shares) == splits


@given(studies=cohorts(), shares=st.sampled_from(SHARES), new=st.integers(100, 999))
def test_one_more_patient_moves_few(studies: list[Study], shares: tuple[float, ...], new: int) -> None:
    if len({owner_of(study) for study in studies}) < 3:
        return
    before = divided(studies, "patient", shares)
    after = divided([*studies, study("new", f"p{new}", {}, "train")], "patient", shares)
    moved = {owner_of(study) for study in studies if before[study["study_id"]] != after[study["study_id"]]}
    # Each of the two borders goes by one patient at most.
    assert len(moved) <= 2


@given(studies=cohorts(), fractions=st.tuples(*[st.floats(0.01, 1)] * 2), data=st.data())
def test_subsets_lie_in_one_another(studies: list[Study], fractions: tuple[float, float], data: st.DataObject) -> None:
    few, many = (subset(studies, fraction) for fraction in sorted(fractions))
    names = [[study["study_id"] for study in some] for some in (few, many)]
    assert {*names[0]} <= {*names[1]}
    owners = {owner_of(study) for study in studies if study["split"] == "train"}
    for some, fraction in zip((few, many), sorted(fractions), strict=True):
        taken = {owner_of(study) for study in some if study["split"] == "train"}
        assert len(taken) == (max(1, round(fraction * len(owners))) if owners else 0)
        kept = [study for study in studies if study["split"] != "train" or owner_of(study) in taken]
        assert some == kept, "whole patients, other splits whole, in the order given"
    shuffled = data.draw(st.permutations(studies))
    assert {study["study_id"] for study in subset(shuffled, min(fractions))} == {*names[0]}
