"""A process that reads images, so that what kills it, hangs it or fills its memory does so to no test.

    python reading_child.py JOBS

JOBS is a JSON file: {"seconds": for one image, "max_pixels": ..., "jobs": [[path, mutation], ...]}; mutation is null for
the file as it is, or a number that decides how it is damaged. A line a job goes to standard output.
"""

import json
import random
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np


def mutated(data: bytes, seed: str) -> bytes:
    """Some bytes of a file changed, left out, doubled or moved; every second time near its beginning."""
    draw = random.Random(seed)
    damaged = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 8))):
        reach = len(damaged) if draw.random() < 0.5 else min(len(damaged), 1200)
        at = draw.randrange(max(1, reach))
        kind = draw.random()
        if kind < 0.45:
            damaged[at : at + 1] = bytes([draw.randrange(256)])
        elif kind < 0.6:
            damaged[at : at + 1] = bytes([damaged[at] ^ (1 << draw.randrange(8))]) if damaged else b""
        elif kind < 0.75:
            damaged[at : at + draw.choice((1, 2, 4))] = draw.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"))
        elif kind < 0.83:
            del damaged[at : at + draw.randrange(1, 64)]
        elif kind < 0.91:
            damaged[at:at] = damaged[draw.randrange(max(1, len(damaged))) :][: draw.randrange(1, 64)]
        elif kind < 0.96:
            damaged[at : at + 16] = draw.randbytes(16)
        else:
            del damaged[at:]
    return bytes(damaged)


def main() -> None:
    from medxray.data import ImageError, read_image

    plan = json.loads(Path(sys.argv[1]).read_text())
    warnings.simplefilter("ignore")
    # What is asked for beyond this is refused, not swapped.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, used + 2**31))
    for i, (path, mutation) in enumerate(plan["jobs"]):
        print(json.dumps({"job": i}), flush=True)
        # Its default is the end of the process, in native code too.
        signal.alarm(plan["seconds"])
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        found = {"job": i, "error": "", "message": ""}
        try:
            whole = Path(path)
            source = path if mutation is None else mutated(whole.read_bytes(), f"{whole.name} {mutation}")
            image = read_image(source, max_pixels=plan["max_pixels"], name="mutant")
            sane = image.dtype == np.float32 and image.ndim == 3 and image.size and 0 <= image.min() <= image.max() <= 1
            found["error"] = "" if sane else f"image of {image.dtype} {image.shape}"
        except ImageError as error:
            found |= {"error": "ImageError", "message": str(error)}
        except BaseException as error:
            found |= {"error": type(error).__name__, "message": str(error)}
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        signal.alarm(0)
        print(json.dumps(found | {"seconds": time.perf_counter() - started, "grown": grown // 1024}), flush=True)


if __name__ == "__main__":
    main()
