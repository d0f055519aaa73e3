"""Any spec that is valid survives being written and read; whatever is not a setting is named."""

import copy
import string
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from medxray import Spec
from medxray.registry import registry_of
from medxray.spec import DataSpec, GenerationSpec, TrainingSpec, packaged
from medxray.types import SpecError

PARTS = {
    "hd-mae-phantom": ["encoder", "masker", "pixel_decoder"],
    "classify-phantom": ["encoder", "head"],
    "r2gencsr-phantom": ["encoder", "retriever", "projector", "decoder"],
}
BLOCKS: dict[str, type[BaseModel]] = {"data": DataSpec, "training": TrainingSpec, "generation": GenerationSpec}
# A spec takes tens of milliseconds to read, and a mistake in one is short as it is drawn.
FEW = settings(max_examples=8, phases=[Phase.generate])
keys = st.text(string.ascii_lowercase + "_", min_size=3, max_size=9)
# A mistake is told in one line, which a name with a line end in it would break.
names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=9)


def values_of(annotation: Any, limits: Any = ()) -> st.SearchStrategy[Any]:
    """Values of a setting's type, within its limits."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        found = [m for own in arguments[1:] for m in getattr(own, "metadata", [own])]
        return values_of(arguments[0], [*found, *limits])
    keys = ("ge", "gt", "le", "lt", "min_length", "max_length")
    bounds = {key: getattr(limit, key) for limit in limits for key in keys if hasattr(limit, key)}
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of([values_of(one, limits) for one in arguments])
    if annotation is int:
        return st.integers(bounds.get("ge", bounds.get("gt", -9) + 1), min(99, bounds.get("lt", 99), bounds.get("le", 99)))
    if annotation is float:
        low, high = bounds.get("ge", bounds.get("gt", -9)), bounds.get("le", bounds.get("lt", 1e9))
        return st.floats(low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds, allow_subnormal=False)
    if origin is list:
        return st.lists(values_of(arguments[0]), min_size=bounds.get("min_length", 0), max_size=bounds.get("max_length", 3))
    if origin is dict:
        return st.dictionaries(names, values_of(arguments[1]), max_size=3)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return settings_of(annotation)
    return {str: st.text(max_size=9), bool: st.booleans(), type(None): st.none()}[annotation]


@st.composite
def settings_of(draw: st.DrawFn, model: type[BaseModel]) -> dict[str, Any]:
    """Values for some settings; together they may still contradict one another."""
    fields = {k: f for k, f in model.model_fields.items() if k not in ("name", "reader") and "Any" not in str(f.annotation)}
    chosen = draw(st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True)) if fields else []
    return {key: draw(values_of(fields[key].annotation, fields[key].metadata)) for key in chosen}


@st.composite
def overrides(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    base = draw(st.sampled_from(sorted(PARTS)))
    over: dict[str, Any] = {"name": draw(st.from_regex(r"[\w.-]{1,8}", fullmatch=True)), "output": draw(st.none() | st.text())}
    for block in BLOCKS if "decoder" in PARTS[base] else ("data", "training"):
        over[block] = draw(settings_of(BLOCKS[block]))
    section = draw(st.sampled_from(PARTS[base]))
    name = draw(st.sampled_from(registry_of(section).names()))
    over[section] = {"name": name, **draw(settings_of(registry_of(section).settings_of(name)))}
    return base, over


@FEW
@given(told=overrides())
def test_a_valid_spec_survives_a_round_trip(told: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    base, over = told
    unchanged = copy.deepcopy(over)
    try:
        spec = Spec.read(base, over)
    except SpecError as error:
        # What contradicts itself is told, a line a mistake, each with its place.
        assert all(": " in line for line in str(error).splitlines())
        assume(False)
        return
    assert over == unchanged
    file = tmp_path / "spec.yaml"
    file.write_text(spec.to_yaml(), encoding="utf-8")
    again = Spec.read(file)
    assert again.to_dict() == spec.to_dict()
    assert again.to_yaml() == spec.to_yaml()
    pairs = [
        f"{section}.{key}={yaml.safe_dump([value], default_flow_style=True, width=10**6).strip()[1:-1]}"
        for section, block in over.items()
        if isinstance(block, dict)
        for key, value in block.items()
    ]
    named = {key: over[key] for key in ("name", "output")}
    assert Spec.read(Spec.read(base, pairs), named).to_dict() == spec.to_dict(), "pairs say what a mapping says"


@FEW
@given(base=st.sampled_from(sorted(packaged())), key=keys, value=st.integers() | st.text(max_size=3), data=st.data())
def test_an_unknown_key_is_named(base: str, key: str, value: Any, data: st.DataObject) -> None:
    tree = yaml.safe_load(packaged()[base].read_text())
    places: list[tuple[str, ...]] = [(), ("data", "reader")]
    sections = {name for parts in PARTS.values() for name in parts} | {*BLOCKS}
    places += [(name,) for name, block in tree.items() if isinstance(block, dict) and name in sections]
    place = data.draw(st.sampled_from(places))
    known = tree
    for part in place:
        known = known[part]
    model = registry_of(place[-1]).settings_of(known["name"]) if "name" in known and place else BLOCKS.get("".join(place), Spec)
    assume(key not in model.model_fields)
    known[key] = value
    with pytest.raises(SpecError) as error:
        Spec.read(tree)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{'.'.join((*place, key))}: unknown setting of")
