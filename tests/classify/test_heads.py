"""Every registered head: shapes, gradients, files; and what each of ours promises."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

import medxray
from medxray.classify import HEADS, Head, JoiningHead, MemoryHead
from medxray.classify.heads import AttentiveProbe, KNearest, LabelTextFusion, LinearHead
from medxray.classify.texts import embed
from medxray.tasks.classify import Classify
from medxray.training import parameter_groups
from medxray.types import Batch, Features, RunError, SpecError, WeightsError

WIDTH = 32
LABELS = ["Cardiomegaly", "Effusion", "Nodule"]
OWN = {"k-nearest": {"k": 3}}
CHOICES = {
    "linear": [{"pooling": "max"}, {"norm": "batch"}],
    "attentive-probe": [{"queries": "single"}, {"heads": 4}],
    "label-text-fusion": [{"text_width": 16}],
}
EVERY = [(name, {**OWN.get(name, {}), **choice}) for name in HEADS.names() for choice in [{}, *CHOICES.get(name, [])]]


def features(batch: int = 6, tokens: int = 9, seed: int = 0) -> Features:
    x = torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Features(x, None, x.mean(1))


def built(name: str, settings: dict[str, Any], classes: int) -> Head:
    torch.manual_seed(0)
    head = HEADS.build(HEADS.settings_of(name)(**settings), WIDTH, classes)
    head.read_labels([f"label {i}" for i in range(classes)])
    if isinstance(head, MemoryHead):
        known = features(20, seed=1).pooled
        head.reserve(len(known))
        head.fill(known, (known[:, :classes] > 0).float(), torch.arange(20))
    return head


def test_a_batch_normalised_probe_does_not_see_the_scale_of_channels() -> None:
    x = features(batch=16)
    scales = torch.logspace(-1, 1, WIDTH)
    scaled = Features(x.tokens * scales, None, x.pooled * scales + 3)
    of = {}
    for norm in ("batch", "layer"):
        torch.manual_seed(0)
        head = LinearHead(WIDTH, 3, norm=norm).train()
        of[norm] = (head(x) - head(scaled)).abs().max()
    assert of["batch"] < 1e-3 < of["layer"]
    assert sum(p.numel() for p in LinearHead(WIDTH, 3, norm="batch").parameters()) == 3 * WIDTH + 3


@pytest.mark.parametrize("classes", [1, 14])
@pytest.mark.parametrize(("name", "settings"), EVERY, ids=str)
def test_shapes_gradients_and_files(name: str, settings: dict[str, Any], classes: int, tmp_path: Path) -> None:
    head = built(name, settings, classes)
    x = features()
    logits = head.train()(x)
    assert logits.shape == (6, classes) and bool(logits.isfinite().all())
    (logits * torch.randn(6, classes)).sum().backward()
    for key, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, key
    head.eval()
    with torch.no_grad():
        whole = head(x)
        one = torch.cat([head(Features(x.tokens[i : i + 1], None, x.pooled[i : i + 1])) for i in range(6)])
    assert torch.allclose(one, whole, atol=1e-5), "a study's logits do not hang on its neighbours"
    torch.save(head.state_dict(), tmp_path / "head.pt")
    torch.manual_seed(5)
    other = HEADS.build(HEADS.settings_of(name)(**settings), WIDTH, classes).eval()
    if isinstance(other, MemoryHead):
        other.reserve(20)
    other.load_state_dict(torch.load(tmp_path / "head.pt"))
    assert torch.equal(other(x), whole)


@pytest.mark.parametrize("name", HEADS.names())
def test_half_precision(name: str) -> None:
    head = built(name, OWN.get(name, {}), 3).eval()
    x = features()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = head(x).float()
    assert bool(half.isfinite().all()) and torch.allclose(half, head(x), atol=0.1)


# Whole pipelines.


def spec(root: Path, folder: Path, head: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    return {
        "task": "classify",
        "output": str(folder),
        "data": {"image_size": 64, "reader": {"name": "csv", "root": str(root)}, "max_studies": 24},
        "encoder": {"name": "vit", "width": 32, "depth": 2, "heads": 2, "patch": 16},
        "head": head,
        "training": {"steps": 3, "batch_size": 8, "learning_rate": 3e-3},
        **overrides,
    }


def frozen(name: str) -> bool:
    return issubclass(HEADS.get(name), MemoryHead)


@pytest.mark.parametrize("name", HEADS.names())
@pytest.mark.parametrize("probe", [False, True], ids=["fine-tuned", "probe"])
def test_every_head_is_fitted_saved_and_loaded(name: str, probe: bool, phantom: Path, tmp_path: Path) -> None:
    head = {"name": name, **OWN.get(name, {}), "loss": "exponential"}
    base = spec(phantom, tmp_path / "run", head)
    base["encoder"]["trainable"] = not probe
    if frozen(name) and not probe:
        with pytest.raises(SpecError, match=r"head\.name: 'k-nearest' keeps features .* encoder\.trainable: false"):
            medxray.build(base).fit(progress=False)
        return
    pipeline = medxray.build(base)
    before = {key: value.clone() for key, value in pipeline.task.encoder.state_dict().items()}
    pipeline.fit(progress=False)
    changed = any(not torch.equal(before[key], value) for key, value in pipeline.task.encoder.state_dict().items())
    assert changed != probe
    assert len(pipeline.task.rates) == len(pipeline.task.labels) and all(0 <= rate <= 1 for rate in pipeline.task.rates)
    files = sorted((phantom / "images").rglob("*.png"))[:5]
    scores = [p.scores for p in pipeline.predict(list(files))]
    assert all(0 <= value <= 1 for row in scores for value in row.values())
    loaded = medxray.load(pipeline.save(tmp_path / "saved"))
    assert [p.scores for p in loaded.predict(list(files))] == scores
    one = loaded.predict(files[0]).scores
    assert one.keys() == scores[0].keys() and np.allclose(list(one.values()), list(scores[0].values()), atol=1e-5)


def test_rates_of_the_training_studies_weigh_the_loss(phantom: Path, tmp_path: Path) -> None:
    pipeline = medxray.build(spec(phantom, tmp_path / "run", {"name": "linear", "loss": "exponential"}))
    task = pipeline.task
    task.prepare(pipeline.studies)
    values = np.array([list(row.values()) for row in pipeline.studies.splits["train"]["labels"]], float)
    assert np.allclose(task.rates, (values == 1).sum(0) / (values >= 0).sum(0), atol=1e-6)
    batch = next(pipeline.images("train").batches(8))
    plain = medxray.build(spec(phantom, tmp_path / "x", {"name": "linear"})).task
    plain.prepare(pipeline.studies)
    known = (batch.labels == 0) | (batch.labels == 1)
    assert 0 < known.sum() < known.numel(), "some are uncertain"
    y, p = batch.labels[known], torch.tensor(task.rates).expand_as(known)[known]
    each = nn.functional.binary_cross_entropy_with_logits(task.logits(batch)[known], y, reduction="none")
    assert torch.allclose(plain(batch), each.mean(), atol=1e-6)
    assert torch.allclose(task(batch), (each * torch.exp(y * (1 - p) + (1 - y) * p)).mean(), atol=1e-6)


# Linear and attentive probes.


def test_the_linear_head_is_what_it_was() -> None:
    torch.manual_seed(3)
    head = LinearHead(8, 2)
    assert sorted(head.state_dict()) == ["linear.bias", "linear.weight", "norm.bias", "norm.weight"]
    x = Features(torch.randn(2, 5, 8), None, torch.randn(2, 8))
    assert torch.equal(head(x), head.linear(head.norm(x.pooled)))


def test_attention_of_the_probe() -> None:
    head = AttentiveProbe(WIDTH, 5, heads=4)
    x = features(3)
    tokens = nn.functional.layer_norm(x.tokens, (WIDTH,), eps=1e-6)
    expected = torch.empty(3, 5)
    for k in range(5):
        parts = []
        for h in range(4):
            own = slice(8 * h, 8 * h + 8)
            keys, values = head.key(tokens)[..., own], head.value(tokens)[..., own]
            weights = (keys @ head.query_token[k, own] / 8**0.5).softmax(1)
            parts.append((weights[..., None] * values).sum(1))
        expected[:, k] = torch.cat(parts, 1) @ head.weight[k] + head.bias[k]
    assert torch.allclose(head(x), expected, atol=1e-5)
    with pytest.raises(SpecError, match="head 'attentive-probe': heads must divide the encoder's width 30, found 8"):
        HEADS.build(HEADS.settings_of("attentive-probe")(), 30, 2)


def test_queries_and_single_tokens_are_not_decayed(phantom: Path, tmp_path: Path) -> None:
    base = spec(phantom, tmp_path / "run", {"name": "attentive-probe"})
    pipeline = medxray.build(base, ["training.layer_decay=0.5", "training.weight_decay=0.1"])
    task = pipeline.task
    task.prepare(pipeline.studies)
    rates = {}
    for group in parameter_groups(task, task.spec.training, peak=3e-3):
        for parameter in group["params"]:
            name = next(name for name, p in task.named_parameters() if p is parameter)
            rates[name] = (group["lr"], group["weight_decay"])
    assert set(rates) == {name for name, _ in task.named_parameters()}
    top = 3e-3
    assert rates["head.query_token"] == (top, 0.0) and rates["head.weight"] == (top, 0.1)
    assert rates["head.bias"] == (top, 0.0)
    assert rates["encoder.norm.weight"] == (top, 0.0)
    assert rates["encoder.blocks.1.mlp.fc1.weight"] == (top / 2, 0.1)
    assert rates["encoder.blocks.0.mlp.fc1.weight"] == (top / 4, 0.1)
    assert rates["encoder.patch_embed.proj.weight"] == (top / 8, 0.1)


# Label texts.


def joined(phantom: Path, folder: Path, encoder: dict[str, Any] | None = None, **settings: Any) -> Classify:
    base = spec(phantom, folder, {"name": "label-text-fusion", "text_width": 16, **settings})
    base["encoder"].update(encoder or {})
    pipeline = medxray.build(base)
    task = pipeline.task
    task.prepare(pipeline.studies)
    assert isinstance(task, Classify)
    return task


def batch_of(task: Classify, studies: int = 4, views: int = 2) -> Batch:
    draw = torch.Generator().manual_seed(0)
    return Batch(
        pixels=torch.randn(studies, views, 1, 64, 64, generator=draw),
        view_mask=torch.ones(studies, views, dtype=torch.bool),
        reports=[""] * studies,
        labels=(torch.rand(studies, len(task.labels), generator=draw) > 0.5).float(),
        study_ids=[f"n{i}" for i in range(studies)],
        patient_ids=[""] * studies,
        seeds=torch.zeros(studies, dtype=torch.int64),
    )


@pytest.mark.parametrize("positions", ["sincos", "rope"])
@pytest.mark.parametrize("registers", [0, 2])
def test_an_encoder_that_is_joined_is_still_itself(positions: str, registers: int) -> None:
    """Without own tokens, the two halves are the whole; own tokens change the image's."""
    torch.manual_seed(0)
    vit = medxray.encoders.get("vit")(
        width=32, depth=3, heads=2, patch=16, positions=positions, registers=registers
    )
    images = torch.randn(2, 1, 64, 48)
    before = vit.before_last(images)
    assert before.grid == (4, 3) and before.tokens.shape == (2, 1 + registers + 12, 32)
    alone = vit.last(before.tokens, before.grid, torch.zeros(2, 0, 32))
    assert torch.allclose(alone[:, 1 + registers :], vit(images).tokens, atol=1e-6)
    own = torch.randn(2, 3, 32)
    both = vit.last(before.tokens, before.grid, own)
    assert both.shape[1] == alone.shape[1] + 3 and not torch.allclose(both[:, :-3], alone, atol=1e-3)
    # Own tokens have no place: their order changes nothing but their own.
    swapped = vit.last(before.tokens, before.grid, own.flip(1))
    assert torch.allclose(swapped[:, :-3], both[:, :-3], atol=1e-5)
    assert torch.allclose(swapped[:, -3:].flip(1), both[:, -3:], atol=1e-5)
    # Two views side by side: each in its own grid.
    twice = vit.last(before.tokens.repeat(1, 2, 1), before.grid, torch.zeros(2, 0, 32))
    assert torch.allclose(twice, alone.repeat(1, 2, 1), atol=1e-5)


@pytest.mark.parametrize("views", ["average", "concatenate"])
@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_label_tokens_go_through_the_encoders_last_block(
    views: str, positions: str, phantom: Path, tmp_path: Path
) -> None:
    base = spec(phantom, tmp_path / "run", {"name": "label-text-fusion", "text_width": 16})
    base["data"]["views"] = views
    base["encoder"]["positions"] = positions
    pipeline = medxray.build(base)
    task = pipeline.task
    task.prepare(pipeline.studies)
    assert task.joined and task.head.block is None, "the head has no block of its own"
    seen: list[Tensor] = []
    task.encoder.blocks[-1].register_forward_hook(lambda block, inputs, out: seen.append(inputs[0]))
    task.train()
    batch = batch_of(task)
    task(batch).backward()
    K, image = len(task.labels), 1 + 16
    assert [x.shape for x in seen] == [(4, (2 if views == "concatenate" else 1) * image + K, 32)]
    assert torch.allclose(seen[0][:, -K:], task.head.project(task.head.texts).expand(4, -1, -1))
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    # A label's logit follows its own text, through the last block, and another's hardly.
    task.eval()
    with torch.no_grad():
        before = task.logits(batch)
        task.head.texts[0] += 10
        moved = (task.logits(batch) - before).abs().mean(0)
    assert moved[0] > 2 * moved[1:].max() > 0


def test_a_frozen_encoder_or_one_of_no_blocks_is_not_joined(phantom: Path, tmp_path: Path) -> None:
    for encoder in ({"trainable": False}, {"name": "vmamba", "size": "tiny"}):
        base = spec(phantom, tmp_path / "run", {"name": "label-text-fusion"})
        base["encoder"] = {**base["encoder"], **encoder} if "name" not in encoder else {"name": "timm", "model": "test_resnet"}
        pipeline = medxray.build(base)
        pipeline.task.prepare(pipeline.studies)
        assert not pipeline.task.joined and isinstance(pipeline.task.head.block, nn.Module)
        task = pipeline.task.train()
        task(batch_of(task)).backward()
        for name, parameter in task.head.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_batch_norm_of_one_study_is_refused_in_words() -> None:
    head = built("label-text-fusion", {}, 3)
    with pytest.raises(SpecError, match=r"needs 2 studies a step and process, found 1; raise training\.batch_size"):
        head.train()(features(1))
    assert head.eval()(features(1)).shape == (1, 3)


@pytest.fixture(scope="module")
def sentence_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a vocabulary of whole words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "radiograph", "with", "cardiomegaly", "effusion", "nodule"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=len(words), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(folder)
    return folder


def test_texts_of_a_sentence_encoder(sentence_encoder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    prompt = "a radiograph with {label}"
    found = embed(str(sentence_encoder), LABELS, prompt, 24)
    assert found.shape == (3, 24) and found.dtype == torch.float32 and not found.requires_grad
    model, tokenizer = AutoModel.from_pretrained(sentence_encoder).eval(), AutoTokenizer.from_pretrained(sentence_encoder)
    for label, vector in zip(LABELS, found, strict=True):
        alone = tokenizer(prompt.replace("{label}", label), return_tensors="pt")
        assert torch.allclose(model(**alone).last_hidden_state[0].mean(0), vector, atol=1e-5), "padding counts for nothing"
    longer = embed(str(sentence_encoder), [*LABELS, "nodule with effusion with nodule"], prompt, 24)
    assert torch.allclose(longer[:3], found, atol=1e-5)
    assert not torch.allclose(embed(str(sentence_encoder), LABELS, "{label}", 24), found, atol=1e-2)


def test_a_fitted_run_needs_no_sentence_encoder(sentence_encoder: Path, phantom: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bert"
    copy.mkdir()
    for file in sentence_encoder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    head = {"name": "label-text-fusion", "texts": str(copy), "text_width": 24, "prompt": "a radiograph with {label}"}
    pipeline = medxray.build(spec(phantom, tmp_path / "run", head)).fit(progress=False)
    assert torch.equal(pipeline.task.head.texts, embed(str(copy), pipeline.task.labels, head["prompt"], 24))
    image = next((phantom / "images").rglob("*.png"))
    scores = pipeline.predict(image).scores
    for file in copy.iterdir():
        file.unlink()
    copy.rmdir()
    assert medxray.load(tmp_path / "run").predict(image).scores == scores


@pytest.mark.parametrize("kind", ["npz", "safetensors", "json"])
def test_texts_of_a_file(kind: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    vectors = {label: np.arange(8, dtype=np.float32) + i for i, label in enumerate(reversed([*LABELS, "other"]))}
    file = tmp_path / f"texts.{kind}"
    if kind == "npz":
        np.savez(file, **vectors)
    elif kind == "safetensors":
        save_file(vectors, file)
    else:
        file.write_text(json.dumps({label: vector.tolist() for label, vector in vectors.items()}))
    found = embed(str(file), LABELS, "{label}", 8)
    assert torch.equal(found, torch.tensor(np.stack([vectors[label] for label in LABELS])))
    with pytest.raises(SpecError, match=r"no vector for label 'Nodul'; did you mean 'Nodule'\? \(1 of 2 lack one"):
        embed(str(file), ["Effusion", "Nodul"], "{label}", 8)
    with pytest.raises(SpecError, match=r"768 numbers a label were expected, found 8 numbers for 'Cardiomegaly'"):
        embed(str(file), LABELS, "{label}", 768)


def test_what_texts_cannot_be(tmp_path: Path, sentence_encoder: Path) -> None:
    with pytest.raises(WeightsError, match=r"no such file; give one of label -> vector, or a sentence encoder"):
        embed(str(tmp_path / "none.npz"), LABELS, "{label}", 8)
    (tmp_path / "bad.json").write_text("[1, 2]")
    with pytest.raises(WeightsError, match=r"bad\.json' cannot be read: a mapping of label -> vector was expected, found list"):
        embed(str(tmp_path / "bad.json"), LABELS, "{label}", 8)
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    np.savez(tmp_path / "bad.npz", Nodule=np.array([{"an": "object"}], dtype=object))
    (tmp_path / "words.json").write_text('{"Nodule": ["a"]}')
    for name in ("bad.safetensors", "bad.npz", "words.json"):
        with pytest.raises(WeightsError, match=r"cannot be read: .*expected label -> vector"):
            embed(str(tmp_path / name), ["Nodule"], "{label}", 8)
    (tmp_path / "inf.json").write_text('{"Nodule": [1.0, Infinity]}')
    with pytest.raises(SpecError, match="numbers that are not finite"):
        embed(str(tmp_path / "inf.json"), ["Nodule"], "{label}", 2)
    for name in ("nobody/no-such-model", str(tmp_path)):
        with pytest.raises(WeightsError, match=r"cannot be loaded: .*; expected the Hugging Face name or the folder"):
            embed(name, LABELS, "{label}", 8)
    with pytest.raises(SpecError, match="8 numbers a label were expected, found 24 numbers"):
        embed(str(sentence_encoder), LABELS, "{label}", 8)
    with pytest.raises(SpecError, match=r"head 'label-text-fusion': prompt must hold \{label\}, found 'finding'"):
        HEADS.build(HEADS.settings_of("label-text-fusion")(prompt="finding"), WIDTH, 2)


# Nearest neighbours.


def test_votes_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    known, new = draw.normal(size=(200, WIDTH)).astype(np.float32), draw.normal(size=(40, WIDTH)).astype(np.float32)
    labels = (draw.random((200, 4)) < 0.4).astype(np.float32)
    head = KNearest(WIDTH, 4, k=11, temperature=0.07)
    head.reserve(200)
    head.fill(torch.from_numpy(known), torch.from_numpy(labels), torch.arange(200))
    peer = KNeighborsClassifier(11, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = np.stack([p[:, 1] for p in peer.fit(known, labels).predict_proba(new)], 1)
    votes = head.votes(torch.from_numpy(new))
    assert np.allclose(votes, expected, atol=1e-4)
    probabilities = head(Features(torch.zeros(40, 1, WIDTH), None, torch.from_numpy(new))).sigmoid()
    assert torch.allclose(probabilities, votes, atol=2e-3), "before a fit, probabilities are the votes"
    order = [sorted(range(40), key=lambda i: float(x[i, 0])) for x in (votes, probabilities)]
    assert torch.allclose(votes[order[0], 0], votes[order[1], 0], atol=1e-6)


def test_only_known_labels_of_others_vote() -> None:
    """The nearest of all is of the same patient; of the next ones, not everything is known."""
    nan = torch.nan
    angles = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])
    known = torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.tensor([[1.0, 1.0, nan], [0.0, -1.0, nan], [0.0, 1.0, -1.0], [1.0, nan, nan], [1.0, 0.0, nan]])
    head = KNearest(2, 3, k=2, temperature=0.5)
    head.reserve(5)
    head.fill(known * 3, labels, torch.tensor([7, 8, 8, 9, 10]))
    votes = head.votes(known[:1], torch.tensor([7]))[0]
    similar = torch.cos(angles)
    weights = ((similar[[2, 4]] - similar[2]) / 0.5).exp()
    assert votes.tolist() == pytest.approx([0.0, float(weights[0] / weights.sum()), 0.5])
    stranger = head.votes(known[:1])[0]
    own = torch.stack([similar[0], similar[1]]).div(0.5).softmax(0)
    assert float(stranger[0]) == pytest.approx(float(own[0]))
    cold = KNearest(2, 3, k=2, temperature=1e-3)
    cold.reserve(5)
    cold.fill(known, labels, torch.arange(5))
    assert bool(cold.votes(-known).isfinite().all()), "far neighbours at a low temperature"


def test_more_neighbours_than_studies() -> None:
    head = KNearest(4, 1, k=5)
    head.reserve(6)
    with pytest.raises(SpecError, match=r"head\.k: 5 neighbours .* has 6 studies, 2 of them of one patient; lower it to 4"):
        head.fill(torch.randn(6, 4), torch.zeros(6, 1), torch.tensor([1, 1, 2, 3, 4, 5]))
    with pytest.raises(SpecError, match=r"head\.k: 5 neighbours"):
        head.reserve(0)
        head.fill(torch.zeros(0, 4), torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))


def test_a_training_study_never_votes_for_itself(phantom: Path, tmp_path: Path) -> None:
    base = spec(phantom, tmp_path / "run", {"name": "k-nearest", "k": 1})
    base["encoder"]["trainable"] = False
    base["training"] = {"steps": 1, "batch_size": 8, "learning_rate": 1e-4}
    pipeline = medxray.build(base).fit(progress=False)
    task, train = pipeline.task, pipeline.images("train")
    batch = next(train.batches(len(train)))
    pooled = nn.functional.normalize(task.study_features(batch).pooled, dim=1)
    strangers = torch.tensor([[a != b for b in train.patient_ids] for a in train.patient_ids])
    known = (train.labels >= 0).T[:, None]

    def nearest(allowed: torch.Tensor) -> torch.Tensor:
        rows = (pooled @ pooled.T).masked_fill(~allowed, -2).argmax(2)
        return torch.stack([label[row] for label, row in zip(train.labels.T, rows, strict=True)], 1)

    votes = task.head.votes(task.study_features(batch).pooled, task._owners(batch))
    assert torch.equal(votes, nearest(known & strangers))
    itself = task.head.votes(task.study_features(batch).pooled)
    assert torch.equal(itself, nearest(known.expand(-1, len(train), -1))), "to a stranger, it is its own nearest"
    assert not torch.equal(itself, votes)
    base["head"]["k"] = 500
    with pytest.raises(SpecError, match=r"head\.k: 500 neighbours of other patients were asked for"):
        medxray.build({**base, "output": str(tmp_path / "many")}).fit(progress=False)


def test_a_pretrained_run_is_fine_tuned_at_another_size(phantom: Path, tmp_path: Path) -> None:
    encoder = {"name": "vit", "width": 32, "depth": 2, "heads": 2, "patch": 16}
    data = {"image_size": 64, "reader": {"name": "csv", "root": str(phantom)}, "max_studies": 24}
    first = medxray.build({
        "task": "pretrain", "output": str(tmp_path / "pretrain"), "data": data, "encoder": encoder,
        "training": {"steps": 2, "batch_size": 8},
    }).fit(progress=False)  # fmt: skip
    for head in ("linear", "label-text-fusion"):
        base = spec(phantom, tmp_path / head, {"name": head})
        base["data"] = {**data, "image_size": 96}
        base["encoder"]["weights"] = str(first.folder)
        base["training"]["layer_decay"] = 0.7
        second = medxray.build(base)
        for a, b in zip(first.task.encoder.parameters(), second.task.encoder.parameters(), strict=True):
            assert torch.equal(a, b)
        second.fit(progress=False)
        image = next((phantom / "images").rglob("*.png"))
        assert len(medxray.load(second.folder).predict(image).scores) == len(second.task.labels)
    with pytest.raises(RunError, match="not a finished run"):
        medxray.load(tmp_path / "nothing")


def test_what_subclasses_say_of_themselves() -> None:
    assert isinstance(LabelTextFusion(32, 2), JoiningHead) and isinstance(KNearest(8, 2), MemoryHead)
    described = {
        key: field.description
        for name in HEADS.names()
        for key, field in HEADS.settings_of(name).model_fields.items()
        if key != "name" and HEADS.get(name).__module__.startswith("medxray.")
    }
    assert all(described.values()), [key for key, text in described.items() if not text]
