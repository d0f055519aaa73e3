"""Everything in small, from made-up radiographs to reports, in a few minutes on a laptop."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medxray.pipeline import Pipeline, build
from medxray.types import Scores


def run(
    folder: Path,
    *,
    reader: Mapping[str, Any] | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Scores:
    """Makes data, pre-trains, classifies, fits R2GenCSR with and without its retriever, evaluates and predicts.

    What is finished already is not done again, so that a second call takes seconds.

    Args:
        folder: gets data/, pretrain/, classify/, r2gencsr/ and no-retriever/.
        reader: settings of `data.reader` in place of the specs' own.
        progress: show bars.
        say: takes each line of the summary.

    Returns:
        The scores of R2GenCSR on the test patients, with the fit without a retriever as one row more.
    """
    data = {"reader": {"root": str(folder / "data"), **(reader or {})}}

    def build_in(spec: str, run: str, **overrides: Any) -> Pipeline:
        return build(spec, {"data": data, "name": run, "output": str(folder / run), **overrides})

    say("1/5  hd-mae-phantom: masked auto-encoding on made-up chest X-rays")
    build_in("hd-mae-phantom", "pretrain").fit(progress=progress)
    say("2/5  classify-phantom: findings, from the pre-trained encoder")
    build_in("classify-phantom", "classify", encoder={"weights": str(folder / "pretrain")}).fit(progress=progress)
    say("3/5  r2gencsr-phantom: reports, from the classifier's encoder, frozen")
    encoder = {"weights": str(folder / "classify"), "trainable": False}
    pipeline = build_in("r2gencsr-phantom", "r2gencsr", encoder=encoder).fit(progress=progress)
    say("4/5  the same without a retriever")
    alone = build_in("r2gencsr-phantom", "no-retriever", encoder=encoder, retriever=None).fit(progress=progress)
    say("5/5  evaluating on test patients")
    scores = pipeline.evaluate(progress=progress, beside={"fitted without a retriever": alone})
    _predict(pipeline, say)
    say("")
    say(str(scores))
    say("")
    say(f"report: {(pipeline.folder / 'report.html').resolve()}")
    return scores


def _predict(pipeline: Pipeline, say: Callable[[str], None]) -> None:
    images = pipeline.images("test").still([0])
    files = tuple(images.root / name for name in images.images[0])
    prediction = pipeline.predict(files)
    say("")
    say(f"predict({', '.join(file.name for file in files)}):")
    say(f"  {prediction}")
    say("what the phantom's radiologist wrote:")
    say(f"  {images.reports[0]}")
