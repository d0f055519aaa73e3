"""No code of a model, a data set or a spec is run: by reading the source, and with models that bring their own."""

import ast
import functools
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import medxray
from medxray.classify.texts import _sentences
from medxray.encoders import ENCODERS
from medxray.llm import REPORT_DECODERS
from medxray.registry import SECTIONS, registry_of
from medxray.spec import Spec
from medxray.types import MedxrayError, SpecError

SOURCE = Path(medxray.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# Where a module's name is no constant: tables of this library, and what a package that is installed has registered.
TABLES = {"__init__.py", "registry.py", "data/__init__.py", "metrics/__init__.py", "encoders/scan/__init__.py"}
RUNS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "marshal.load", "marshal.loads", "shelve.open", "dill.load", "joblib.load", "cloudpickle.load", "runpy.run_path",
    "yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "evaluate.load",
    "FileSystemReader", "FileSystem", "shutil.unpack_archive",
}  # fmt: skip


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """All of a file's syntax."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a file, with what is called."""
    for node in nodes(path):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def is_constant(node: ast.AST | None, value: Any) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_module_calls_what_runs_what_it_reads() -> None:
    found = []
    for path in FILES:
        name = path.relative_to(SOURCE).as_posix()
        for called, node in calls(path):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            loader = ast.unparse(given.get("Loader", ast.Constant(None)))
            wrong = (
                called in RUNS
                or (called == "torch.load" and not is_constant(given.get("weights_only"), True))
                or (called == "yaml.load" and loader != "_Loader")
                or (called == "np.load" and not is_constant(given.get("allow_pickle", ast.Constant(False)), False))
                or (called.endswith("extractall") and ast.unparse(given.get("filter", ast.Constant(None))) != "'data'")
                or not is_constant(given.get("shell", ast.Constant(False)), False)
                or (called.endswith("import_module") and not isinstance(node.args[0], ast.Constant) and name not in TABLES)
                or called.endswith("add_safe_globals")
            )
            if wrong:
                found.append(f"{name}:{node.lineno}: {ast.unparse(node)[:80]}")
    assert not found


def test_trust_remote_code_is_false_wherever_something_is_loaded() -> None:
    found, seen = [], 0
    for path in FILES:
        for node in nodes(path):
            values: list[ast.AST | None] = []
            if isinstance(node, ast.Call):
                values = [keyword.value for keyword in node.keywords if keyword.arg == "trust_remote_code"]
                loads = isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
                # Others hand on what they were given, which is looked at where it is made.
                if loads and not values and all(keyword.arg for keyword in node.keywords):
                    found.append(f"{path.name}:{node.lineno}")
            elif isinstance(node, ast.Dict):
                pairs = zip(node.keys, node.values, strict=True)
                values = [value for key, value in pairs if isinstance(key, ast.Constant) and key.value == "trust_remote_code"]
            seen += len(values)
            found += [f"{path.name}:{value.lineno}" for value in values if not is_constant(value, False)]  # type: ignore[union-attr]
    assert not found and seen >= 8


def test_specs_are_read_by_a_loader_without_objects() -> None:
    from medxray.spec import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)


# Models that bring code


@pytest.fixture
def own_model(place: Any, language_model: Path) -> Callable[[str], Path]:
    """A folder with a model of an architecture of its own, or a known one, whose code makes the mark."""

    def make(kind: str) -> Path:
        folder = Path(shutil.copytree(language_model, place.folder / "own"))
        config = json.loads((folder / "config.json").read_text())
        classes = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoModelForCausalLM": "own.Own"}
        (folder / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": classes}))
        (folder / "own.py").write_text(f"{place.code}\nclass Own:\n    pass\n")
        return folder

    return make


def parts(folder: Path) -> dict[str, Callable[[], Any]]:
    def part(registry: Any, name: str, *context: Any, **settings: Any) -> Any:
        return registry.build(registry.settings_of(name)(name=name, **settings), *context)

    return {
        "encoder.model": lambda: part(ENCODERS, "transformers", model=str(folder)),
        "decoder.model": lambda: part(REPORT_DECODERS, "causal-lm", 0, model=str(folder)),
        "head.texts": lambda: _sentences(str(folder), ["Edema"]),
    }


@pytest.mark.parametrize("setting", ["encoder.model", "decoder.model", "head.texts"])
def test_a_model_with_code_of_its_own_is_refused(setting: str, place: Any, own_model: Callable[[str], Path]) -> None:
    from transformers import AutoModel

    folder = own_model("own")
    with pytest.raises(MedxrayError, match=rf"{setting} .*custom code"):
        parts(folder)[setting]()
    assert not place.mark.exists()
    with pytest.raises(Exception):  # noqa: B017  # what becomes of such a class is not of interest
        AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert place.mark.is_dir(), "the code is real"


def test_it_is_said_that_there_is_no_such_setting(
    place: Any, own_model: Callable[[str], Path], small_spec: dict[str, Any]
) -> None:
    with pytest.raises(MedxrayError, match="a model's own code is never run"):
        parts(own_model("own"))["decoder.model"]()
    for setting in ("decoder.trust_remote_code=true", "encoder.trust_remote_code=true", "trust_remote_code=true"):
        with pytest.raises(SpecError, match="trust_remote_code: unknown setting"):
            Spec.read(small_spec, [setting])
    assert not place.mark.exists()


def test_of_a_known_architecture_the_librarys_own_class_is_taken(place: Any, own_model: Callable[[str], Path]) -> None:
    decoder = parts(own_model("llama"))["decoder.model"]()
    assert type(decoder.llm).__module__.startswith("transformers.models.llama")
    assert not place.mark.exists()


@pytest.mark.parametrize("where", ["encoder.model", "decoder.model", "encoder.config", "decoder.config"])
@pytest.mark.parametrize("kernel", ["kernels-community/flash-attn2", "evil/kernel:own@main"])
def test_no_kernel_of_the_hub_is_run(
    where: str, kernel: str, place: Any, vision_model: Path, language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers fetches a program for attention that a config.json names, where the package kernels is installed."""
    from transformers import AutoModel
    from transformers.integrations import hub_kernels

    def fetched(*given: Any, **more: Any) -> Any:
        place.mark.mkdir(exist_ok=True)
        raise ValueError("fetched")

    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", fetched)
    section, _, key = where.partition(".")
    folder = Path(shutil.copytree(vision_model if section == "encoder" else language_model, place.folder / "model"))
    config = json.loads((folder / "config.json").read_text()) | {"attn_implementation": kernel}
    (folder / "config.json").write_text(json.dumps(config))
    registry, name, context = (ENCODERS, "transformers", ()) if section == "encoder" else (REPORT_DECODERS, "causal-lm", (0,))
    known = {k: config[k] for k in ("model_type", "hidden_size", "num_attention_heads", "num_hidden_layers")}
    given: dict[str, Any] = {"model": str(folder)} if key == "model" else {"config": known | {"attn_implementation": kernel}}
    if key == "config" and section == "decoder":
        given["trainable"] = True
    with pytest.raises(MedxrayError, match=r"program of the hub|unknown setting"):
        registry.build(registry.settings_of(name)(name=name, **given), *context)
    assert not place.mark.exists()
    with pytest.raises(Exception):  # noqa: B017
        AutoModel.from_pretrained(folder)
    assert place.mark.is_dir(), "transformers would fetch it"


# What a spec names


NAMES = (
    "os:system", "os.system", "subprocess.Popen", "medxray.cli:main", "planted", "planted:Part", "../planted", "__import__('os')",
)  # fmt: skip


@pytest.mark.parametrize("section", list(SECTIONS))
def test_a_name_imports_nothing_but_what_is_registered(section: str, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place.put("planted.py", place.code)
    monkeypatch.syspath_prepend(str(place.folder))
    monkeypatch.chdir(place.folder)
    for name in NAMES:
        with pytest.raises(SpecError, match=f"unknown {registry_of(section).kind}"):
            registry_of(section).get(name)
    assert not place.mark.exists() and "planted" not in sys.modules


def test_a_packages_name_is_looked_up_and_not_imported(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """decoder.model may be a package that holds a model."""
    place.put("planted/__init__.py", place.code)
    monkeypatch.syspath_prepend(str(place.folder))
    with pytest.raises(MedxrayError, match="no file, folder or installed package of that name holds a model"):
        REPORT_DECODERS.build(REPORT_DECODERS.settings_of("causal-lm")(name="causal-lm", model="planted"), 0)
    assert not place.mark.exists() and "planted" not in sys.modules
    assert importlib.util.find_spec("planted") is not None


def test_entry_points_are_those_of_installed_packages(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package's own part runs when it is named, which is what it was installed for; one that lies in a folder of data or of
    runs is found by nobody."""
    place.put("planted.py", place.code)
    place.put("planted-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: planted\nVersion: 1\n")
    place.put("planted-1.dist-info/entry_points.txt", "[medxray.encoders]\nplanted = planted:Part\n")
    monkeypatch.chdir(place.folder)
    path = [entry for entry in sys.path if entry]
    monkeypatch.setattr(sys, "path", path)
    assert "planted" not in ENCODERS
    with pytest.raises(SpecError, match="unknown encoder"):
        ENCODERS.get("planted")
    assert not place.mark.exists()
    monkeypatch.setattr(sys, "path", [str(place.folder), *path])
    with pytest.raises(SpecError, match="of package"):
        ENCODERS.get("planted")
    assert place.mark.is_dir(), "installed, it is a part"
    sys.modules.pop("planted", None)


# Specs that grow


def lines(*nested: str) -> str:
    return "\n".join(["task: classify", *nested]) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        lines("a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 60)), "labels: *a59"),
        lines("labels: &a [*a]"),
        lines("data: &a {reader: *a}"),
        lines(f"labels: {'[' * 1000}{']' * 1000}"),
    ],
    ids=["aliases of aliases", "a list in itself", "a mapping in itself", "brackets"],
)
def test_a_spec_that_would_grow_without_end_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(SpecError, match=r"is not YAML: (too large|too deeply nested, or a value that holds itself)"):
        Spec.read(tmp_path / "spec.yaml")


@pytest.mark.parametrize("text", ["&a [*a]", "&a {b: *a}", "[" * 1000 + "]" * 1000])
def test_an_override_that_would_grow_without_end_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"override .* nested"):
        Spec.read("classify-phantom", [f"data.labels={text}"])
