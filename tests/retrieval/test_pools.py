import pytest

from medxray.retrieval.pools import PoolSettings, draw, split
from medxray.types import SpecError

LABELS: list[dict[str, int | None]] = [
    {"Edema": 1, "Pleural Effusion": 0, "No Finding": 0},
    {"Edema": 0, "Pleural Effusion": 0, "No Finding": 1},
    {"Edema": -1, "Pleural Effusion": 1, "No Finding": 0},
    {"Edema": None, "Pleural Effusion": 0, "No Finding": None},
    {"Edema": 1, "Pleural Effusion": 1, "No Finding": 0},
]
REPORTS = ["edema is noted", "clear lungs", "an effusion . of note , no edema", "nothing noteworthy", "denoted"]


@pytest.mark.parametrize(
    ("settings", "diseased", "normal"),
    [
        ({"by": "label"}, [0, 2, 4], [1]),
        ({"by": "label", "label": "Edema"}, [0, 4], [1]),
        ({"by": "keyword", "keyword": "note"}, [0, 2, 3], [1, 4]),
        ({"by": "rule", "rule": "Edema or Pleural Effusion"}, [0, 2, 4], [1]),
        ({"by": "rule", "rule": "Edema and Pleural Effusion"}, [4], [0, 1, 3]),
        ({"by": "rule", "rule": "Edema AND not Pleural Effusion or No Finding"}, [0, 1], [2, 4]),
        ({"by": "rule", "rule": "not No Finding"}, [0, 2, 4], [1]),
    ],
)
def test_who_is_in_which_pool(settings: dict[str, str], diseased: list[int], normal: list[int]) -> None:
    assert split(PoolSettings(**settings), REPORTS, LABELS) == (diseased, normal)


def test_a_coin_follows_its_seed() -> None:
    pools = [split(PoolSettings(by="random", seed=seed), [""] * 200, [{}] * 200) for seed in (1, 1, 2)]
    assert pools[0] == pools[1] != pools[2]
    assert sorted(pools[0][0] + pools[0][1]) == list(range(200)) and 70 < len(pools[0][0]) < 130


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "label", "label": "Edma"}, "pools.label: the data set has no label 'Edma'; did you mean 'Edema'"),
        ({"by": "rule", "rule": "Edema or"}, "pools.rule: the data set has no label ''"),
        ({"by": "rule", "rule": "Edema xor Mass"}, "no label 'Edema xor Mass'"),
        ({"by": "keyword", "keyword": "mass"}, "by the word 'mass', 0 of 5 training studies are diseased and 5 normal"),
    ],
)
def test_pools_that_cannot_be(settings: dict[str, str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        split(PoolSettings(**settings), REPORTS, LABELS)


def test_no_patient_is_drawn_twice() -> None:
    patients = ["a", "a", "b", "b", "", ""]
    drawn = draw(range(6), patients, 9, 3)
    assert len(drawn) == 4 and {4, 5} < set(drawn)
