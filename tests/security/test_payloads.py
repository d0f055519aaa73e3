"""What is planted where a file is read does not run: it is passed by, or refused in words. Each payload is a real one, which
a careless reader runs. Beside these stand tests/weights/test_weights.py and test_systems.py, tests/metrics/test_clinical.py
and test_radgraph.py for weights, and tests/data/test_bad_input.py for images that unpack without end."""

import contextlib
import io
import json
import pickle
import runpy
import shutil
import tarfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pyarrow as arrow
import pytest
import torch
import yaml
from PIL import Image
from pyarrow import parquet
from pydicom.filebase import DicomBytesIO
from torch.torch_version import TorchVersion

import medxray
from medxray.data import load_studies, write_shards
from medxray.encoders import ENCODERS
from medxray.encoders.frozen import compute_once, features_key
from medxray.encoders.vit import ViT
from medxray.llm import REPORT_DECODERS
from medxray.llm.memory_transformer import MemoryTransformer
from medxray.metrics.radgraph import _unpacked
from medxray.model_card import model_card
from medxray.pipeline import read_log
from medxray.sharding import shard_shapes
from medxray.spec import Spec
from medxray.training import SUMS
from medxray.types import MedxrayError
from medxray.weights import load_encoder, load_state


class Case(NamedTuple):
    """How a planted file is read.

    Attributes:
        read: by the library.
        careless: what a reader without care does with the same, which runs the payload.
        refused: what the library's message says; None where the payload is passed by.
    """

    read: Callable[[], Any]
    careless: Callable[[], Any]
    refused: str | None = None


Given = Callable[[str], Any]
Plant = Callable[[Any, Given], Case]
PLANTS: dict[str, Plant] = {}


def plant(name: str) -> Callable[[Plant], Plant]:
    def decorate(function: Plant) -> Plant:
        assert name not in PLANTS
        PLANTS[name] = function
        return function

    return decorate


def torch_loads(path: Path) -> Callable[[], Any]:
    return lambda: torch.load(path, weights_only=False)


def unpickles(path: Path) -> Callable[[], Any]:
    return lambda: pickle.loads(path.read_bytes())


def vit() -> ViT:
    return ViT(width=16, depth=1, heads=2, patch=8)


def part(registry: Any, name: str, *context: Any, **settings: Any) -> Any:
    return registry.build(registry.settings_of(name)(name=name, **settings), *context)


# Weights


@plant("weights: torch's zip, inside the namespace of a training script")
def _(place: Any, given: Given) -> Case:
    path = place.folder / "a.pth"
    torch.save({"model": vit().state_dict(), "args": Namespace(lr=[{"x": (place.payload,)}])}, path)
    return Case(lambda: load_state(path), torch_loads(path), "hold more than tensors")


@plant("weights: torch's format before its zip")
def _(place: Any, given: Given) -> Case:
    path = place.folder / "a.pt"
    torch.save({"a": torch.zeros(2), "b": place.payload}, path, _use_new_zipfile_serialization=False)
    return Case(lambda: load_state(path), torch_loads(path), "hold more than tensors")


@plant("weights: torch's tar of its first years")
def _(place: Any, given: Given) -> Case:
    path = place.folder / "a.pth"
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(place.pickled)
            tar.addfile(member, io.BytesIO(place.pickled))
    return Case(lambda: load_state(path), torch_loads(path), "a.pth")


@plant("weights: a pickle called safetensors")
def _(place: Any, given: Given) -> Case:
    path = place.put("a.safetensors", place.pickled)
    return Case(lambda: load_state(path), unpickles(path), "cannot be read")


@plant("weights: of a tensor's hooks")
def _(place: Any, given: Given) -> Case:
    # What a tensor is made again of is chosen by the file; only torch's own ways are on the list.
    path, tensor = place.folder / "a.pth", torch.zeros(2)
    tensor.__dict__["note"] = place.payload
    torch.save({"a": torch.nn.Parameter(tensor), "b": tensor}, path)
    return Case(lambda: load_state(path), torch_loads(path), "hold more than tensors")


@plant("weights: a version in place of a payload's class")
def _(place: Any, given: Given) -> Case:
    # TorchVersion is on torch's own list: what it is made of is not.
    path = place.folder / "a.pth"
    torch.save({"a": torch.zeros(2), "v": TorchVersion("2.0"), "b": [place.payload]}, path)
    return Case(lambda: load_state(path), torch_loads(path), "hold more than tensors")


@plant("weights: pytorch_model.bin of a folder with config.json")
def _(place: Any, given: Given) -> Case:
    place.put("config.json", '{"model_type": "vit"}')
    torch.save({"a": torch.zeros(2), "b": place.payload}, place.folder / "pytorch_model.bin")
    return Case(
        lambda: load_encoder(vit(), str(place.folder)), torch_loads(place.folder / "pytorch_model.bin"), "hold more than"
    )


@plant("weights: a whole system's checkpoint")
def _(place: Any, given: Given) -> Case:
    path = place.folder / "checkpoint_epoch1.pth"
    torch.save({"model": {"llama_proj.weight": torch.zeros(2, 2)}, "config": place.payload}, path)
    return Case(
        lambda: medxray.build(given("small_spec"), {"weights": str(path), "output": str(place.folder / "o")}).fit(progress=False),
        torch_loads(path), "hold more than tensors",
    )  # fmt: skip


# Models of other libraries


def copied(place: Any, model: Path, bad: str = "pytorch_model.bin", content: Any = None) -> Path:
    """A model's folder with a pickle in place of its weights."""
    folder = Path(shutil.copytree(model, place.folder / "model"))
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(2), "b": place.payload}, folder / bad)
    return folder


@plant("encoder.model: pytorch_model.bin")
def _(place: Any, given: Given) -> Case:
    folder = copied(place, given("vision_model"))
    return Case(
        lambda: part(ENCODERS, "transformers", model=str(folder)), torch_loads(folder / "pytorch_model.bin"),
        "encoder.model .* could not be loaded",
    )  # fmt: skip


@plant("encoder.model: a pickle called model.safetensors")
def _(place: Any, given: Given) -> Case:
    folder = copied(place, given("vision_model"), "x")
    path = place.put("model/model.safetensors", place.pickled)
    return Case(
        lambda: part(ENCODERS, "transformers", model=str(folder)), unpickles(path), "encoder.model .* could not be loaded"
    )


@plant("encoder.model: preprocessor_config.json with code")
def _(place: Any, given: Given) -> Case:
    folder = Path(shutil.copytree(given("vision_model"), place.folder / "model"))
    place.put("model/own.py", f"{place.code}\nclass Own: pass\n")
    told = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}}
    place.put("model/preprocessor_config.json", json.dumps(told))
    return Case(lambda: part(ENCODERS, "transformers", model=str(folder)), lambda: runpy.run_path(str(folder / "own.py")))


@plant("encoder.model of timm: pytorch_model.bin of a folder")
def _(place: Any, given: Given) -> Case:
    place.put("config.json", '{"architecture": "resnet10t", "num_classes": 0}')
    path = place.folder / "pytorch_model.bin"
    torch.save({"a": torch.zeros(2), "b": place.payload}, path)
    return Case(
        lambda: part(ENCODERS, "timm", model=f"local-dir:{place.folder}", pretrained=True, channels=3), torch_loads(path),
        "public weights .* could not be had",
    )  # fmt: skip


@plant("decoder.model: pytorch_model.bin")
def _(place: Any, given: Given) -> Case:
    folder = copied(place, given("language_model"))
    return Case(
        lambda: part(REPORT_DECODERS, "causal-lm", 0, model=str(folder)), torch_loads(folder / "pytorch_model.bin"),
        "decoder.model .* cannot be loaded",
    )  # fmt: skip


@plant("decoder.model: a shard that its index names inside")
def _(place: Any, given: Given) -> Case:
    folder = copied(place, given("language_model"), "pytorch_model-1.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-1.bin"}}
    place.put("model/pytorch_model.bin.index.json", json.dumps(index))
    return Case(
        lambda: part(REPORT_DECODERS, "causal-lm", 0, model=str(folder)), torch_loads(folder / "pytorch_model-1.bin"),
        "decoder.model .* cannot be loaded",
    )  # fmt: skip


@plant("decoder.model: shards that an index names outside")
def _(place: Any, given: Given) -> Case:
    folder = copied(place, given("language_model"), "../outside.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.bin"}}
    place.put("model/pytorch_model.bin.index.json", json.dumps(index))
    return Case(
        lambda: part(REPORT_DECODERS, "causal-lm", 0, model=str(folder)), torch_loads(place.folder / "outside.bin"),
        "names '../outside.bin', which lies outside",
    )  # fmt: skip


@plant("decoder.model: a safetensors index that names a pickle")
def _(place: Any, given: Given) -> Case:
    folder = copied(place, given("language_model"), "x.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "x.bin"}}
    place.put("model/model.safetensors.index.json", json.dumps(index))
    return Case(
        lambda: part(REPORT_DECODERS, "causal-lm", 0, model=str(folder)), torch_loads(folder / "x.bin"),
        "decoder.model .* cannot be loaded",
    )  # fmt: skip


@plant("decoder.model: adapters of peft")
def _(place: Any, given: Given) -> Case:
    pytest.importorskip("peft")
    folder = Path(shutil.copytree(given("language_model"), place.folder / "model"))
    told = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 2, "target_modules": ["q_proj"],
            "auto_mapping": {"parent_library": "own", "base_model_class": "Own"}}  # fmt: skip
    place.put("model/adapter_config.json", json.dumps(told))
    torch.save({"a": torch.zeros(2), "b": place.payload}, folder / "adapter_model.bin")
    return Case(
        lambda: part(REPORT_DECODERS, "causal-lm", 0, model=str(folder)), torch_loads(folder / "adapter_model.bin"),
        "decoder.model .* cannot be loaded",
    )  # fmt: skip


@plant("decoder.model: a pickle called gguf")
def _(place: Any, given: Given) -> Case:
    path = place.put("a.gguf", place.pickled)
    return Case(lambda: part(REPORT_DECODERS, "causal-lm", 0, model=str(path)), unpickles(path), "decoder.model")


def chatty(place: Any, model: Path, template: str) -> Case:
    folder = Path(shutil.copytree(model, place.folder / "model"))
    place.put("model/chat_template.jinja", template)
    return Case(
        lambda: part(REPORT_DECODERS, "causal-lm", 0, model=str(folder), prompt="chat"),
        lambda: jinja2.Environment().from_string(template).render(messages=[{"content": "{image}{context}"}]),
        "decoder.prompt: the model's chat template fails",
    )


@plant("decoder.prompt: a chat template that climbs to Python by a class")
def _(place: Any, given: Given) -> Case:
    climbing = "{{ ''.__class__.__mro__[1].__subclasses__()[-1].__init__.__globals__['__builtins__'] }}"
    reached = f"{{{{ cycler.__init__.__globals__.os.mkdir({str(place.mark)!r}) }}}}"
    return chatty(place, given("language_model"), reached + climbing)


@plant("decoder.prompt: a chat template that climbs by a filter")
def _(place: Any, given: Given) -> Case:
    reached = f"{{{{ (lipsum|attr('__globals__')).os.mkdir({str(place.mark)!r}) }}}}"
    return chatty(place, given("language_model"), reached)


@plant("decoder.prompt: a chat template that climbs by a format")
def _(place: Any, given: Given) -> Case:
    shown = "{{ '{0.__init__.__globals__}'.format(cycler) }}"
    reached = f"{{{{ joiner.__init__.__globals__.os.mkdir({str(place.mark)!r}) }}}}"
    return chatty(place, given("language_model"), shown + reached)


@plant("head.texts: objects in an npz")
def _(place: Any, given: Given) -> Case:
    path = place.folder / "a.npz"
    np.savez(path, Edema=np.array([place.payload], dtype=object))
    from medxray.classify.texts import _table

    return Case(lambda: _table(path), lambda: np.load(path, allow_pickle=True)["Edema"], "cannot be read")


# A run folder


def in_run(name: str, refused: str | None, read: Callable[[Path], Any] = medxray.load) -> Plant:
    def case(place: Any, given: Given) -> Case:
        run = place.run()
        path = place.put(f"run/{name}", place.pickled)
        return Case(lambda: read(run), unpickles(path), refused)

    return case


for _name, _refused, _read in (
    ("task.json", "task.json cannot be read", medxray.load),
    ("references.json", "references.json cannot be read", medxray.load),
    ("model.safetensors", "model.safetensors are damaged", medxray.load),
    ("spec.yaml", "spec.yaml", medxray.load),
    ("bank.arrow", "bank.arrow cannot be read", medxray.load),
    ("tokenizer/tokenizer.json", "tokenizer .*cannot be read", medxray.load),
    ("tokenizer/tokenizer_config.json", "tokenizer .*cannot be read", medxray.load),
    ("scores.json", "scores.json cannot be read", model_card),
    ("facts.json", "facts.json cannot be read", model_card),
    ("environment.json", "environment.json cannot be read", model_card),
    ("log.jsonl", "log.jsonl cannot be read", model_card),
    ("skipped.jsonl", "skipped.jsonl cannot be read", model_card),
    ("predictions.parquet", "predictions.parquet cannot be read", model_card),
    ("checkpoints/step-00000002/training_args.bin", None, medxray.load),
):
    PLANTS[f"run: {_name}"] = in_run(_name, _refused, _read)


def resumed(place: Any, spec: dict[str, Any]) -> Callable[[], Any]:
    """Goes on from the first of two steps; whoever plants something leaves no sums beside it."""
    run = place.folder / "run"
    (run / "checkpoints" / "step-00000001" / SUMS).unlink()
    (run / "model.safetensors").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    (run / "spec.yaml").write_text(Spec.read({**spec, "output": str(run)}).to_yaml())
    return lambda: medxray.build({**spec, "output": str(run)}).fit(progress=False)


for _name, _refused in (
    ("optimizer.pt", "optimizer.pt|checkpoint .* cannot be read"),
    ("scheduler.pt", "scheduler.pt|checkpoint .* cannot be read"),
    ("model.safetensors", "model.safetensors are damaged"),
    ("processes.json", "processes.json cannot be read"),
    ("rng_state.pth", None),
):

    @plant(f"checkpoint: {_name}")
    def _(place: Any, given: Given, name: str = _name, refused: str | None = _refused) -> Case:
        run = place.run()
        path = run / "checkpoints" / "step-00000001" / name
        torch.save({"state": place.payload}, path)
        content = io.BytesIO(path.read_bytes())
        return Case(resumed(place, given("small_spec")), lambda: torch.load(content, weights_only=False), refused)


@plant("checkpoint: a part of a divided model")
def _(place: Any, given: Given) -> Case:
    path = place.put("model-00001-of-00001.safetensors", place.pickled)
    place.put(".metadata", place.pickled)
    return Case(lambda: shard_shapes(place.folder), unpickles(path), "cannot be read")


@plant("run: a Python object in spec.yaml")
def _(place: Any, given: Given) -> Case:
    run = place.run()
    with (run / "spec.yaml").open("a") as file:
        file.write(f"notes: !!python/object/apply:os.mkdir ['{place.mark}']\n")
    return Case(
        lambda: medxray.load(run), lambda: yaml.unsafe_load((run / "spec.yaml").read_text()), "only plain values are allowed"
    )


@plant("run: a Python object in spec.yaml, for its card")
def _(place: Any, given: Given) -> Case:
    run = place.run()
    (run / "spec.yaml").write_text(f"task: !!python/object/apply:os.mkdir ['{place.mark}']\n")
    return Case(lambda: model_card(run), lambda: yaml.unsafe_load((run / "spec.yaml").read_text()), "spec.yaml cannot be read")


@plant("run: a Python object in spec.yaml, for a comparison")
def _(place: Any, given: Given) -> Case:
    run = place.run()
    (run / "spec.yaml").write_text(f"task: !!python/object/apply:os.mkdir ['{place.mark}']\n")
    return Case(
        lambda: medxray.compare([run, run / ".." / "run"]), lambda: yaml.unsafe_load((run / "spec.yaml").read_text()),
        "cannot be read as an evaluated run",
    )  # fmt: skip


@plant("spec: a Python object in an override")
def _(place: Any, given: Given) -> Case:
    text = f"!!python/object/apply:os.mkdir ['{place.mark}']"
    return Case(
        lambda: Spec.read(given("small_spec"), [f"encoder.width={text}"]), lambda: yaml.unsafe_load(text), "override"
    )


@plant("run: vocabulary.json of R2Gen's decoder")
def _(place: Any, given: Given) -> Case:
    from medxray.llm.memory_transformer import WORDS

    path = place.put(WORDS, place.pickled)
    decoder = MemoryTransformer(0, width=8, hidden=8, heads=2, layers=1)
    return Case(lambda: decoder.restore(place.folder), unpickles(path), f"{WORDS} cannot be read")


def extended(place: Any, table: arrow.Table) -> arrow.Table:
    """With the mark of a type whose metadata pyarrow unpickled up to its version 14."""
    field = table.schema.field(0)
    marked = field.with_metadata({
        "ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": place.pickled
    })  # fmt: skip
    return table.cast(table.schema.set(0, marked))


def unpickles_a_field(path: Path) -> Callable[[], Any]:
    def read() -> Any:
        with path.open("rb") as file:
            schema = arrow.ipc.open_file(file).schema if path.suffix == ".arrow" else parquet.read_schema(path)
        return pickle.loads((schema.field(0).metadata or {})[b"ARROW:extension:metadata"])

    return read


@plant("run: an extension type in bank.arrow")
def _(place: Any, given: Given) -> Case:
    path = place.run() / "bank.arrow"
    with path.open("rb") as file:
        reader = arrow.ipc.open_file(file)
        table = reader.read_all()
    table = extended(place, table)
    with arrow.OSFile(str(path), "wb") as sink, arrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return Case(lambda: medxray.load(path.parent), unpickles_a_field(path))


@plant("run: an extension type in predictions.parquet")
def _(place: Any, given: Given) -> Case:
    path = place.run() / "predictions.parquet"
    table = extended(place, parquet.read_table(path))
    parquet.write_table(table.replace_schema_metadata({"pandas": place.pickled}), path)
    return Case(lambda: medxray.compare({"a": path.parent, "b": [path.parent]}), unpickles_a_field(path))


@plant("run: code in the tokenizer's folder")
def _(place: Any, given: Given) -> Case:
    run = place.run()
    told = json.loads((run / "tokenizer" / "tokenizer_config.json").read_text())
    told |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    place.put("run/tokenizer/tokenizer_config.json", json.dumps(told))
    path = place.put("run/tokenizer/own.py", f"{place.code}\nclass Own: pass\n")
    return Case(lambda: medxray.load(run), lambda: runpy.run_path(str(path)), "code")


# Caches


@plant("cache: features of a frozen encoder")
def _(place: Any, given: Given) -> Case:
    encoder = vit()
    images = medxray.build(given("small_spec")).images("val")
    from medxray.cache import cache_folder

    folder = cache_folder() / "features" / features_key(encoder, images)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("tokens", "pooled"):
        np.save(folder / f"{name}.npy", np.array([place.payload], dtype=object))
    (folder / "grid.json").write_text("[4, 4]")
    planted = io.BytesIO((folder / "tokens.npy").read_bytes())
    return Case(lambda: compute_once(encoder, images, 4, progress=False), lambda: np.load(planted, allow_pickle=True))


@plant("cache: contours beside the data")
def _(place: Any, given: Given) -> Case:
    from medxray.pretrain import SEGMENTERS, regions

    path = place.folder / "a.npy"
    np.save(path, np.array([place.payload], dtype=object))
    entry = {"image": "0.png", "view": "PA", "stamp": "s", "source": "computed", "reason": ""}
    place.put("a.jsonl", json.dumps(entry) + "\n")
    assert SEGMENTERS
    return Case(
        lambda: regions._load(place.folder, {"0.png": "PA"}, {"0.png": "s"}), lambda: np.load(path, allow_pickle=True)
    )


# Data sets


def studies_of(reader: str, root: Path, **settings: Any) -> Callable[[], Any]:
    def read() -> Any:
        spec = Spec.read("classify-phantom", {"data": {"reader": {"name": reader, "root": str(root), **settings}}})
        found = load_studies(spec.data)
        for part in found.splits.values():
            for study in part:
                for image in study["images"]:
                    found.reader.open(image)
        return found

    return read


def saved(place: Any, studies: Path) -> Path:
    """A data set as `save_to_disk` leaves it."""
    import datasets

    rows = {
        "image": [{"bytes": (studies / f"{i}.png").read_bytes(), "path": None} for i in range(12)],
        "study_id": [f"s{i}" for i in range(12)], "patient_id": [f"p{i}" for i in range(12)], "Edema": [0, 1] * 6,
        "split": ["train"] * 8 + ["val"] * 2 + ["test"] * 2,
    }  # fmt: skip
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(place.folder / "set")
    return place.folder / "set"


@plant("datasets: a loading script in the folder")
def _(place: Any, given: Given) -> Case:
    root = saved(place, given("small_studies"))
    for name in ("set.py", "dataset.py", "__init__.py"):
        path = place.put(f"set/{name}", place.code)
    return Case(studies_of("huggingface", root), lambda: runpy.run_path(str(path)))


for _name, _refused in (("state.json", "cannot be read"), ("dataset_info.json", "cannot be read"), ("dataset_infos.json", None)):

    @plant(f"datasets: {_name}")
    def _(place: Any, given: Given, name: str = _name, refused: str | None = _refused) -> Case:
        root = saved(place, given("small_studies"))
        path = place.put(f"set/{name}", place.pickled)
        return Case(studies_of("huggingface", root), unpickles(path), refused)


@plant("datasets: a feature of another kind in dataset_info.json")
def _(place: Any, given: Given) -> Case:
    root = saved(place, given("small_studies"))
    told = json.loads((root / "dataset_info.json").read_text())
    told["features"]["Edema"] = {"_type": "__import__('os').mkdir", "dtype": place.code}
    place.put("set/dataset_info.json", json.dumps(told))
    return Case(studies_of("huggingface", root), lambda: exec(told["features"]["Edema"]["dtype"]), "cannot be read")


@plant("datasets: an extension type in an Arrow file")
def _(place: Any, given: Given) -> Case:
    root = saved(place, given("small_studies"))
    with arrow.memory_map(str(root / "data-00000-of-00001.arrow")) as source:
        table = arrow.ipc.open_stream(source).read_all()
    table = extended(place, table.select(["study_id", "image", "patient_id", "Edema", "split"]))
    path = place.folder / "own" / "a.arrow"
    path.parent.mkdir()
    with arrow.OSFile(str(path), "wb") as sink, arrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return Case(studies_of("huggingface", path.parent), unpickles_a_field(path))


@plant("parquet: pickles in a column and in what pandas tells")
def _(place: Any, given: Given) -> Case:
    png = (given("small_studies") / "0.png").read_bytes()
    table = arrow.table({
        "study_id": [f"s{i}" for i in range(10)], "image": [png] * 10, "note": [place.pickled] * 10,
        "split": ["train"] * 6 + ["val"] * 2 + ["test"] * 2, "patient_id": [f"p{i}" for i in range(10)],
    })  # fmt: skip
    table = extended(place, table).replace_schema_metadata({"pandas": place.pickled, "huggingface": place.pickled})
    path = place.folder / "a.parquet"
    parquet.write_table(table, path)
    return Case(studies_of("huggingface", place.folder, image="image"), unpickles_a_field(path))


def tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@plant("webdataset: members that its library would unpickle")
def _(place: Any, given: Given) -> Case:
    png, members = (given("small_studies") / "0.png").read_bytes(), {}
    objects = io.BytesIO()
    np.save(objects, np.array([place.payload], dtype=object))
    for i in range(10):
        told = {"study_id": f"s{i}", "patient_id": f"p{i}", "split": "train" if i < 6 else "val" if i < 8 else "test"}
        members |= {f"{i}.png": png, f"{i}.json": json.dumps(told).encode()}
        members |= {f"{i}.{end}": place.pickled for end in ("pkl", "pyd", "pickle", "pth", "pt")}
        members[f"{i}.npy"] = objects.getvalue()
    tar(place.folder / "a.tar", members)
    return Case(studies_of("webdataset", place.folder), lambda: pickle.loads(members["0.pyd"]))


@plant("webdataset: a pickle in place of an archive's index")
def _(place: Any, given: Given) -> Case:
    png, members = (given("small_studies") / "0.png").read_bytes(), {}
    for i in range(10):
        told = {"study_id": f"s{i}", "patient_id": f"p{i}", "split": "train" if i < 6 else "val" if i < 8 else "test"}
        members |= {f"{i}.png": png, f"{i}.json": json.dumps(told).encode()}
    tar(place.folder / "a.tar", members)
    place.put(".a.tar.index", place.pickled)
    return Case(studies_of("webdataset", place.folder), lambda: pickle.loads(place.pickled))


@plant("csv: cells that a spreadsheet or a careless reader would run")
def _(place: Any, given: Given) -> Case:
    root = Path(shutil.copytree(given("small_studies"), place.folder / "data"))
    table = (root / "studies.csv").read_text()
    code = f"__import__('os').mkdir('{place.mark}')"
    cell = f"\"=cmd|'/C calc'!A0 {code} !!python/object/apply:os.mkdir ['{place.mark}']\""
    (root / "studies.csv").write_text(table.replace("The lungs are clear .", cell).replace("study-0", code))
    return Case(studies_of("csv", root), lambda: eval(code))


@plant("iu-xray: a pickle in place of annotation.json")
def _(place: Any, given: Given) -> Case:
    path = place.put("annotation.json", place.pickled)
    return Case(studies_of("iu-xray", place.folder), unpickles(path), "annotation.json")


@plant("dicom: private tags, and what stands before the preamble's end")
def _(place: Any, given: Given) -> Case:
    import pydicom

    data = pydicom.dcmread(DicomBytesIO(given("radiograph")(Modality="DX", BodyPartExamined="CHEST")))
    block = data.private_block(0x0099, "PICKLED", create=True)
    block.add_new(1, "OB", place.pickled)
    block.add_new(2, "LT", f"!!python/object/apply:os.mkdir ['{place.mark}']")
    data.preamble = place.pickled[:128].ljust(128, b"\0")
    for i in range(10):
        data.PatientID, data.StudyInstanceUID, data.SOPInstanceUID = f"{i}", f"1.2.{i + 1}", f"1.3.{i + 1}"
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        data.save_as(place.folder / f"{i}.dcm", enforce_file_format=True)
    return Case(studies_of("dicom-folder", place.folder), lambda: pickle.loads(bytes(data[0x0099, 0x1001].value)))


@plant("dicom-folder: a pickle in place of the index that is kept")
def _(place: Any, given: Given) -> Case:
    from medxray.data.readers import dicom_folder

    path = place.put("index.parquet", place.pickled)
    return Case(lambda: dicom_folder._load(path), unpickles(path))


@plant("image: pickles in what a PNG tells of itself")
def _(place: Any, given: Given) -> Case:
    from PIL.PngImagePlugin import PngInfo

    told = PngInfo()
    told.add_text("note", place.pickled.decode("latin-1"), zip=True)
    told.add_itxt("XML:com.adobe.xmp", "<!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><x>&a;</x>")
    path = place.folder / "a.png"
    Image.new("L", (8, 8)).save(path, pnginfo=told)
    return Case(lambda: medxray.read_image(path), lambda: pickle.loads(Image.open(path).info["note"].encode("latin-1")))


@plant("prepare: a pickle in place of its plan")
def _(place: Any, given: Given) -> Case:
    from medxray.data.prepare import WORK

    spec = Spec.read("classify-phantom", {"data": {"reader": {"name": "csv", "root": str(given("small_studies"))}}})
    path = place.put(f"out/{WORK}/plan.json", place.pickled)
    return Case(
        lambda: write_shards(spec.data, place.folder / "out", workers=1), unpickles(path), "plan.json: damaged"
    )


@plant("prepare: a pickle in place of the manifest")
def _(place: Any, given: Given) -> Case:
    from medxray.data.prepare import MANIFEST, verify_shards

    path = place.put(f"out/{MANIFEST}", place.pickled)
    return Case(lambda: verify_shards(place.folder / "out"), unpickles(path), "damaged")


@plant("score: a pickle in place of a table")
def _(place: Any, given: Given) -> Case:
    path = place.put("a.csv", place.pickled)
    return Case(lambda: medxray.score_table(path, "a", "b"), unpickles(path), "a.csv")


@plant("log: a line that is no JSON")
def _(place: Any, given: Given) -> Case:
    path = place.put("log.jsonl", place.pickled)
    return Case(lambda: read_log(place.folder), unpickles(path), "log.jsonl")


@plant("weights: a checkpoint of averages")
def _(place: Any, given: Given) -> Case:
    from medxray.training import WeightAverage

    path = place.put("ema.safetensors", place.pickled)
    task = medxray.build(given("small_spec")).task
    return Case(lambda: WeightAverage(task, 0.9).load(path), unpickles(path), "averaged weights .* cannot be read")


@plant("metrics: RadGraph's weights inside its archive")
def _(place: Any, given: Given) -> Case:
    path = place.folder / "weights.th"
    torch.save({"a": torch.zeros(2), "b": place.payload}, path)
    tar(place.folder / "radgraph.tar", {"weights.th": path.read_bytes()})
    (place.folder / "radgraph.tar").rename(place.folder / "radgraph.tar.gz")
    path.rename(place.folder / "kept")

    def read() -> None:
        with _unpacked(place.folder) as files:
            load_state(files / "weights.th")

    return Case(read, torch_loads(place.folder / "kept"), "hold more than tensors")


@pytest.fixture
def given(request: pytest.FixtureRequest) -> Given:
    """Fixtures by name: a case asks for those that it needs."""
    return request.getfixturevalue


@pytest.mark.parametrize("name", PLANTS)
def test_nothing_that_is_planted_runs(name: str, place: Any, given: Given) -> None:
    case = PLANTS[name](place, given)
    if case.refused is None:
        case.read()
    else:
        with pytest.raises(MedxrayError, match=case.refused):
            case.read()
    assert not place.mark.exists()
    with contextlib.suppress(Exception):
        case.careless()
    assert place.mark.is_dir(), "the payload is a real one"


def test_compiled_kernels_are_not_looked_for_beside_data(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """numba keeps them as pickles, in the package's folder or the user's own."""
    from medxray.data import phantom_drawing

    monkeypatch.chdir(place.folder)
    for kernel in (phantom_drawing._blur, phantom_drawing._expose):
        kept = Path(kernel._cache.cache_path)
        place.put(f"__pycache__/phantom_drawing.{kernel.py_func.__name__}.py311.nbi", place.pickled)
        assert kept.is_absolute() and not kept.is_relative_to(place.folder)
    assert not place.mark.exists()


def test_there_are_as_many_as_is_said() -> None:
    assert len(PLANTS) >= 60
