"""Names, settings from signatures, and what a mistake reads like."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Literal

import pytest
from pydantic import ValidationError

import medxray
from medxray.registry import SECTIONS, Registry, registry_of
from medxray.types import SpecError


class Pump:
    """Moves water."""


@pytest.fixture
def pumps() -> Registry[Pump]:
    return Registry("pump", Pump, {}, group="medxray.pumps", context=("inlet",))


def test_settings_come_from_the_signature_and_docstring(pumps: Registry[Pump]) -> None:
    @pumps.register("hand")
    class Hand(Pump):
        """A hand pump.

        Args:
            strokes: how many
                a minute.
            grip: which kind.
        """

        def __init__(self, inlet: float, strokes: int, grip: Literal["wood", "iron"] = "wood") -> None:
            self.inlet, self.strokes, self.grip = inlet, strokes, grip

    model = pumps.settings_of("hand")
    assert list(model.model_fields) == ["name", "strokes", "grip"], "context is not a setting"
    assert model.model_fields["strokes"].description == "how many a minute."
    built = pumps.build(model(name="hand", strokes=3), 0.5)
    assert isinstance(built, Hand) and (built.inlet, built.strokes, built.grip) == (0.5, 3, "wood")
    for wrong in ({"strokes": "3"}, {"strokes": True}, {"strokes": 3, "grip": "rope"}, {"strokes": 3, "x": 1}, {}):
        with pytest.raises(ValidationError):
            model(name="hand", **wrong)


def test_mistakes_while_registering(pumps: Registry[Pump]) -> None:
    pumps.register("a")(type("A", (Pump,), {}))
    with pytest.raises(SpecError, match=r"'a' is registered already.*replace=True"):
        pumps.register("a")(type("B", (Pump,), {}))
    replacement = type("B", (Pump,), {})
    pumps.register("a", replace=True)(replacement)
    assert pumps.get("a") is replacement
    with pytest.raises(SpecError, match=r"expected a subclass of .*Pump"):
        pumps.register("b")(int)  # type: ignore[arg-type]

    class Untyped(Pump):
        def __init__(self, inlet: float, strokes=3) -> None:  # type: ignore[no-untyped-def]
            pass

    with pytest.raises(SpecError, match=r"'strokes' of Untyped.__init__ has no type"):
        pumps.register("c")(Untyped)
    with pytest.raises(SpecError, match=r"unknown pump 'aa'; did you mean 'a'\? \(registered: a\)"):
        pumps.get("aa")


def test_a_part_that_refuses_its_values_says_which(pumps: Registry[Pump]) -> None:
    @pumps.register("weak")
    class Weak(Pump):
        def __init__(self, inlet: float, strokes: int = 1) -> None:
            if strokes > 9:
                raise ValueError(f"strokes must be at most 9, found {strokes}")

    with pytest.raises(SpecError, match="pump 'weak': strokes must be at most 9, found 10"):
        pumps.build(pumps.settings_of("weak")(name="weak", strokes=10), 0.5)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_packaged_part_loads_and_is_described(section: str) -> None:
    registry = registry_of(section)
    packaged = [name for name in registry.names() if registry.get(name).__module__.startswith("medxray.")]
    assert packaged
    for name in packaged:
        model = registry.settings_of(name)
        assert model.__doc__, f"{section} {name} has no docstring"
        if section != "task":
            for key, field in model.model_fields.items():
                assert key in ("name", "seed") or field.description, f"{section} {name}: {key} is not described"


def test_an_entry_point_of_another_package(tmp_path: Path) -> None:
    """A tiny package with its own encoder, installed as pip would lay it down, named in a spec."""
    site = tmp_path / "site"
    info = site / "tinypkg-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tinypkg\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[medxray.encoders]\ntiny-mean = tinypkg:TinyMean\nbroken = tinypkg:Missing\n"
    )
    (site / "tinypkg.py").write_text(
        textwrap.dedent('''
        import torch
        import medxray

        class TinyMean(medxray.Encoder):
            """Means of squares of pixels."""

            def __init__(self, stride: int = 8) -> None:
                super().__init__()
                self.width, self.stride = 4, stride
                self.layer = torch.nn.Conv2d(1, 4, stride, stride)

            def forward(self, images: torch.Tensor) -> medxray.Features:
                maps = self.layer(images)
                tokens = maps.flatten(2).transpose(1, 2)
                return medxray.Features(tokens, tuple(maps.shape[2:]), tokens.mean(1))
        ''')
    )
    code = textwrap.dedent("""
        import medxray
        task = medxray.build("classify-phantom", {"encoder": {"name": "tiny-mean", "stride": 16}}).task
        assert type(task.encoder).__name__ == "TinyMean" and task.encoder.stride == 16
        for wrong in ({"name": "tiny-meen"}, {"name": "tiny-mean", "strid": 3}, {"name": "broken"}):
            try:
                medxray.build("classify-phantom", {"encoder": wrong})
            except medxray.MedxrayError as error:
                print(error)
    """)
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_with_path(site), timeout=120
    )
    assert "did you mean 'tiny-mean'" in found.stdout
    assert "did you mean 'stride'" in found.stdout
    assert "encoder 'broken' of package 'tinypkg:Missing' could not be loaded" in found.stdout


def test_the_public_surface_grows_only_on_purpose() -> None:
    assert dir(medxray) == sorted(medxray.__all__)
    assert len(medxray.__all__) == 37
    for name in medxray.__all__:
        assert getattr(medxray, name) is not None
    for registry in ("encoders", "metrics", "tasks", "maskers", "segmenters", "pixel_decoders", "retrievers", "report_decoders"):
        assert callable(getattr(medxray, registry).register)


def _with_path(folder: Path) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *(p for p in sys.path if p)])}
