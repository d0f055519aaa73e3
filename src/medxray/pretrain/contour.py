"""Where the chest is in a radiograph."""

import math
from functools import cache
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from scipy import fft, ndimage

from medxray.data.phantom import draw_study
from medxray.pretrain import Region, Segmenter
from medxray.pretrain.maskers import release_rectangle

Array = NDArray[np.float32]
Kind = Literal["frontal", "lateral"]

_SIDE, _COARSE, _MASK = 64, 32, 128  # pixels of the long side: to fit, to search, to draw the result
_POINTS, _MARGIN = 40, 1.3  # an atlas is a square of so many points a side; its side in sides of the chest's box
_PHANTOMS, _SEED = 60, 20_011  # from which an atlas is made; never those of a test or a demonstration
_BOTH: tuple[Kind, ...] = ("frontal", "lateral")
_SURE, _FOUND = 0.65, 0.6  # a fit that scores more is not compared with others; with those that are unlikely
_DOUBT = 0.1  # by how much an inverted image, one on its side or one of another view must score more
_RIBS = 0.5  # how far the chest's lower end goes by its width, where the diaphragm stands high
_KINDS: dict[str, tuple[Kind, ...]] = {"PA": ("frontal",), "AP": ("frontal",), "LL": ("lateral",)}
# The chest's usual width and height in shares of the image's long side, and what a search goes through.
_USUAL: dict[Kind, tuple[float, float]] = {"frontal": (0.78, 0.86), "lateral": (0.60, 0.82)}
_WIDTHS: dict[Kind, tuple[float, ...]] = {"frontal": (0.48, 0.58, 0.70, 0.84), "lateral": (0.36, 0.46, 0.58, 0.74)}
_HEIGHTS: dict[Kind, tuple[float, ...]] = {"frontal": (0.56, 0.68, 0.82, 1.0), "lateral": (0.60, 0.74, 0.90, 1.1)}


class ClassicalSegmenter(Segmenter):
    """The chest by fitting an average radiograph to the image; no network and nothing to download.

    The atlases, one of frontal and one of lateral views, are averages of drawn phantoms whose chest is known. An image is
    made small, freed of collimated borders and of its local brightness and contrast, so that exposure, display curve
    and scatter drop out. All places, sizes and tilts are searched by correlation, in both polarities; where nothing
    upright is found, also quarter turns. The best few are refined by weighted least squares over place, width, height and
    angle, in which devices and opacities count little. The chest's outline in the atlas, put in its place, is the region.

    Args:
        min_score: least correlation of image and atlas, in [0, 1].
        min_area: least share of the image that the chest covers.
        max_area: largest share.
        min_visible: least share of the chest that lies in the image.
        max_stretch: most that the chest's width over its height differs from the usual, as a factor either way.
    """

    version = 1

    def __init__(
        self,
        min_score: Annotated[float, Field(ge=0, le=1)] = 0.5,
        min_area: Annotated[float, Field(ge=0, le=1)] = 0.15,
        max_area: Annotated[float, Field(ge=0, le=1)] = 0.92,
        min_visible: Annotated[float, Field(ge=0, le=1)] = 0.7,
        max_stretch: Annotated[float, Field(ge=1)] = 1.9,
    ) -> None:
        if min_area > max_area:
            raise ValueError(f"min_area must be at most max_area, found {min_area} and {max_area}")
        self.min_score, self.min_visible, self.max_stretch = min_score, min_visible, max_stretch
        self.min_area, self.max_area = min_area, max_area

    def __call__(self, pixels: Array, view: str) -> Region:
        small = np.nan_to_num(_shrink(pixels, _SIDE), nan=0.0, posinf=1.0, neginf=0.0)
        if min(small.shape) < _SIDE // 6:
            return rectangle_or_uniform(view, f"an image of {pixels.shape[0]} x {pixels.shape[1]} pixels")
        fits = _fits(small, view)
        if not fits:
            return rectangle_or_uniform(view, "nothing to see")
        fit = max(fits, key=lambda fit: fit.trust)
        mask, visible = _draw(fit, small.shape)
        problem = self._problem(fit, mask, visible, rival=max(other.score for other in fits))
        return rectangle_or_uniform(view, problem) if problem else Region(mask, "computed", "")

    def _problem(self, fit: "_Fit", mask: NDArray[np.bool_], visible: float, rival: float) -> str:
        """What speaks against a contour, or nothing."""
        if fit.trust < self.min_score:
            return f"the image correlates {fit.trust:.2f} with an average chest, expected at least {self.min_score}"
        if fit.trust < _FOUND and rival > fit.score + _DOUBT / 2:
            return (
                f"the image correlates {fit.trust:.2f} with an average chest, but {rival:.2f} if it were inverted, on its side "
                "or another view"
            )
        width, height = _USUAL[fit.kind]
        stretch = math.exp(fit.pose[2] - fit.pose[3]) / (width / height)
        if not 1 / self.max_stretch <= stretch <= self.max_stretch:
            return f"the chest is {stretch:.2f} times as wide as usual for its height, expected up to {self.max_stretch}"
        area = float(mask.mean())
        if not self.min_area <= area <= self.max_area:
            return f"the chest covers {area:.0%} of the image, expected {self.min_area:.0%} to {self.max_area:.0%}"
        if visible < self.min_visible:
            return f"{visible:.0%} of the chest lies in the image, expected at least {self.min_visible:.0%}"
        centre = [float((np.arange(n) + 0.5) @ mask.sum(1 - i) / mask.sum() / n) for i, n in enumerate(mask.shape)]
        if not all(0.25 <= c <= 0.75 for c in centre):
            return f"the chest's centre lies at {centre[1]:.2f}, {centre[0]:.2f} of the image, expected 0.25 to 0.75"
        return ""


def rectangle_or_uniform(view: str, reason: str, side: int = 64) -> Region:
    """What stands in for a contour: the release's rectangle, which is that of a frontal chest; a lateral view has none,
    so that all its tokens are alike."""
    if view == "LL":
        return Region(np.ones((side, side), np.bool_), "uniform", reason)
    return Region(release_rectangle((side, side)).numpy(), "rectangle", reason)


class _Atlas(NamedTuple):
    """look: (P, P) mean of the normalised images; mask: share that is chest; weight: share that was in the image; tall:
    log of the chest's height over its width."""

    look: Array
    mask: Array
    weight: Array
    tall: float


class _Fit(NamedTuple):
    """Where an atlas lies: centre, log width, log height and angle in `pose` (5,), in shares of the image's long side;
    `doubt` is what it is held back by where it is unlikely."""

    score: float
    pose: NDArray[np.float64]
    kind: Kind
    mirrored: bool
    polarity: int
    doubt: float

    @property
    def trust(self) -> float:
        return self.score - self.doubt


class _Poses(NamedTuple):
    """T poses of an atlas: log width, log height and angle of each (T, 3), mirrored (T,), and the transforms (T, S, S/2+1)
    of look, weight and look squared, each with its energy (T,)."""

    poses: NDArray[np.float64]
    mirrored: NDArray[np.bool_]
    look: NDArray[np.complex64]
    weight: NDArray[np.complex64]
    square: NDArray[np.complex64]
    energy: Array


_AXIS = ((np.arange(_POINTS) + 0.5) / _POINTS - 0.5) * _MARGIN
_Y, _X = (points.ravel() for points in np.meshgrid(_AXIS, _AXIS, indexing="ij"))


def _shrink(pixels: Array, side: int) -> Array:
    """The mean over each of (h, w) cells, the long one `side`."""
    scale = side / max(pixels.shape)
    h, w = (max(1, round(n * scale)) for n in pixels.shape)
    image = Image.fromarray(np.ascontiguousarray(pixels, np.float32))
    return np.asarray(image.resize((w, h), Image.Resampling.BOX))


def _stretched(pixels: Array, valid: Array) -> Array:
    """0 at the 1st percentile of the valid pixels, 1 at the 99th."""
    low, high = np.percentile(pixels[valid > 0], (1, 99))
    return np.clip((pixels - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)


def _exposed(pixels: Array) -> Array:
    """(h, w) 1 inside the collimated borders: rows and columns at the edges that are all black or all white."""
    h, w = pixels.shape
    limits = []
    for lines in (pixels, pixels.T):
        middle = np.median(lines, axis=1)
        level = (np.abs(lines - middle[:, None]) < 0.03).mean(1)
        flat = (level > 0.9) & ((middle < 0.06) | (middle > 0.94))
        most = int(0.25 * len(lines))
        start = int(np.argmin(flat[: most + 1])) if not flat[: most + 1].all() else most
        end = int(np.argmin(flat[::-1][: most + 1])) if not flat[::-1][: most + 1].all() else most
        limits.append((start, len(lines) - end))
    (top, bottom), (left, right) = limits
    valid = np.zeros((h, w), np.float32)
    valid[top:bottom, left:right] = 1
    return valid


def _normalised(pixels: Array, valid: Array) -> Array:
    """Each pixel less the mean about it, over the deviation about it; 0 where not valid."""
    sigma = 0.13 * max(pixels.shape)

    def about(values: Array) -> Array:
        return ndimage.gaussian_filter(values, sigma, mode="constant", truncate=3)

    weight: Array = np.maximum(about(valid), np.float32(1e-3))
    rest: Array = (pixels - about(pixels * valid) / weight) * valid
    deviation: Array = np.sqrt(about(rest * rest) / weight)
    return np.clip(rest / (deviation + np.float32(0.03)), np.float32(-2.5), np.float32(2.5)) * valid


def _prepared(pixels: Array) -> tuple[Array, Array]:
    """(h, w) -> its normalised pixels, and 1 where they count."""
    stretched = _stretched(pixels, np.ones_like(pixels))
    valid = _exposed(stretched)
    return _normalised(_stretched(stretched, valid), valid), valid


def _at(values: Array, y: NDArray[np.float64], x: NDArray[np.float64]) -> Array:
    """Bilinear samples at (y, x) in pixels, whose centres are at halves; 0 outside."""
    return ndimage.map_coordinates(values, (y - 0.5, x - 0.5), order=1, mode="constant")


@cache
def _atlas(kind: Kind) -> _Atlas:
    total, inside, seen = (np.zeros(_POINTS**2, np.float32) for _ in range(3))
    size = 2 * _SIDE
    tall = []
    for index in range(_PHANTOMS):
        view = "LL" if kind == "lateral" else ("PA", "PA", "AP")[index % 3]
        study = draw_study(_SEED, index, size, views=(view,))
        mask = study.thorax_masks[0]
        if mask[-1].any():
            continue  # the box would not be known
        (top, bottom), (left, right) = ((line[0], line[-1] + 1) for line in map(np.flatnonzero, (mask.any(1), mask.any(0))))
        y = ((top + bottom) / 2 + _Y * (bottom - top)) / size
        x = ((left + right) / 2 + _X * (right - left)) / size
        look, valid = _prepared(_shrink(study.images[0].astype(np.float32) / np.float32(4095), _SIDE))
        total += _at(look, y * _SIDE, x * _SIDE)
        seen += _at(valid, y * _SIDE, x * _SIDE)
        inside += _at(mask.astype(np.float32), y * size, x * size)
        tall.append(math.log((bottom - top) / (right - left)))
    parts = (total / np.maximum(seen, 1), inside / len(tall), seen / len(tall))
    square = [part.reshape(_POINTS, _POINTS).astype(np.float32) for part in parts]
    return _Atlas(square[0], square[1], square[2], float(np.mean(tall)))


def _in_atlas(
    dy: NDArray[np.float64], dx: NDArray[np.float64], width: float, height: float, angle: float, mirrored: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps from the chest's centre, in shares of the image -> (y, x) in points of the atlas."""
    c, s = math.cos(angle), math.sin(angle)
    across, down = (c * dx + s * dy) / width, (c * dy - s * dx) / height
    return (down / _MARGIN + 0.5) * _POINTS, ((-across if mirrored else across) / _MARGIN + 0.5) * _POINTS


@cache
def _poses(kind: Kind, quarters: int) -> _Poses:
    """What a search goes through, after so many quarter turns."""
    atlas, size = _atlas(kind), 2 * _COARSE
    # The chest's centre is pixel 0 of a frame that goes round, so that a correlation's place is the centre's place.
    step = (np.arange(size) + _COARSE) % size - _COARSE
    dy, dx = np.meshgrid(step / _COARSE, step / _COARSE, indexing="ij")
    poses, mirrored, looks, weights = [], [], [], []
    for width in _WIDTHS[kind]:
        for height in _HEIGHTS[kind]:
            if not 0.69 < (width / height) / (_USUAL[kind][0] / _USUAL[kind][1]) < 1.45:
                continue
            for tilt in (-12, 0, 12):
                angle = math.radians(tilt + 90 * quarters)
                for mirror in (False, True) if kind == "lateral" else (False,):
                    place = _in_atlas(dy, dx, width, height, angle, mirror)
                    poses.append((math.log(width), math.log(height), angle))
                    mirrored.append(mirror)
                    weights.append(_at(atlas.weight, *place))
                    looks.append(_at(atlas.look, *place) * weights[-1])
    look, weight = np.stack(looks), np.stack(weights)
    square = look * look / np.maximum(weight, 1e-3)
    spectra = [np.conj(fft.rfft2(part)) for part in (look, weight, square)]
    return _Poses(np.array(poses), np.array(mirrored), spectra[0], spectra[1], spectra[2], square.sum((1, 2)))


def _searched(look: Array, valid: Array, kind: Kind, quarters: int, best: int = 3) -> list[_Fit]:
    """The best few poses over all places, by correlation where image and atlas overlap."""
    poses, size = _poses(kind, quarters), 2 * _COARSE
    h, w = look.shape

    def correlated(spectrum: NDArray[np.complex64], values: Array) -> Array:
        return fft.irfft2(spectrum * fft.rfft2(values, (size, size)), (size, size))[:, :h, :w]

    energy = poses.energy[:, None, None]
    overlap = correlated(poses.square, valid)
    scale = np.maximum(correlated(poses.weight, look * look), 0.01 * energy) * np.maximum(overlap, 0.3 * energy)
    scores = correlated(poses.look, look) / np.sqrt(scale) * np.clip(overlap / (0.75 * energy), 0, 1)
    # A chest is somewhere about the middle of its radiograph.
    off = [((np.arange(n) + 0.5) / n - middle) ** 2 / 0.12**2 for n, middle in ((h, 0.54), (w, 0.5))]
    penalty = 0.02 * (off[0][:, None] + off[1])
    found = []
    for polarity in (1, -1):
        ranked = (polarity * scores - penalty).reshape(len(scores), -1)
        place, score = ranked.argmax(1), ranked.max(1)
        for t in np.argsort(-score, kind="stable")[:best]:
            y, x = divmod(int(place[t]), w)
            pose = np.array([(x + 0.5) / _COARSE, (y + 0.5) / _COARSE, *poses.poses[t]])
            found.append(_Fit(float(score[t]), pose, kind, bool(poses.mirrored[t]), polarity, _DOUBT * (polarity < 0)))
    return sorted(found, key=lambda fit: -fit.trust)[:best]


def _refined(look: Array, valid: Array, start: _Fit, steps: int = 12) -> _Fit:
    """Gauss-Newton over the pose, robust to what only this patient has, held near what is usual."""
    atlas, side = _atlas(start.kind), max(look.shape)
    target, weight = ((part[:, ::-1] if start.mirrored else part).ravel() for part in (atlas.look, atlas.weight))
    down, across = np.gradient(look * start.polarity)
    layers = (look * start.polarity, across * side, down * side, valid)
    pose, score = start.pose.copy(), 0.0
    h, w = (n / side for n in look.shape)
    usual = np.array([0.5 * w, 0.54 * h, *np.log(_USUAL[start.kind]), start.pose[4]])
    hold = 2.0 / np.array([0.08, 0.08, 0.25, 0.25, 0.15]) ** 2
    for _ in range(steps):
        c, s = math.cos(pose[4]), math.sin(pose[4])
        x, y = _X * math.exp(pose[2]), _Y * math.exp(pose[3])
        place = (pose[1] + s * x + c * y) * side, (pose[0] + c * x - s * y) * side
        value, dx, dy, seen = (_at(layer, *place) for layer in layers)
        seen = seen * weight
        product, energy = float((seen * value * target).sum()), float((seen * value * value).sum())
        score = product / math.sqrt(max(energy * float((seen * target * target).sum()), 1e-9))
        gain = max(product / max(energy, 1e-6), 0.3)
        rest = target - gain * value
        weights = seen / (1 + rest * rest)
        slopes = gain * np.stack(
            [dx, dy, (dx * c + dy * s) * x, (dy * c - dx * s) * y, dy * (c * x - s * y) - dx * (s * x + c * y)]
        )
        normal = (slopes * weights) @ slopes.T
        normal[np.diag_indices(5)] = np.diag(normal) * 1.02 + hold
        change = np.linalg.solve(normal, (slopes * weights) @ rest - hold * (pose - usual)).clip(-0.06, 0.06)
        pose += change
        if np.abs(change).max() < 5e-4:
            break
    return start._replace(score=score, pose=pose)


def _fits(small: Array, view: str) -> list[_Fit]:
    """Refined fits of the view's atlases, of both where the view is unknown; none for an image without contrast."""
    if np.ptp(small) < 1e-3:
        return []
    fine, coarse = _prepared(small), _prepared(_shrink(small, _COARSE))
    likely = _KINDS.get(view, _BOTH)
    fits: list[_Fit] = []
    for kinds, turns in ((likely, (0,)), (_BOTH, (1, -1, 2)), (_BOTH, (0,))):
        starts = [
            start._replace(doubt=start.doubt + _DOUBT * ((kind not in likely) + (quarters != 0)))
            for kind in kinds
            for quarters in turns
            for start in _searched(*coarse, kind, quarters)
        ]
        starts.sort(key=lambda start: -start.trust)
        for start in starts[:3]:
            fits.append(_refined(*fine, start))
            if fits[-1].trust > _SURE:
                return fits
        # What is unlikely is looked for only where nothing likely was found.
        if max(fit.trust for fit in fits) > _FOUND:
            break
    return fits


def _draw(fit: _Fit, shape: tuple[int, ...]) -> tuple[NDArray[np.bool_], float]:
    """The chest (h, w) in the image's frame, and the share of it that lies in the image."""
    mask, tall = _atlas(fit.kind).mask, _atlas(fit.kind).tall
    width, height = math.exp(fit.pose[2]), math.exp(fit.pose[3])
    # The fit goes by the diaphragm. Where that stands high the ribs do not: their lower end is let down, the top stays.
    longer = height * math.exp(_RIBS * max(0.0, tall - (fit.pose[3] - fit.pose[2])))
    down = (longer - height) / 2
    x, y = fit.pose[0] - math.sin(fit.pose[4]) * down, fit.pose[1] + math.cos(fit.pose[4]) * down
    height = longer
    scale = _MASK / max(shape)
    h, w = (round(n * scale) for n in shape)
    dy, dx = np.meshgrid((np.arange(h) + 0.5) / _MASK - y, (np.arange(w) + 0.5) / _MASK - x, indexing="ij")
    drawn = _at(mask, *_in_atlas(dy, dx, width, height, fit.pose[4], fit.mirrored)) > 0.5
    whole = float((mask > 0.5).mean()) * (_MARGIN * _MASK) ** 2 * width * height
    return drawn, float(drawn.sum()) / whole
