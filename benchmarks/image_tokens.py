"""What a fitted report pipeline gains from its images: validation loss with its image tokens, with those of another
study, and with zeros in their place.

    python benchmarks/image_tokens.py runs/r2gencsr-iu-xray-smollm2 --studies 64
"""

import argparse

import torch

import medxray
from medxray.tasks.report import Report


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a fitted run folder of task report")
    parser.add_argument("--split", default="val")
    parser.add_argument("--studies", type=int, default=None, help="the first so many; all by default")
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()

    pipeline = medxray.load(arguments.run)
    task = pipeline.task.eval()
    assert isinstance(task, Report), f"{arguments.run} is a run of task {pipeline.spec.task}; expected report"
    images = pipeline.images(arguments.split)
    images = images.still(range(min(len(images), arguments.studies or len(images))))
    totals = {"image tokens": 0.0, "of another study": 0.0, "zeroed": 0.0}
    tokens = 0
    for batch in images.batches(arguments.batch_size):
        visual, context, _ = task.inputs(batch)
        tokens += task.items(batch)
        for row, given in zip(totals, (visual, visual.roll(1, 0), torch.zeros_like(visual)), strict=True):
            totals[row] += float(task.decoder.loss(given, context, batch.reports))
    print(f"{arguments.run}, {arguments.split}, {len(images)} studies, {tokens:,} report tokens")
    for row, total in totals.items():
        print(f"{row:>18}  loss {total / tokens:.3f}")


if __name__ == "__main__":
    main()
