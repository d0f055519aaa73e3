"""Studies a second that the phantom draws and writes.

    python benchmarks/phantom_speed.py --size 256
"""

import argparse
import tempfile
import time
from pathlib import Path

from medxray.data.phantom import generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--format", choices=["png8", "png16", "dicom"], default="png8")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder) / "compiles", 20, arguments.size, 1, arguments.format, progress=False)
        started = time.perf_counter()
        generate(Path(folder) / "timed", arguments.studies, arguments.size, 0, arguments.format, progress=False)
        rate = arguments.studies / (time.perf_counter() - started)
    print(f"{arguments.studies} studies at {arguments.size} px, {arguments.format}: {rate:.0f} a second")


if __name__ == "__main__":
    main()
