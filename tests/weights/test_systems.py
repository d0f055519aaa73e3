"""Whole systems from the checkpoints of their own projects, R2GenGPT, R2GenCSR and R2Gen; and to transformers."""

import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import medxray
from medxray.cli import app
from medxray.retrieval.context import context_tokens
from medxray.types import Context, RunError, SpecError, WeightsError

GOLDEN = Path(os.environ.get("MEDXRAY_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))
SWIN: dict[str, Any] = {
    "name": "transformers", "channels": 3,
    "config": {
        "model_type": "swin", "image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4],
        "window_size": 4,
    },
}  # fmt: skip
VIT = {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 16}
VMAMBA = {"name": "vmamba", "channels": 3, "dims": 8, "depths": [1, 1, 1, 1]}
Q_FORMER = {"name": "q-former", "queries": 5, "width": 8, "heads": 2, "hidden": 16}


def llm_folder(folder: Path, width: int = 32) -> str:
    words = "<pad> <s> </s> <unk> Human : < Img > </ Note with desease . normal Generate a report the heart lungs are clear"
    known = {word: i for i, word in enumerate(words.split())}
    tokenizer = Tokenizer(models.WordLevel(known, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(known), hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return llm_folder(tmp_path_factory.mktemp("llm"))


def spec(root: Path, llm: str, encoder: dict[str, Any] = VIT, **more: Any) -> dict[str, Any]:
    return {
        "name": "system",
        "task": "report",
        "data": {
            "reader": {"name": "csv", "root": str(root), "report": "findings"}, "image_size": 64, "max_studies": 12,
            "max_views": 1,
        },
        "encoder": encoder,
        "decoder": {"name": "causal-lm", "model": llm},
        "training": {"steps": 2, "batch_size": 4},
        "generation": {"max_new_tokens": 6},
        "metrics": ["bleu"],
        **more,
    }  # fmt: skip


FORMER = {"q": "query", "k": "key", "v": "value"}
BACK = (
    (r"^projector\.linear\.", "llama_proj."),
    (r"^projector\.norm\.", "layer_norm."),
    (r"^projector\.queries$", "query_tokens"),
    (r"^projector\.qformer\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"^projector\.qformer\.", "Qformer.bert."),
    (r"^(Qformer\..*attention)\.attention\.", r"\1.self."),
    (r"^encoder\.model\.", "visual_encoder."),
    (r"^encoder\.", "visual_encoder."),
    (r"^decoder\.llm\.", "llama_model."),
)


def released(task: Any, *, adapters: str = "") -> dict[str, Tensor]:
    """A task's trained parameters as R2GenGPT and R2GenCSR save them, with other numbers. With adapters in a part, all
    names of that part get what peft puts around a model."""
    state = {}
    for name, parameter in task.named_parameters():
        if not parameter.requires_grad:
            continue
        for pattern, instead in BACK:
            name = re.sub(pattern, instead, name)
        if adapters and name.startswith(adapters):
            name = name.replace(adapters, f"{adapters}base_model.model.", 1)
            # The layers' former names in transformers, as the releases have them.
            name = re.sub(r"\.attention\.([qkv])_proj\.", lambda match: f".attention.self.{FORMER[match[1]]}.", name)
        state[name] = torch.randn(parameter.shape) * 0.1
    return state


def saved(state: dict[str, Tensor], path: Path, config: Any = None) -> Path:
    torch.save({"model": state, "config": config or {"lr": 1e-4}, "epoch": 3, "step": 700}, path)
    return path


def numbers(task: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in task.named_parameters() if value.requires_grad}


@pytest.mark.parametrize(
    ("encoder", "more", "adapters"),
    [
        (SWIN, {}, ""),
        (VMAMBA, {"retriever": {"name": "fixed", "positives": 1, "negatives": 1, "pools": {"by": "random"}}}, ""),
        (SWIN, {"projector": Q_FORMER}, ""),
        ({**SWIN, "lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}}, {}, "visual_encoder."),
        ({**SWIN, "trainable": False}, {"lora": {"rank": 2}}, "llama_model."),
    ],
    ids=["deep", "R2GenCSR", "Q-Former", "delta", "LoRA in the language model, encoder frozen"],
)
def test_checkpoints_load_evaluate_predict_and_are_saved(
    encoder: dict[str, Any], more: dict[str, Any], adapters: str, phantom: Path, llm: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    base = spec(phantom, llm, encoder, **{key: value for key, value in more.items() if key != "lora"})
    base["decoder"] |= {key: value for key, value in more.items() if key == "lora"}
    state = released(medxray.build(base).task, adapters=adapters)
    file = saved(state, tmp_path / "checkpoint_epoch3.pth")
    pipeline = medxray.load(file, spec=base)
    loaded = numbers(pipeline.task)
    assert len(loaded) == len(state), "all that is trained comes from the file"
    for (name, tensor), own in zip(state.items(), loaded.values(), strict=True):
        assert torch.equal(tensor, own), name
    assert pipeline.folder == Path("runs/system-checkpoint_epoch3")
    image = next((phantom / "images").rglob("*.png"))
    text = pipeline.predict(image).text
    assert 0 <= pipeline.evaluate("val", progress=False)["bleu-4"].value <= 1
    pipeline.save(tmp_path / "mine")
    file.unlink()
    assert medxray.load(tmp_path / "mine").predict(image).text == text


def test_no_data_set_is_needed_to_predict_without_context(phantom: Path, llm: str, tmp_path: Path) -> None:
    base = spec(tmp_path / "nowhere", llm)
    file = saved(released(medxray.build(base).task), tmp_path / "deep.pth")
    assert isinstance(medxray.load(file, spec=base).predict(next((phantom / "images").rglob("*.png"))).text, str)


def test_a_fit_begins_with_a_checkpoint(phantom: Path, llm: str, tmp_path: Path) -> None:
    base = spec(phantom, llm, {**VIT, "weights": str(tmp_path / "not-here.pth")}, output=str(tmp_path / "run"))
    base["training"] |= {"learning_rate": 1e-6}
    state = released(medxray.build(base, {"encoder": {"weights": None}}).task)
    file = saved(state, tmp_path / "deep.pth")
    fitted = medxray.build(base, {"weights": str(file)}).fit(progress=False)
    weight = fitted.task.projector.linear.weight
    assert 0 < (weight - state["llama_proj.weight"]).abs().max() < 1e-4
    file.unlink()
    assert torch.equal(medxray.load(tmp_path / "run").task.projector.linear.weight, weight)


def test_a_fit_begins_where_another_run_ended(phantom: Path, llm: str, tmp_path: Path) -> None:
    base = spec(phantom, llm, VIT, output=str(tmp_path / "first"))
    base["decoder"] |= {"lora": {"rank": 2}}
    first = medxray.build(base).fit(progress=False).task
    base["training"] |= {"learning_rate": 1e-6, "min_learning_rate": 0.0}
    # Context joins in the second fit, and the encoder's own weights are not looked for.
    more = {
        "weights": str(tmp_path / "first"), "output": str(tmp_path / "second"), "encoder": {"weights": "not-here.pth"},
        "retriever": {"name": "fixed", "positives": 1, "negatives": 1},
    }  # fmt: skip
    second = medxray.build(base, more).fit(progress=False).task
    ended = dict(first.named_parameters())
    begun = {name: p for name, p in second.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in begun) and any(name.startswith("encoder.") for name in begun)
    for name, parameter in begun.items():
        assert (parameter - ended[name]).abs().max() < 1e-4, name
    # And back: the context studies stay behind.
    medxray.build(base, {"weights": str(tmp_path / "second"), "output": str(tmp_path / "third")}).fit(progress=False)

    with pytest.raises(WeightsError, match=r"no fitted run.*model\.safetensors \(found: "):
        medxray.build(base, {"weights": str(phantom), "output": str(tmp_path / "x")}).fit(progress=False)
    with pytest.raises(WeightsError, match=r"first do not fit.*the model lacks.*lora_A.*shapes that disagree.*width 32"):
        wide = {"model": llm_folder(tmp_path / "wide", 64), "lora": None}
        medxray.build(base, {"weights": str(tmp_path / "first"), "decoder": wide, "output": str(tmp_path / "x")}).fit()


def test_a_fit_goes_on_with_the_words_of_its_run(phantom: Path, tmp_path: Path) -> None:
    decoder = {"name": "memory-transformer", "width": 16, "hidden": 16, "heads": 2, "layers": 1, "threshold": 1}
    base = spec(phantom, "", VIT, output=str(tmp_path / "first"))
    base |= {"decoder": decoder, "projector": {"name": "linear-relu"}}
    first = medxray.build(base).fit(progress=False).task
    few = {"weights": str(tmp_path / "first"), "output": str(tmp_path / "second"), "data": {"max_studies": 8}}
    second = medxray.build(base, few).fit(progress=False).task
    assert second.decoder.words == first.decoder.words


def test_on_the_command_line(phantom: Path, llm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = medxray.Spec.read(spec(phantom, llm))
    (tmp_path / "system.yaml").write_text(base.to_yaml())
    saved(released(medxray.build(base).task), tmp_path / "deep.pth")
    image = next((phantom / "images").rglob("*.png"))
    done = CliRunner().invoke(app, ["predict", "deep.pth", str(image), "--spec", "system.yaml"])
    assert done.exit_code == 0 and done.stdout.startswith(image.stem), done.output
    arguments = ["evaluate", "deep.pth", "data.max_studies=8", "--spec", "system.yaml", "--split", "val", "-q"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "bleu-4" in done.output, done.output
    done = CliRunner().invoke(app, ["predict", "deep.pth", str(image)])
    assert done.exit_code == 2 and "name its spec" in done.output


def test_what_does_not_fit_is_named(phantom: Path, llm: str, tmp_path: Path) -> None:
    base = spec(phantom, llm)
    state = released(medxray.build(base).task)
    file = saved(state, tmp_path / "deep.pth")

    wide = {"decoder": {"model": llm_folder(tmp_path / "wide", 64)}}
    with pytest.raises(
        WeightsError,
        match=r"llama_proj.weight is \(32, 16\) in the file and \(64, 16\) in the model.*"
        r"the file is for a language model of width 32, decoder.model has 64",
    ):
        medxray.load(file, spec=base, overrides=wide)
    with pytest.raises(WeightsError, match=r"4 missing keys \(.*decoder\.llm\..*q_proj\.lora_A.*decoder.lora=null"):
        medxray.load(file, spec=base, overrides={"decoder": {"lora": {}}})
    with pytest.raises(WeightsError, match=r"not fit VMamba: .*missing keys \(patch_embed.*the model lacks \(.*cls_token"):
        medxray.load(file, spec={**base, "encoder": VMAMBA})
    with pytest.raises(WeightsError, match=r"missing keys \(projector\.queries.*llama_proj\.weight is \(32, 16\) in the file"):
        medxray.load(file, spec=base, overrides={"projector": Q_FORMER})
    shallow = saved({k: v for k, v in state.items() if not k.startswith("visual_encoder")}, tmp_path / "shallow.pth")
    with pytest.raises(WeightsError, match=r"missing keys \(encoder\..*set encoder.trainable=false"):
        medxray.load(shallow, spec=base)
    medxray.load(shallow, spec=base, overrides=["encoder.trainable=false"])

    adapted = {"decoder": {"lora": {"rank": 2}}}
    lora = saved(released(medxray.build(base, adapted).task, adapters="llama_model."), tmp_path / "lora.pth")
    with pytest.raises(WeightsError, match=r"the model lacks \(llama_model\.base_model\.model\..*lora_A.*set decoder.lora=\{\}"):
        medxray.load(lora, spec=base)
    torch.save({"model": {"conv.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"of no system that is known.*conv.weight"):
        medxray.load(tmp_path / "other.pth", spec=base)
    with pytest.raises(WeightsError, match=r"none\.pth"):
        medxray.build({**base, "output": str(tmp_path / "run"), "weights": str(tmp_path / "none.pth")}).fit(progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match="name its spec"):
        medxray.load(file)
    with pytest.raises(RunError, match="a checkpoint file was expected"):
        medxray.load(tmp_path, spec=base)
    with pytest.raises(SpecError, match="no checkpoints of whole systems for task classify"):
        medxray.load(file, spec={
            **{k: v for k, v in base.items() if k not in ("decoder", "generation", "metrics")}, "task": "classify",
            "data": {**base["data"], "reader": {"name": "csv", "root": str(phantom)}},
        })  # fmt: skip


def test_nothing_is_loaded_from_a_file_that_does_not_fit(phantom: Path, llm: str, tmp_path: Path) -> None:
    from medxray.weights.systems import load_system

    task = medxray.build(spec(phantom, llm)).task
    state = released(task)
    before = numbers(task)
    state.pop("layer_norm.bias")
    with pytest.raises(WeightsError, match=r"1 missing keys \(projector.norm.bias\)"):
        load_system(task, str(saved(state, tmp_path / "lacks.pth")))
    assert all(torch.equal(value, before[name]) for name, value in numbers(task).items())


def test_settings_beside_the_tensors_are_read_and_nothing_is_run(phantom: Path, llm: str, tmp_path: Path) -> None:
    """Lightning keeps a training's settings in a class of its own, whose package need not be here."""
    base = spec(phantom, llm)
    state = released(medxray.build(base).task)
    name = "lightning.fabric.utilities.data"
    module = types.ModuleType(name)
    settings = type("AttributeDict", (dict,), {"__module__": name})
    module.AttributeDict = settings  # type: ignore[attr-defined]
    parents = {".".join(name.split(".")[:i]): types.ModuleType(".".join(name.split(".")[:i])) for i in (1, 2, 3)}
    before = dict(sys.modules)
    try:
        sys.modules.update({**parents, name: module})
        file = saved(state, tmp_path / "lightning.pth", settings(learning_rate=1e-4, scorer_types=["Bleu_4", "CIDEr"]))
    finally:
        for key in (*parents, name):
            sys.modules.pop(key)
            if key in before:
                sys.modules[key] = before[key]
    medxray.load(file, spec=base, overrides={"data": {"reader": {"root": str(tmp_path)}}})

    class Bad:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    with pytest.raises(WeightsError, match="were not opened"):
        medxray.load(saved(state, tmp_path / "bad.pth", Bad()), spec=base)
    assert not (tmp_path / "ran").exists()


R2GEN: dict[str, Any] = {
    "encoder": {"name": "timm", "model": "resnet18", "channels": 3},
    "projector": {"name": "linear-relu"},
    "decoder": {"name": "memory-transformer", "width": 16, "hidden": 16, "heads": 2, "layers": 1, "threshold": 1},
}


def test_r2gen(phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ResNet stands in a list without names: the stem first, the four stages from the fifth place on."""
    import timm

    monkeypatch.chdir(tmp_path)
    own = GOLDEN / "r2gen_decoder.safetensors"
    if not own.is_file():
        pytest.skip(f"{own} is missing; it has R2Gen's own names")
    base = {**spec(phantom, ""), **R2GEN}
    pipeline = medxray.build(base)
    pipeline.task.prepare(pipeline.studies)
    task: Any = pipeline.task
    names = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    reference = timm.create_model("resnet18").state_dict()
    visual = {
        f"visual_extractor.model.{names[key.split('.')[0]]}.{key.partition('.')[2]}": torch.rand_like(value, dtype=torch.float32)
        if value.is_floating_point() else value
        for key, value in reference.items() if key.split(".")[0] in names
    }  # fmt: skip
    state = visual | shaped_like_r2gen(load_file(own), task)
    torch.save({"epoch": 9, "state_dict": state, "optimizer": {"lr": 1e-4}, "monitor_best": 0.1}, tmp_path / "model_best.pth")
    loaded = medxray.load(tmp_path / "model_best.pth", spec=base)
    conv = next(value for name, value in loaded.task.encoder.state_dict().items() if name.endswith("layer4.1.conv2.weight"))
    assert torch.equal(conv, visual["visual_extractor.model.7.1.conv2.weight"])
    running = next(value for name, value in loaded.task.encoder.state_dict().items() if name.endswith("model.bn1.running_var"))
    assert torch.equal(running, visual["visual_extractor.model.1.running_var"])
    assert torch.equal(loaded.task.projector.linear.weight, state["encoder_decoder.att_embed.0.weight"])
    assert torch.equal(loaded.task.decoder.head.weight, state["encoder_decoder.logit.weight"])
    assert 0 <= loaded.evaluate("val", progress=False)["bleu-4"].value <= 1
    with pytest.raises(WeightsError, match="projector linear-relu and decoder memory-transformer, found LinearProjector"):
        medxray.load(tmp_path / "model_best.pth", spec={**base, "projector": {"name": "linear"}})
    torch.save({"state_dict": {**state, "encoder_decoder.logit.bias": torch.zeros(7)}}, tmp_path / "words.pth")
    with pytest.raises(WeightsError, match="6 words"):
        medxray.load(tmp_path / "words.pth", spec=base)


def shaped_like_r2gen(golden: dict[str, Tensor], task: Any) -> dict[str, Tensor]:
    """The recorded names of R2Gen's decoder with one layer, filled for this task's shapes."""
    words, width, hidden, slots = len(task.decoder.words) + 1, 16, 16, 3
    sizes = {38: words, 32: width, 48: hidden, 96: slots * width, 64: 2 * width, 24: task.encoder.width}
    return {
        f"encoder_decoder.{key.removeprefix('weights.')}": torch.randn([sizes.get(n, n) for n in value.shape]) * 0.1
        for key, value in golden.items()
        if key.startswith("weights.") and ".layers.1." not in key
    }


def cases() -> list[Path]:
    return [
        path for path in sorted(GOLDEN.glob("*.json"))
        if isinstance(data := json.loads(path.read_text()), dict) and data.get("reference") in ("r2gengpt", "r2gencsr")
    ]  # fmt: skip


@pytest.mark.parametrize("path", cases(), ids=lambda path: path.stem)
def test_the_reference_loss_comes_out_of_a_loaded_checkpoint(path: Path, tmp_path: Path) -> None:
    """The recorded weights, under the reference's own names, through the entry point that a user takes."""
    case, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    tokenizer = Tokenizer(models.WordLevel(case["vocab"], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"</s>|</|[A-Za-z]+|[<>:.,]|\s+|."), behavior="isolated")
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "llm")
    llm = case["llm"]
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=llm["vocab"], hidden_size=llm["hidden_size"], intermediate_size=llm["intermediate_size"],
            num_hidden_layers=llm["layers"], num_attention_heads=llm["heads"],
        )
    ).save_pretrained(tmp_path / "llm")  # fmt: skip
    torch.save(
        {"model": {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}},
        tmp_path / "checkpoint.pth",
    )
    encoder = {**SWIN, "config": {"model_type": "swin", **case["swin"]}}
    base = spec(tmp_path, str(tmp_path / "llm"), encoder)
    base["decoder"]["max_length"] = case["max_length"]
    task: Any = medxray.load(tmp_path / "checkpoint.pth", spec=base).task.eval()
    views = torch.stack([tensors[f"view{i}"] for i in range(case.get("views", 1))], dim=1)
    features = task.encoder(views.flatten(0, 1))
    study, pooled = (x.unflatten(0, views.shape[:2]).mean(1) for x in (features.tokens, features.pooled))
    context = None
    if case["context_pair"]:
        B = len(views)
        pools = [task.encoder(tensors[f"{pool}_images"]).pooled.expand(B, -1, -1) for pool in ("positive", "negative")]
        project, wrap = task.projector.project, task.decoder.wrap_context
        context = context_tokens(case["residual"], pooled, Context(*pools, [], []), project, wrap)
    loss = task.decoder.loss(task.projector(study), context, case["texts"]) / task.decoder.count(case["texts"])
    assert loss.item() == pytest.approx(case["loss_value"], rel=1e-4)


# What transformers reads of a fitted system.


def fitted(phantom: Path, tmp_path: Path, encoder: dict[str, Any], **more: Any) -> medxray.Pipeline:
    base = spec(phantom, llm_folder(tmp_path / "llm"), encoder, output=str(tmp_path / "run"))
    base["training"]["learning_rate"] = 0.05
    base["decoder"] = more.get("decoder", base["decoder"] | {"lora": {"rank": 2}})
    base["projector"] = more.get("projector", {"name": "linear"})
    return medxray.build(base).fit(progress=False)


def test_language_model_and_swin_with_their_updates_merged(phantom: Path, tmp_path: Path) -> None:
    pipeline = fitted(phantom, tmp_path, {**SWIN, "channels": 1, "lora": {"rank": 2}})
    task: Any = pipeline.task.eval()
    assert pipeline.export(tmp_path / "out") == tmp_path / "out"

    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "language_model", trust_remote_code=False)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    ids = torch.tensor([[1, 5, 7, 9]])
    with torch.no_grad():
        torch.testing.assert_close(llm(ids).logits, task.decoder.llm(ids).logits, atol=1e-5, rtol=1e-4)
        assert (llm(ids).logits - before(ids).logits).abs().max() > 1e-3, "the updates are in it"
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "language_model")("lungs are clear").input_ids

    encoder = AutoModel.from_pretrained(tmp_path / "out" / "encoder", trust_remote_code=False).eval()
    told = json.loads((tmp_path / "out" / "encoder" / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(told[key]).view(-1, 1, 1) for key in ("image_mean", "image_std"))
    gray = torch.rand(2, 1, 64, 64)
    colour = (gray.expand(-1, encoder.config.num_channels, -1, -1) - mean) / std
    own = (gray - task.encoder.mean[0]) / task.encoder.std[0]
    with torch.no_grad():
        tokens = encoder(colour).last_hidden_state
        torch.testing.assert_close(tokens, task.encoder(own).tokens, atol=1e-4, rtol=1e-3)
    assert set(load_file(tmp_path / "out" / "projector.safetensors")) == set(task.projector.state_dict())


def test_what_has_no_architecture_there_goes_into_a_folder_of_medxray(phantom: Path, tmp_path: Path) -> None:
    mixed = fitted(phantom, tmp_path / "mixed", VMAMBA)
    mixed.export(tmp_path / "mixed-out")
    assert sorted(path.name for path in (tmp_path / "mixed-out").iterdir()) == ["language_model", "projector.safetensors"]

    neither = fitted(phantom, tmp_path / "neither", VMAMBA, decoder=R2GEN["decoder"], projector=R2GEN["projector"])
    image = next((phantom / "images").rglob("*.png"))
    neither.export(tmp_path / "whole")
    assert medxray.load(tmp_path / "whole").predict(image).text == neither.predict(image).text
    with pytest.raises(WeightsError, match=r"only the encoder 'vit' .* found VMamba; .* take format medxray"):
        neither.export(tmp_path / "no", "transformers")
    with pytest.raises(WeightsError, match="is a run folder"):
        mixed.export(mixed.folder)
    with pytest.raises(WeightsError, match="format 'onnx' is not known"):
        mixed.export(tmp_path / "no", "onnx")  # type: ignore[arg-type]


def test_a_medxray_folder_needs_nothing_beside_it(phantom: Path, tmp_path: Path) -> None:
    pipeline = fitted(phantom, tmp_path, VIT)
    image = next((phantom / "images").rglob("*.png"))
    text = pipeline.predict(image).text
    done = CliRunner().invoke(app, ["export", str(pipeline.folder), str(tmp_path / "whole"), "--format", "medxray"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["export", str(pipeline.folder), str(tmp_path / "parts")])
    assert done.exit_code == 0 and "language_model" in done.stdout and "encoder" in done.stdout
    assert AutoModel.from_pretrained(tmp_path / "parts" / "encoder").config.model_type == "vit"
    for file in (tmp_path / "llm").iterdir():
        file.unlink()
    assert medxray.load(tmp_path / "whole").predict(image).text == text
