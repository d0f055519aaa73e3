"""Radiographs of a made-up chest, drawn by projection.

Patient frame in mm: x to the patient's left, y backwards, z downwards, origin at the middle of the chest. Along
every beam the line integral of the attenuation is summed: volumes with closed chords (trunk, lungs, heart, domes
of the diaphragm) in `_project_volumes`, tubes along curves in space (ribs, clavicles, vessels, catheters) in
`_project_tubes`. `_expose` then applies Beer-Lambert, scatter, quantum noise, the logarithm and the display curve.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

from medxray.data.phantom_reports import Finding

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

MU_SOFT = 0.0165  # 1/mm, water at a chest tube's effective energy, less the beam hardening of a thick patient
LUNG_DENSITY = 0.27  # of soft tissue
LEFT, RIGHT = 0, 1  # index of a lung; a sign is 1 - 2 * index
_Z = np.arange(-300.0, 301.0, 2.0, dtype=np.float32)
_DOME_POINTS = 64

# columns of an ellipse: h, v, half axes, cosine, sine, chord in mm, kind, its reach squared; of an opacity, which
# fills one lung to a share: h, v, half axes, cosine, sine, share, lung, its reach squared, softness of the rim
_ORGAN, _AIR, _FAT, _SPHERE = 0.0, 1.0, 2.0, 3.0


@numba.njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _smooth(value: float) -> float:
    value = min(max(value, 0.0), 1.0)
    return value * value * (3.0 - 2.0 * value)


@numba.njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _bump(x: float) -> float:
    """1 at 0, about 0 beyond 2: a bell without the cost of an exponential."""
    rest: float = max(1.0 - 0.25 * x * x, 0.0)
    return rest * rest * rest


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _texture(lattice: Array, h: float, v: float) -> float:
    """Value noise of about -1..1 from a periodic lattice, at lattice coordinates (h, v)."""
    rows, columns = lattice.shape
    i, j = math.floor(v), math.floor(h)
    a, b = _smooth(v - i), _smooth(h - j)
    i0, j0 = int(i) % rows, int(j) % columns
    i1, j1 = (i0 + 1) % rows, (j0 + 1) % columns
    top = lattice[i0, j0] * (1.0 - b) + lattice[i0, j1] * b
    value: float = top * (1.0 - a) + (lattice[i1, j0] * (1.0 - b) + lattice[i1, j1] * b) * a
    return value


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _project_volumes(
    frame: Array, body: Array, lungs: Array, domes: Array, cage: Array, spine: Array, ellipses: Array, opacities: Array,
    fluid: Array, air: Array, lattice: Array, grain: float, lateral: bool,
    out: Array, visible: Array, thorax: Mask, lung_mask: Mask,
) -> None:  # fmt: skip
    """Line integrals of the volumes, the share of aerated lung, and the two masks, all (H, W)."""
    size = out.shape[0]
    fov, shift_h, shift_v, cosine, sine = frame
    z0, z_step, last = -300.0, 2.0, body.shape[0] - 2
    near = np.empty(len(ellipses), np.int64)
    near_opacity = np.empty(len(opacities), np.int64)
    for row in range(size):
        # what this row can meet
        level = ((row + 0.5) / size - 0.5) * fov - shift_v
        swing = 0.5 * fov * abs(sine) + 12.0
        n_near, n_opacity = 0, 0
        for e in range(len(ellipses)):
            if abs(level - ellipses[e, 1]) < math.sqrt(ellipses[e, 8]) + swing:
                near[n_near] = e
                n_near += 1
        for e in range(len(opacities)):
            if abs(level - opacities[e, 1]) < math.sqrt(opacities[e, 8]) + swing:
                near_opacity[n_opacity] = e
                n_opacity += 1
        for column in range(size):
            u = ((column + 0.5) / size - 0.5) * fov - shift_h
            w = ((row + 0.5) / size - 0.5) * fov - shift_v
            h, v = u * cosine + w * sine, w * cosine - u * sine
            position = (v - z0) / z_step
            k = min(max(int(position), 0), last)
            f = position - k

            low = body[k, 0] + f * (body[k + 1, 0] - body[k, 0])
            high = body[k, 1] + f * (body[k + 1, 1] - body[k, 1])
            depth = body[k, 2] + f * (body[k + 1, 2] - body[k, 2])
            t = 2.0 * (h - low) / (high - low) - 1.0
            if abs(t) >= 1.0:
                out[row, column] = 0.0
                visible[row, column] = 0.0
                thorax[row, column] = False
                lung_mask[row, column] = False
                continue
            soft = depth * math.sqrt(1.0 - abs(t * t * t))

            cage_low = cage[k, 0] + f * (cage[k + 1, 0] - cage[k, 0])
            cage_high = cage[k, 1] + f * (cage[k + 1, 1] - cage[k, 1])
            thorax[row, column] = cage_low < h < cage_high

            organ = 0.0
            sphere = 0.0
            for index in range(n_near):
                e = near[index]
                du, dv = h - ellipses[e, 0], v - ellipses[e, 1]
                if du * du + dv * dv > ellipses[e, 8]:
                    continue
                kind = ellipses[e, 7]
                a = (du * ellipses[e, 4] + dv * ellipses[e, 5]) / ellipses[e, 2]
                b = (dv * ellipses[e, 4] - du * ellipses[e, 5]) / ellipses[e, 3]
                q = a * a + b * b
                if q >= 1.0:
                    continue
                if kind == 0.0:
                    organ = max(organ, ellipses[e, 6] * math.sqrt(1.0 - q))
                elif kind == 1.0:
                    soft -= min(ellipses[e, 6] * (1.0 - q) ** 0.35, soft)
                elif kind == 2.0:
                    soft += ellipses[e, 6] * (1.0 - q) ** 0.7
                else:
                    sphere += ellipses[e, 6] * math.sqrt(1.0 - q)

            fine, coarse = 99.0, 99.0  # not yet known
            aerated = 0.0
            total = 0.0
            inside = False
            line = 0.0
            for lung in range(2):
                lo = lungs[lung, k, 0] + f * (lungs[lung, k + 1, 0] - lungs[lung, k, 0])
                hi = lungs[lung, k, 1] + f * (lungs[lung, k + 1, 1] - lungs[lung, k, 1])
                if hi - lo < 2.0 or h <= lo or h >= hi:
                    continue
                t = (h - lo) / (hi - lo)  # 0 at the mediastinum (front), 1 at the lateral wall (back)
                if not lateral and lung == 1:
                    t = 1.0 - t
                chord = lungs[lung, k, 2] + f * (lungs[lung, k + 1, 2] - lungs[lung, k, 2])
                chord *= math.sqrt(4.0 * t * (1.0 - t))
                place = t * (domes.shape[1] - 1)
                d = int(place)
                d = min(d, domes.shape[1] - 2)
                dome = domes[lung, d] + (place - d) * (domes[lung, d + 1] - domes[lung, d])
                below = v - dome
                if below < 0.0:
                    inside = True
                if below > -1.5:  # behind the dome the lung's lowest recess thins out
                    chord *= 1.0 - _smooth(below / 3.0 + 0.5) * (1.0 - 0.16 / (1.0 + (below / 14.0) ** 2))
                if chord < 0.5:
                    continue
                if fine == 99.0:
                    fine = _texture(lattice, h / 5.0, v / 5.0)
                density = 0.27 + grain * fine
                shown = 1.0
                for index in range(n_opacity):
                    e = near_opacity[index]
                    du, dv = h - opacities[e, 0], v - opacities[e, 1]
                    if int(opacities[e, 7]) != lung or du * du + dv * dv > opacities[e, 8]:
                        continue
                    a = (du * opacities[e, 4] + dv * opacities[e, 5]) / opacities[e, 2]
                    b = (dv * opacities[e, 4] - du * opacities[e, 5]) / opacities[e, 3]
                    softness = opacities[e, 9]
                    if coarse == 99.0:
                        coarse = 0.7 * _texture(lattice, h / 26.0, v / 26.0)
                        coarse += 0.45 * _texture(lattice, h / 11.0 + 7.0, v / 11.0)
                    q = math.sqrt(a * a + b * b) + coarse * min(softness, 0.5) * 0.7
                    if q < 1.0 + softness:
                        weight = opacities[e, 6] * _smooth((1.0 + softness - q) / (2.0 * softness))
                        density += weight * (0.97 - density)
                if air[lung, 0] > 0.0:
                    # distance from the wall, and from the apex: the gas lies over and beside the lung
                    wall = (1.0 - t) * (hi - lo)
                    if lateral:
                        wall = t * (hi - lo) + 12.0
                    top = (v - air[lung, 2]) * 0.75
                    rim = min(wall, top) + 0.12 * max(wall, 0.0)
                    gap = air[lung, 0] * (1.0 - 0.45 * _smooth((v - air[lung, 2]) / 240.0))
                    outer = _smooth((gap - rim) / 2.0 + 0.5) * air[lung, 1]
                    density += outer * (0.0 - density)
                    density += (1.0 - outer) * air[lung, 3]
                    shown *= 1.0 - outer
                    line += _bump((rim - gap) / 2.2) * air[lung, 1]
                if fluid[lung, 1] > 0.0:
                    surface = fluid[lung, 0] + fluid[lung, 2] * (1.0 - t * t * math.sqrt(t))
                    wet = _smooth((v - surface) / fluid[lung, 3] + 0.5) * fluid[lung, 1]
                    density += wet * (1.0 - density)
                    shown *= 1.0 - wet
                total += chord * (1.0 - density)
                aerated = max(aerated, shown)
            # the heart takes room from the lungs before and behind it
            keep = max(1.0 - organ / 190.0, 0.12)
            total = min(total * keep, soft * 0.97)
            lung_mask[row, column] = inside and thorax[row, column]

            sh = spine[k, 0] + f * (spine[k + 1, 0] - spine[k, 0])
            x = h - sh
            bone = 0.0
            half = spine[k, 1]
            if abs(x) < 2.4 * half and soft > 0.0:
                level = v / spine[k, 2] + 100.0
                c = abs(level - math.floor(level) - 0.5) * 2.0  # 0 in mid-body, 1 at the disc
                waist = half * (0.90 + 0.10 * c * c)
                edge = _smooth((waist - abs(x)) / 2.5 + 0.5) * _smooth((0.86 - c) / 0.10 + 0.5)
                plate = _bump((c - 0.76) / 0.14) + 0.7 * _bump((abs(x) - waist + 2.0) / 2.5)
                bone = edge * (0.26 + 0.13 * plate)
                if lateral:
                    # facets and spinous processes behind the bodies
                    back = (x - 1.7 * half) / (0.5 * half)
                    bone += 0.16 * _bump(0.7 * back) * (0.5 + 0.5 * math.cos(2.0 * math.pi * (level - 0.2)))
                else:
                    p = (abs(x) - 0.62 * half) / 3.4
                    pz = (level - math.floor(level) - 0.42) * spine[k, 2] / 4.6
                    ring = math.sqrt(p * p + pz * pz)
                    bone += 0.13 * _bump((ring - 1.0) / 0.55)
                    p = x / 3.2
                    pz = (level - math.floor(level) - 0.85) * spine[k, 2] / 7.0
                    bone += 0.12 * _bump(0.7 * math.sqrt(p * p + pz * pz))
                    wing = (abs(x) - 1.35 * half) / (0.5 * half)
                    pz = (level - math.floor(level) - 0.42) * spine[k, 2] / 5.0
                    bone += 0.08 * _bump(0.7 * math.sqrt(wing * wing + pz * pz))
            out[row, column] = 0.0165 * (soft - total + sphere) + bone * spine[k, 3] + 0.05 * line
            visible[row, column] = aerated * keep


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _project_tubes(uv: Array, radius: Array, mu: Array, hollow: Array, mm: float, out: Array, scratch: Array) -> None:
    """Adds tubes along polylines to `out` (H, W).

    Args:
        uv: (T, P, 2) points in pixels. radius: (T, P) in pixels. mu: (T, P) 1/mm, negative for air.
        hollow: (T,) share of the wall's attenuation that the core lacks. mm: one pixel in mm.
        scratch: (H, W) zeros, left as zeros: segments of one tube overlap at their joints and must not add up.
    """
    size = out.shape[0]
    for tube in range(uv.shape[0]):
        top, bottom, left, right = size, -1, size, -1
        sign = 1.0 if mu[tube, 0] >= 0.0 else -1.0
        for p in range(uv.shape[1] - 1):
            ax, ay = uv[tube, p, 0], uv[tube, p, 1]
            bx, by = uv[tube, p + 1, 0] - ax, uv[tube, p + 1, 1] - ay
            length = bx * bx + by * by
            r_max = max(radius[tube, p], radius[tube, p + 1], 0.7)
            i0 = max(int(min(ay, ay + by) - r_max - 1.0), 0)
            i1 = min(int(max(ay, ay + by) + r_max + 2.0), size)
            j0 = max(int(min(ax, ax + bx) - r_max - 1.0), 0)
            j1 = min(int(max(ax, ax + bx) + r_max + 2.0), size)
            if i0 >= i1 or j0 >= j1:
                continue
            top, bottom = min(top, i0), max(bottom, i1)
            left, right = min(left, j0), max(right, j1)
            scale = 1.0 / length if length > 1e-6 else 0.0
            reach = r_max * r_max
            ra, rb = radius[tube, p], radius[tube, p + 1] - radius[tube, p]
            ma, mb = abs(mu[tube, p]), abs(mu[tube, p + 1]) - abs(mu[tube, p])
            for i in range(i0, i1):
                dy = i + 0.5 - ay
                for j in range(j0, j1):
                    dx = j + 0.5 - ax
                    s = min(max((dx * bx + dy * by) * scale, 0.0), 1.0)
                    ex, ey = dx - s * bx, dy - s * by
                    distance = ex * ex + ey * ey
                    if distance >= reach:
                        continue
                    true_r = ra + s * rb
                    r = max(true_r, 0.7)  # thinner than a pixel: wider and weaker, the same area
                    if distance >= r * r or true_r <= 0.0:
                        continue
                    thin = (true_r / r) ** 2
                    chord = math.sqrt(r * r - distance)
                    core = 0.58 * r * r
                    if distance < core and hollow[tube] > 0.0:
                        chord -= hollow[tube] * math.sqrt(core - distance)
                    value = (ma + s * mb) * 2.0 * chord * mm * thin
                    if value > scratch[i, j]:
                        scratch[i, j] = value
        for i in range(top, bottom):
            for j in range(left, right):
                out[i, j] += sign * scratch[i, j]
                scratch[i, j] = 0.0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _blur(image: Array, factor: int, radius: int) -> Array:
    """Wide near-Gaussian blur: block means by `factor`, three running means, bilinear back up."""
    size = image.shape[0]
    n = (size + factor - 1) // factor
    small = np.zeros((n, n), np.float32)
    other = np.zeros((n, n), np.float32)
    for i in range(n):
        for j in range(n):
            total, count = 0.0, 0
            for a in range(i * factor, min((i + 1) * factor, size)):
                for b in range(j * factor, min((j + 1) * factor, size)):
                    total += image[a, b]
                    count += 1
            small[i, j] = total / count
    for _ in range(6):
        for i in range(n):
            total = 0.0
            for j in range(-radius, radius + 1):
                total += small[i, min(max(j, 0), n - 1)]
            for j in range(n):
                other[j, i] = total / (2 * radius + 1)
                total += small[i, min(j + radius + 1, n - 1)] - small[i, max(j - radius, 0)]
        small, other = other, small
    out = np.empty((size, size), np.float32)
    for i in range(size):
        y = min(max((i + 0.5) / factor - 0.5, 0.0), n - 1.0)
        i0 = min(int(y), n - 2)
        fy = y - i0
        for j in range(size):
            x = min(max((j + 0.5) / factor - 0.5, 0.0), n - 1.0)
            j0 = min(int(x), n - 2)
            fx = x - j0
            upper = small[i0, j0] * (1.0 - fx) + small[i0, j0 + 1] * fx
            out[i, j] = upper * (1.0 - fy) + (small[i0 + 1, j0] * (1.0 - fx) + small[i0 + 1, j0 + 1] * fx) * fy
    return out


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _expose(
    volumes: Array, bones: Array, vessels: Array, visible: Array, noise: Array,
    scatter: float, photons: float, equalise: float, black: float, white: float, edges: Array,
) -> NDArray[np.uint16]:  # fmt: skip
    """The detector's picture, 12 bits: intensity with scatter and quantum noise, its logarithm, a display curve."""
    size = volumes.shape[0]
    intensity = np.empty((size, size), np.float32)
    for i in range(size):
        for j in range(size):
            total = volumes[i, j] + bones[i, j] + vessels[i, j] * visible[i, j]
            intensity[i, j] = math.exp(np.float32(-max(total, 0.0)))
    factor = max(size // 64, 1)
    veil = _blur(intensity, factor, 3)
    grains = np.float32(1.0 / math.sqrt(photons))
    dense = np.empty((size, size), np.float32)
    for i in range(size):
        for j in range(size):
            signal = np.float32((1.0 - scatter) * intensity[i, j] + scatter * min(veil[i, j], 0.3))
            signal += noise[i, j] * grains * math.sqrt(signal)
            dense[i, j] = -math.log(max(signal, np.float32(1e-4)))
    low = _blur(dense, factor, 5)
    inside = 0.0
    count = 0
    for i in range(size // 5, 4 * size // 5):
        for j in range(size // 5, 4 * size // 5):
            inside += dense[i, j]
            count += 1
    inside /= count
    out = np.empty((size, size), np.uint16)
    for i in range(size):
        for j in range(size):
            value = dense[i, j] - equalise * (low[i, j] - inside) * min(dense[i, j], 1.0)
            value = (value - inside - black) / (white - black)
            value = min(max(value, 0.0), 1.0)
            if i < edges[0] or i >= size - edges[1] or j < edges[2] or j >= size - edges[3]:
                value = edges[4] + (value - edges[4]) * 0.06
            out[i, j] = np.uint16(min(max(value * 4095.0 + 0.5, 0.0), 4095.0))
    return out


def _f32(values: ArrayLike) -> Array:
    return np.asarray(values, np.float32)


@dataclass(frozen=True)
class Anatomy:
    """What stays the same in all of a patient's studies; lengths in mm."""

    key: int
    female: bool
    size: float
    broad: float
    deep: float
    fat: float
    heart: float  # cardiothoracic ratio
    arch: float
    scoliosis: float
    kyphosis: float
    vertebra: float
    domes: tuple[float, float]

    @classmethod
    def sample(cls, key: int, age: int, female: bool) -> "Anatomy":
        rng = np.random.default_rng([key, 1])
        return cls(
            key=key,
            female=female,
            size=float(rng.uniform(0.95, 1.05) * (0.95 if female else 1.0)),
            broad=float(rng.uniform(0.95, 1.05)),
            deep=float(rng.uniform(0.92, 1.1)),
            fat=float(rng.gamma(2.0, 4.0)),
            heart=float(rng.uniform(0.42, 0.485)),
            arch=float(14.0 + age / 14.0 + rng.uniform(-1.5, 1.5)),
            scoliosis=float(rng.normal(0.0, 3.0)),
            kyphosis=float(rng.uniform(8.0, 16.0) + age / 8.0),
            vertebra=float(rng.uniform(15.5, 18.5)),
            domes=(float(rng.uniform(70.0, 82.0)), float(rng.uniform(58.0, 70.0))),
        )

    def half_width(self, z: ArrayLike) -> Array:
        """Inner half width of the rib cage at the level z."""
        up = np.clip((40.0 - _f32(z)) / 184.0, 0.0, 1.0)
        down = np.clip((_f32(z) - 60.0) / 240.0, 0.0, 1.0)
        return _f32(self.broad * (136.0 * np.sqrt(1.0 - up**2.3) - 30.0 * down**1.5))

    def back(self, z: ArrayLike) -> Array:
        """y of the cage's posterior wall."""
        z = _f32(z)
        bend = self.kyphosis * (1.0 - ((z + 10.0) / 150.0) ** 2)
        return _f32(self.deep * (72.0 + np.maximum(bend, -25.0)))

    def front(self, z: ArrayLike) -> Array:
        """y of the cage's anterior wall."""
        knots = (-145.0, -110.0, -60.0, 0.0, 60.0, 140.0)
        wall = np.interp(_f32(z), knots, (5.0, -52.0, -80.0, -98.0, -105.0, -98.0))
        return _f32(self.deep * wall)

    def middle(self, z: ArrayLike) -> Array:
        """x of the spine."""
        return _f32(self.scoliosis * np.sin(_f32(z) / 70.0))


@dataclass(frozen=True)
class Camera:
    """Where the tube stands: maps points of the patient frame to the detector, in mm at the patient's mid-plane."""

    view: str
    yaw: float
    tilt: float
    source: float

    @property
    def lateral(self) -> bool:
        return self.view == "LL"

    def turn(self, points: Array) -> Array:
        x, y, z = points[..., 0], points[..., 1], points[..., 2]
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        turned = np.empty(points.shape, np.float32)
        turned[..., 0], turned[..., 1], turned[..., 2] = (
            x * c + y * s,
            y * c - x * s,
            z + y * math.sin(self.tilt),
        )
        return turned

    def project(self, points: Array) -> tuple[Array, Array]:
        """(..., 3) to (..., 2) detector mm, and the magnification (...)."""
        p = self.turn(points)
        if self.view == "LL":  # left side at the detector
            flat, near = p[..., 1], p[..., 0]
        elif self.view == "PA":  # chest at the detector
            flat, near = p[..., 0], -p[..., 1]
        else:
            flat, near = p[..., 0], p[..., 1]
        distance = self.source - 130.0
        zoom = (distance / (distance + near)).astype(np.float32)
        return np.stack([flat * zoom, p[..., 2] * zoom], axis=-1), zoom

    def stretch(self, points: Array) -> Array:
        """(T, P, 3) to (T, P): how much longer a beam runs in a tube that leans towards it."""
        turned = self.turn(points)
        step = np.empty_like(turned)
        step[..., :-1, :] = turned[..., 1:, :] - turned[..., :-1, :]
        step[..., -1, :] = step[..., -2, :]
        along = step[..., 0 if self.lateral else 1] / np.sqrt((step * step).sum(axis=-1) + 1e-6)
        return _f32(1.0 / np.sqrt(np.maximum(1.0 - along * along, 0.2)))


@dataclass
class _Scene:
    """Everything that lies in the beam for one view."""

    camera: Camera
    fov: float
    size: int
    frame: Array
    ellipses: list[tuple[float, ...]] = field(default_factory=list)
    opacities: list[tuple[float, ...]] = field(default_factory=list)
    fluid: Array = field(default_factory=lambda: np.zeros((2, 4), np.float32))
    air: Array = field(default_factory=lambda: np.zeros((2, 4), np.float32))

    def __post_init__(self) -> None:
        self.bones, self.vessels, self.scratch = (np.zeros((self.size, self.size), np.float32) for _ in range(3))

    def pixels(self, uv: Array) -> Array:
        _, shift_h, shift_v, c, s = self.frame
        h, v = uv[..., 0], uv[..., 1]
        u, w = h * c - v * s + shift_h, v * c + h * s + shift_v
        return (np.stack([u, w], axis=-1) / self.fov + 0.5).astype(np.float32) * np.float32(self.size)

    def tubes(self, points: Array, radius: ArrayLike, mu: ArrayLike, hollow: float = 0.0, vessel: bool = False) -> None:
        """Adds tubes (T, P, 3) in mm; radius and mu broadcast to (T, P)."""
        points = _f32(points)
        uv, zoom = self.camera.project(points)
        shape = points.shape[:-1]
        per_mm = self.size / self.fov
        r = np.ascontiguousarray(np.broadcast_to(_f32(radius), shape) * zoom * per_mm, np.float32)
        m = np.broadcast_to(_f32(mu), shape)
        if shape[1] > 2:
            m = m * self.camera.stretch(points)
        self._draw(self.pixels(uv), r, m, hollow, self.vessels if vessel else self.bones)

    def strokes(self, uv: Array, radius: float, mu: float) -> None:
        """Adds lines (T, P, 2) given in mm on the detector: what lies on the cassette, not in the patient."""
        uv = _f32(uv)
        pixels = (uv / self.fov + 0.5).astype(np.float32) * np.float32(self.size)
        r = np.full(uv.shape[:-1], radius * self.size / self.fov, np.float32)
        self._draw(pixels, r, np.full(uv.shape[:-1], mu, np.float32), 0.0, self.bones)

    def _draw(self, uv: Array, radius: Array, mu: Array, hollow: float, out: Array) -> None:
        _project_tubes(
            np.ascontiguousarray(uv), radius, np.ascontiguousarray(mu, np.float32),
            np.full(len(uv), hollow, np.float32), self.fov / self.size, out, self.scratch,
        )  # fmt: skip

    def ellipse(
        self,
        centre: tuple[float, float, float],
        half: tuple[float, float],
        chord: float,
        kind: float,
        angle: float = 0.0,
    ) -> None:
        """Adds an organ, air, fat or a sphere: an ellipse about the projection of `centre`, `chord` mm thick."""
        self.ellipses.append((*self._outline(centre, half, angle), chord, kind, (max(half) * 1.3) ** 2))

    def opacity(
        self, centre: tuple[float, float, float], half: tuple[float, float], share: float, lung: int,
        softness: float, angle: float = 0.0,
    ) -> None:  # fmt: skip
        """Fills an ellipse of one lung to a share, with a ragged rim."""
        reach = (max(half) * (1.3 + 3.0 * softness)) ** 2
        self.opacities.append((*self._outline(centre, half, angle), share, float(lung), reach, softness))

    def _outline(
        self, centre: tuple[float, float, float], half: tuple[float, float], angle: float
    ) -> tuple[float, ...]:
        uv, zoom = self.camera.project(_f32(centre))
        scale = float(zoom)
        return float(uv[0]), float(uv[1]), half[0] * scale, half[1] * scale, math.cos(angle), math.sin(angle)


@lru_cache(maxsize=256)
def _curve(*points: tuple[float, float, float], count: int = 14) -> Array:
    """(1, count, 3): a smooth curve through the points (cubic Hermite, Catmull-Rom tangents)."""
    p = _f32(points)
    slope = np.empty_like(p)
    slope[1:-1] = (p[2:] - p[:-2]) / 2.0
    slope[0], slope[-1] = p[1] - p[0], p[-1] - p[-2]
    t = np.linspace(0.0, len(p) - 1.0, count, dtype=np.float32)
    k = np.minimum(t.astype(np.int64), len(p) - 2)
    s = (t - k)[:, None]
    a, b = 2 * s**3 - 3 * s**2 + 1, s**3 - 2 * s**2 + s
    return _f32(a * p[k] + b * slope[k] + (1 - a) * p[k + 1] + (s**3 - s**2) * slope[k + 1])[None]


def _mirror(points: Array) -> Array:
    """Left-sided curves (T, P, 3) and their right-sided twins, (2T, P, 3)."""
    return np.concatenate([points, points * _f32([-1.0, 1.0, 1.0])])


def _sides(finding: Finding) -> tuple[int, ...]:
    return {"left": (LEFT,), "right": (RIGHT,)}.get(finding.side, (LEFT, RIGHT))


_DEGREE = {"small": 0, "moderate": 1, "large": 2}
_ZONES = {"apex": -92.0, "upper": -66.0, "mid": -18.0, "lower": 26.0, "base": 44.0}


_RIBS, _RIB_POINTS = 12, 30


@lru_cache(maxsize=32)
def _rib_curves(anatomy: Anatomy) -> Array:
    """(24, P, 3): the left ribs from the spine round to the front, then the right ones."""
    rng = np.random.default_rng([anatomy.key, 2])
    number = np.arange(_RIBS)
    start = -150.0 + 22.5 * number + rng.normal(0.0, 1.2, _RIBS)
    drop = np.interp(number, (0, 1, 3, 7, 10, 11), (28.0, 48.0, 74.0, 92.0, 80.0, 56.0))
    end = np.pi * np.interp(number, (0, 6, 8, 10, 11), (0.72, 0.76, 0.68, 0.52, 0.42))
    angle = np.linspace(np.zeros(_RIBS), end, _RIB_POINTS, axis=1)
    z = start[:, None] + drop[:, None] * (1.0 - np.cos(angle)) / 2.0
    half = anatomy.half_width(start + drop / 2.0)[:, None] + 2.0
    back, front = anatomy.back(z), anatomy.front(z)
    y = (back + front) / 2.0 + (back - front) / 2.0 * np.cos(angle)
    left = np.stack([16.0 + (half - 16.0) * np.sin(angle) ** 0.85, y, z], axis=-1)
    return _mirror(left.astype(np.float32))


def _ribs(scene: _Scene, anatomy: Anatomy, fractures: list[Finding]) -> None:
    curves = _rib_curves(anatomy).copy()
    radius = np.full(curves.shape[:2], 6.2, np.float32)
    radius[[0, 11, 12, 23]] = 5.0
    mu = np.linspace(0.036, 0.022, _RIB_POINTS, dtype=np.float32)
    for finding in fractures:
        where = np.random.default_rng([finding.key, 3])
        level = {"upper": 2, "mid": 4, "lower": 6}[finding.place] + int(where.integers(0, 2))
        at = int(where.integers(6, 12))
        step = (10.0, 13.0, 16.0)[_DEGREE[finding.degree]] * (0.75 if finding.uncertain else 1.0)
        for side in _sides(finding):
            inwards = -1.0 if side == LEFT else 1.0
            for rib in range(level, level + 1 + _DEGREE[finding.degree]):
                k = at + int(where.integers(-1, 2))
                row = side * _RIBS + min(rib, 9)
                fade = np.linspace(1.0, 0.5, _RIB_POINTS - k, dtype=np.float32)
                curves[row, k:, 2] += step * fade
                curves[row, k:, 0] += inwards * 0.4 * step * fade
                radius[row, k - 1 : k + 1] = 0.0
                # callus about both ends
                callus = curves[row, [[k - 3, k - 2], [k + 1, k + 2]]]
                scene.tubes(callus, 7.4, 0.035 if finding.uncertain else 0.056)
    scene.tubes(curves, radius, mu, hollow=0.62)


def _frame_bones(scene: _Scene, anatomy: Anatomy) -> None:
    wide = anatomy.broad
    if scene.camera.lateral:
        scene.tubes(
            _curve((0.0, -58.0, -112.0), (0.0, -88.0, -60.0), (0.0, -104.0, 0.0), (0.0, -106.0, 40.0)),
            5.0,
            0.05,
            0.3,
        )
        arms = _mirror(_curve((150.0, 0.0, -165.0), (165.0, -90.0, -190.0), (165.0, -190.0, -205.0), count=5))
        scene.tubes(arms, 40.0, MU_SOFT * 0.8)
        scene.tubes(arms, 10.0, 0.05, 0.6)
        blade = _mirror(_curve((120.0, 60.0, -120.0), (135.0, 98.0, -60.0), (135.0, 104.0, 0.0)))
        scene.tubes(blade, 4.0, 0.03, 0.3)
        return
    clavicle = _curve((14.0, -72.0, -108.0), (52.0, -68.0, -118.0), (104.0, -22.0, -136.0), (156.0, 8.0, -140.0))
    scene.tubes(_mirror(clavicle * _f32([wide, 1, 1])), 6.8, 0.036, 0.55)
    blade = np.concatenate([
        _curve((120.0, 88.0, -116.0), (128.0, 86.0, -50.0), (140.0, 80.0, 4.0)),
        _curve((140.0, 80.0, 4.0), (152.0, 66.0, -50.0), (164.0, 40.0, -104.0)),
        _curve((122.0, 96.0, -108.0), (150.0, 80.0, -128.0), (178.0, 20.0, -142.0)),
    ])  # fmt: skip
    widths = np.repeat(_f32([2.6, 5.0, 5.5, 2.6, 5.0, 5.5])[:, None], blade.shape[1], axis=1)
    scene.tubes(_mirror(blade * _f32([wide, 1, 1])), widths, 0.026, 0.4)
    arm = _mirror(
        _curve((184.0, 10.0, -112.0), (206.0, 15.0, -20.0), (226.0, 20.0, 90.0), count=5) * _f32([wide, 1, 1])
    )
    scene.tubes(arm, 46.0 + anatomy.fat * 0.5, MU_SOFT * 0.9)
    scene.tubes(arm, np.linspace(22.0, 11.0, arm.shape[1], dtype=np.float32), 0.022, 0.6)


@lru_cache(maxsize=32)
def _vessel_curves(anatomy: Anatomy) -> tuple[Array, Array]:
    """The arteries that leave the hila (26, P, 3), and their branches (78, P, 3)."""
    rng = np.random.default_rng([anatomy.key, 4])
    first, second, points = 13, 3, 7
    s = np.linspace(0.0, 1.0, points, dtype=np.float32)[:, None]
    arch = 4.0 * s * (1.0 - s)
    mains, branches = [], []
    for side in (LEFT, RIGHT):
        sign = 1.0 - 2.0 * side
        hilum = _f32([sign * 33.0, 8.0, -26.0 if side == LEFT else -14.0])
        level = np.linspace(-118.0, 88.0, first) + rng.normal(0.0, 7.0, first)
        reach = anatomy.half_width(level) * rng.uniform(0.62, 0.9, first)
        reach = np.where(level > 40.0, reach * rng.uniform(0.5, 1.0, first), reach)
        tip = np.stack([sign * reach, rng.uniform(-60.0, 60.0, first), level], axis=-1)
        start = hilum + rng.normal(0.0, 5.0, (first, 3))
        bend = rng.normal(0.0, 9.0, (first, 1, 3))
        bend[..., 2] += 10.0 * np.sign(level)[:, None]
        main = start[:, None] + (tip - start)[:, None] * s + bend * arch
        origin = main[np.arange(first)[:, None], rng.integers(2, points - 1, (first, second))]
        heading = (tip - start)[:, None] / np.linalg.norm(tip - start, axis=-1)[:, None, None]
        turn = rng.normal(0.0, 0.55, (first, second, 3))
        goal = origin + (heading + turn) * rng.uniform(35.0, 75.0, (first, second, 1))
        limit = np.maximum(anatomy.half_width(goal[..., 2]) - 8.0, 17.0)
        goal[..., 0] = sign * np.clip(sign * goal[..., 0], 16.0, limit)
        branch = origin[:, :, None] + (goal - origin)[:, :, None] * s
        branch += rng.normal(0.0, 4.0, (first, second, 1, 3)) * arch
        mains.append(main)
        branches.append(branch.reshape(first * second, points, 3))
    return np.concatenate(mains).astype(np.float32), np.concatenate(branches).astype(np.float32)


def _vessels(scene: _Scene, anatomy: Anatomy, thick: float) -> None:
    for curves, first, last in zip(_vessel_curves(anatomy), (3.9, 2.0), (1.2, 0.7), strict=True):
        radius = np.linspace(first, last, curves.shape[1], dtype=np.float32) * thick
        scene.tubes(curves, radius, 0.0135, vessel=True)


def _mediastinum(scene: _Scene, anatomy: Anatomy, ratio: float, shift: float) -> None:
    """Heart, great vessels, hila and airways; `ratio` is the heart's width to the chest's, `shift` sideways in mm."""
    width = ratio * 2.0 * 136.0 * anatomy.broad
    right, left = 0.34 * width, 0.66 * width
    growth = width / 120.0
    if scene.camera.lateral:
        scene.ellipse((0.0, -34.0, 36.0), (45.0 * growth, 54.0 * growth**0.5), 125.0, _ORGAN, 0.45)
        scene.ellipse((0.0, -30.0, -40.0), (22.0, 42.0), 60.0, _ORGAN, 0.1)
        scene.ellipse((0.0, 12.0, -20.0), (17.0, 21.0), 42.0, _ORGAN)
    else:
        centre = (left - right) / 2.0 + shift
        scene.ellipse((centre + 0.14 * width, -38.0, 46.0), (0.40 * width, 44.0 * growth**0.7), 120.0, _ORGAN, 0.30)
        scene.ellipse((shift - right + 0.34 * width, -36.0, 30.0), (0.34 * width, 50.0 * growth**0.7), 110.0, _ORGAN)
        scene.ellipse((shift + 20.0, -25.0, -22.0), (25.0 * growth**0.5, 32.0), 80.0, _ORGAN, 0.2)
        scene.ellipse((shift + 17.0, 10.0, -64.0), (anatomy.arch, anatomy.arch + 1.0), 80.0, _ORGAN)
        scene.ellipse((shift - 14.0, -10.0, -58.0), (19.0, 78.0), 70.0, _ORGAN)
        for sign, z in ((1.0, -24.0), (-1.0, -12.0)):
            scene.ellipse((shift + sign * 36.0, 8.0, z), (11.0, 20.0), 36.0, _ORGAN, -sign * 0.35)
    bow = anatomy.back(_f32([-60.0, 20.0, 110.0])) - 30.0
    aorta = _curve(
        (15.0, -5.0, -50.0),
        (15.0, 8.0, -72.0),
        (18.0, float(bow[0]) - 12.0, -58.0),
        (19.0, float(bow[1]), 20.0),
        (14.0, float(bow[2]), 120.0),
    )
    scene.tubes(aorta, anatomy.arch * 0.72, MU_SOFT * 0.55)
    trachea = _curve((0.0, 18.0, -240.0), (0.0, 8.0, -150.0), (shift * 0.6, 16.0, -68.0))
    scene.tubes(trachea, 8.5, -MU_SOFT)
    bronchi = np.concatenate([
        _curve((shift * 0.6, 16.0, -68.0), (shift + 20.0, 20.0, -46.0), (shift + 42.0, 24.0, -30.0)),
        _curve((shift * 0.6, 16.0, -68.0), (shift - 14.0, 20.0, -48.0), (shift - 32.0, 22.0, -22.0)),
    ])  # fmt: skip
    scene.tubes(bronchi, np.linspace(6.5, 4.0, bronchi.shape[1], dtype=np.float32), -MU_SOFT * 0.9)


def _round_off(profile: ArrayLike) -> Array:
    """A profile over the levels with its corners rounded over some 5 cm."""
    kernel = np.convolve(np.ones(13), np.ones(13)) / 169.0
    return np.convolve(np.pad(_f32(profile), 12, mode="edge"), kernel, mode="valid").astype(np.float32)


def _body_tables(anatomy: Anatomy, camera: Camera, domes: list[float]) -> tuple[Array, ...]:
    """For the kernel, over the levels `_Z`: body (Z, 3), lungs (2, Z, 3), domes (2, 64), cage (Z, 2), spine (Z, 4)."""
    z, fat = _Z, anatomy.fat
    half, back, front = anatomy.half_width(z), anatomy.back(z), anatomy.front(z)
    neck = (-300.0, -200.0, -178.0, -160.0, -140.0, -112.0, -60.0, 40.0, 150.0, 300.0)
    flank = _round_off(np.interp(z, neck, (56, 57, 64, 108, 152, 176, 162, 164, 160, 172)) * anatomy.broad + fat)
    bulk = np.interp(z, (-300.0, -190.0, -150.0, -60.0, 60.0, 300.0), (112, 115, 140, 205, 225, 230))
    depth = _round_off(bulk * anatomy.deep + 1.5 * fat)
    open_ = (half > 3.0) & (z < 150.0)
    s = np.linspace(0.0, 1.0, _DOME_POINTS, dtype=np.float32)
    if camera.lateral:
        chest = np.interp(z, (-200.0, -150.0), (0.0, 1.0))
        breast = np.interp(z, (-90.0, 10.0, 60.0, 110.0), (0.0, 10.0, 10.0, 5.0)) * (1.8 if anatomy.female else 0.4)
        low = _round_off(chest * (front - 17.0 - fat) + (1.0 - chest) * (-46.0 - fat) - breast)
        high = chest * (back + 34.0 + fat) + (1.0 - chest) * (80.0 + fat)
        body = np.stack([low, _round_off(high), 1.55 * flank], axis=-1)
        span = np.where(open_, back - 3.0, front + 6.0)
        chord = np.maximum(half - 20.0, 0.0)
        lung = np.stack([front + 7.0, span, chord], axis=-1)
        lungs = np.stack([lung, lung])
        cage = np.stack([front - 4.0, np.where(open_, back + 4.0, front - 5.0)], axis=-1)
        fall = 30.0 * np.maximum((0.36 - s) / 0.36, 0.0) ** 2 + 58.0 * np.maximum((s - 0.36) / 0.64, 0.0) ** 1.7
        centre = np.stack([np.zeros_like(z), back - 20.0, z], axis=-1)
    else:
        body = np.stack([-flank, flank, depth], axis=-1)
        knots = (-145.0, -100.0, -60.0, 20.0, 120.0)
        inner = anatomy.middle(z) + _f32(np.interp(z, knots, (15, 26, 27, 18, 19)))
        inner_right = -anatomy.middle(z) + _f32(np.interp(z, knots, (15, 24, 22, 18, 19)))
        outer = np.where(open_, half - 3.0, 0.0)
        chord = np.maximum(back - front - 22.0, 0.0)
        lungs = np.stack([
            np.stack([inner, np.maximum(outer, inner), chord], axis=-1),
            np.stack([-np.maximum(outer, inner_right), -inner_right, chord], axis=-1),
        ])  # fmt: skip
        edge = np.where(open_, half + 3.0, 0.0)
        cage = np.stack([-edge, edge], axis=-1)
        fall = 12.0 * np.maximum((0.45 - s) / 0.45, 0.0) ** 2 + 46.0 * np.maximum((s - 0.45) / 0.55, 0.0) ** 2.2
        centre = np.stack([anatomy.middle(z), np.full_like(z, 48.0), z], axis=-1)
    tables = np.stack([top + fall for top in domes])
    level, zoom = camera.project(centre.astype(np.float32))
    bulk = np.interp(z, (-250.0, -150.0, 0.0, 150.0), (0.72, 0.85, 1.0, 1.25)) * anatomy.vertebra
    spine = np.stack(
        [level[:, 0], bulk * zoom, np.full_like(z, 23.5), np.full_like(z, 0.9 if camera.lateral else 0.75)],
        axis=-1,
    )
    return tuple(np.ascontiguousarray(table, np.float32) for table in (body, lungs, tables, cage, spine))


def _lung_findings(scene: _Scene, anatomy: Anatomy, finding: Finding, domes: list[float]) -> None:
    """Adds one finding of lung or pleura to the scene."""
    rng = np.random.default_rng([finding.key, 5])
    lateral = scene.camera.lateral
    degree = _DEGREE.get(finding.degree, 1)
    strength = 0.55 if finding.uncertain else 1.0
    where = rng.uniform(-1.0, 1.0, 3)
    y = float(rng.uniform(-45.0, 45.0))
    for side in _sides(finding):
        sign = 1.0 - 2.0 * side
        z = _ZONES.get(finding.place, 0.0) + 12.0 * float(where[0])
        reach = float(anatomy.half_width(z))
        x = sign * (30.0 + (reach - 30.0) * (0.52 + 0.13 * float(where[1])))
        if finding.name == "Effusion":
            height = (48.0, 88.0, 140.0)[degree] + 8.0 * float(where[0])
            corner = max(domes) + 44.0 if lateral else domes[side] + 44.0
            scene.fluid[side] = (corner - height, min(strength + 0.1, 1.0), (46.0, 40.0, 34.0)[degree], 8.0)
        elif finding.name == "Pneumothorax":
            gap = (30.0, 46.0, 68.0)[degree] * (0.8 if finding.uncertain else 1.0)
            scene.air[side] = (gap, 0.6 if finding.uncertain else 1.0, -142.0, 0.05 + 0.07 * degree)
        elif finding.name == "Consolidation":
            half = (26.0, 34.0, 44.0)[degree]
            amount = 0.66 * strength
            scene.opacity((x, y, z), (half * 0.92, half), amount, side, 0.42, 0.4 * float(where[2]))
            for _ in range(3):
                ox, oz = rng.uniform(-0.7, 0.7, 2) * half
                scene.opacity((x + ox, y + ox, z + oz), (half * 0.5, half * 0.45), 0.4 * strength, side, 0.5)
        elif finding.name == "Nodule":
            radius = (11.0, 15.0, 19.5)[degree] + 0.5 * float(where[2])
            # dense, as calcium is, that it stands out between the ribs
            chord = (
                2.0
                * radius
                * (0.7 if finding.uncertain else 1.0)
                * (3.2 if lateral else 2.8)
                * (1.4, 1.15, 1.0)[degree]
            )
            scene.ellipse((x, y, z), (radius, radius), chord, _SPHERE)
        elif finding.name == "Atelectasis":
            base = domes[side] - 14.0
            for band in range(1 + degree):
                level = base - 17.0 * band
                slant = sign * (0.22 + 0.1 * float(where[2])) * (1.0 - 0.5 * band)
                if lateral:
                    slant = 0.35
                length = (50.0, 56.0, 60.0)[degree]
                centre = (x if lateral else sign * (0.56 - 0.04 * band) * reach, y, level - 4.0)
                scene.opacity(centre, (length, 4.6 + 0.7 * degree), 0.85 * strength, side, 0.3, slant)


def _edema(scene: _Scene, anatomy: Anatomy, finding: Finding) -> None:
    rng = np.random.default_rng([finding.key, 6])
    degree = _DEGREE[finding.degree]
    strength = 0.6 if finding.uncertain else 1.0
    haze = (0.32, 0.44, 0.58)[degree] * strength
    for side in (LEFT, RIGHT):
        sign = 1.0 - 2.0 * side
        for dx, dz, rx, rz in ((44.0, -8.0, 38.0, 62.0), (58.0, 14.0, 44.0, 48.0)):
            scene.opacity((sign * dx, 5.0, dz), (rx, rz), haze, side, 0.75)
        count = 9 + 3 * degree
        z = np.linspace(-20.0, 78.0, count) + rng.normal(0.0, 2.0, count)
        wall = anatomy.half_width(z) - 5.0
        inner = wall - rng.uniform(14.0, 26.0, count)
        y = rng.uniform(-30.0, 30.0, count)
        outer_end = np.stack([sign * wall, y, z], axis=-1)
        inner_end = np.stack([sign * inner, y, z - rng.normal(2.0, 2.0, count)], axis=-1)
        lines = np.stack([outer_end, inner_end], axis=1)
        scene.tubes(lines, 1.3, 0.03 * strength * (1.0 + 0.3 * degree), vessel=True)


def _devices(scene: _Scene, anatomy: Anatomy, finding: Finding) -> None:
    rng = np.random.default_rng([finding.key, 7])
    j = rng.uniform(-1.0, 1.0, 4)
    sign = -1.0 if finding.side == "right" else 1.0
    wide = anatomy.broad
    if finding.name == "Pacemaker":
        x, z = sign * (84.0 + 8.0 * j[0]) * wide, -82.0 + 8.0 * j[1]
        # one path to and fro: a plate
        path = _f32(
            [
                (-10, -12),
                (10, -12),
                (10, -6),
                (-10, -6),
                (-10, 0),
                (10, 0),
                (10, 6),
                (-10, 6),
                (-8, 11),
                (8, 11),
            ]
        )
        can = np.empty((1, len(path), 3), np.float32)
        can[0, :, 0], can[0, :, 1], can[0, :, 2] = (
            x + path[:, 0],
            -100.0,
            z + path[:, 1] + 0.2 * j[2] * path[:, 0],
        )
        scene.tubes(can, 9.0, 0.2)
        lead = _curve(
            (x, -96.0, z), (sign * 52.0, -82.0, z - 30.0), (sign * 14.0 - 8.0, -50.0, -92.0), (-22.0, -20.0, -50.0),
            (-30.0, -20.0, 12.0), (6.0, -45.0, 58.0), (44.0 + 6.0 * j[3], -62.0, 62.0), count=48,
        )  # fmt: skip
        scene.tubes(lead, 1.5, 0.22)
        scene.tubes(lead[:, -3:], 2.6, 0.22)
    elif finding.name == "Central Line":
        tip = (-24.0 + 2.0 * j[0], -10.0, -28.0 + 12.0 * j[1])
        if finding.place == "subclavian":
            line = _curve(
                (sign * 128.0 * wide, -70.0, -84.0 + 6.0 * j[2]), (sign * 88.0 * wide, -60.0, -112.0),
                (sign * 40.0 - 4.0, -30.0, -108.0), (-20.0, -15.0, -76.0), tip, count=48,
            )  # fmt: skip
        else:
            line = _curve(
                (sign * 50.0, 0.0, -215.0), (sign * 36.0, -5.0, -160.0), (sign * 26.0 - 6.0, -15.0, -118.0),
                (-22.0, -15.0, -78.0), tip, count=48,
            )  # fmt: skip
        scene.tubes(line, 1.9, 0.17)
    elif finding.name == "Tube":
        depth = {"high": -112.0, "good": -96.0, "low": -80.0}[finding.place] + 3.0 * j[0]
        tube = _curve(
            (6.0 * j[1], -20.0, -260.0),
            (2.0 * j[1], 0.0, -190.0),
            (0.0, 8.0, -150.0),
            (0.0, 14.0, depth),
            count=32,
        )
        scene.tubes(tube, 5.2, 0.10, 1.0)
        scene.tubes(tube + _f32([1.5, 0.0, 0.0]), 1.8, 0.24)


def _letter(scene: _Scene, letter: str, h: float, v: float, tall: float) -> None:
    """A lead letter on the cassette, its upper left corner at (h, v) mm."""
    strokes = {
        "L": [(0.0, 0.0, 0.0, 1.0), (0.0, 1.0, 0.6, 1.0)],
        "R": [
            (0.0, 0.0, 0.0, 1.0),
            (0.0, 0.0, 0.5, 0.0),
            (0.6, 0.1, 0.6, 0.4),
            (0.0, 0.5, 0.5, 0.5),
            (0.25, 0.5, 0.65, 1.0),
        ],
    }[letter]
    lines = _f32(strokes).reshape(-1, 2, 2) * tall + _f32([h, v])
    scene.strokes(lines, 1.2, 1.2)


def draw_view(
    anatomy: Anatomy,
    view: str,
    findings: tuple[Finding, ...],
    key: tuple[int, ...],
    size: int,
    without: Collection[str] = (),
) -> tuple[NDArray[np.uint16], Mask, Mask]:
    """One radiograph: 12-bit image, thorax mask, lung mask, all (size, size).

    Args:
        anatomy: the patient.
        view: "PA", "AP" or "LL".
        findings: what to draw; those named in `without` are left out, with all randomness unchanged.
        key: seeds positioning, exposure and noise.
        size: side in pixels.
    """
    rng = np.random.default_rng(key)
    drawn = tuple(finding for finding in findings if finding.name not in without)
    named = {finding.name: finding for finding in drawn}
    lateral = view == "LL"
    yaw, tilt, roll = rng.normal(0.0, 1.0, 3)
    if view == "AP":
        camera = Camera(view, math.radians(2.8 * yaw), math.radians(9.0 + 3.0 * tilt), 1150.0)
    else:
        camera = Camera(view, math.radians(1.6 * yaw), math.radians(1.0 * tilt), 1900.0)
    fov = float((368.0 if lateral else 350.0) * rng.uniform(0.95, 1.06) / anatomy.size)
    turn = math.radians(float(np.clip(1.2 * roll, -4.0, 4.0)))
    shift = rng.normal(0.0, 5.0, 2) + ((2.0, 10.0) if lateral else (0.0, 12.0))
    frame = _f32([fov, shift[0], shift[1], math.cos(turn), math.sin(turn)])
    scene = _Scene(camera, fov, size, frame)
    breath = float(rng.normal(0.0, 4.0)) - (16.0 if view == "AP" else 0.0)
    domes = [dome + breath for dome in anatomy.domes]

    ratio, sideways, thick = anatomy.heart, 0.0, 1.0
    if "Cardiomegaly" in named:
        heart = named["Cardiomegaly"]
        ratio = (0.60, 0.66, 0.72)[_DEGREE[heart.degree]] - (0.04 if heart.uncertain else 0.0)
    if "Edema" in named:
        edema = named["Edema"]
        thick = (1.3, 1.45, 1.6)[_DEGREE[edema.degree]] if not edema.uncertain else 1.15
    for finding in drawn:
        lean = sum(1.0 - 2.0 * side for side in _sides(finding)) * _DEGREE.get(finding.degree, 0)
        if finding.name == "Pneumothorax":
            sideways -= 5.0 * lean
        elif finding.name == "Atelectasis":
            sideways += 3.0 * lean
            for side in _sides(finding):
                domes[side] -= (13.0, 22.0, 32.0)[_DEGREE[finding.degree]] * (0.6 if finding.uncertain else 1.0)

    tables = _body_tables(anatomy, camera, domes)
    _mediastinum(scene, anatomy, ratio, sideways)
    _vessels(scene, anatomy, thick)
    _ribs(scene, anatomy, [finding for finding in drawn if finding.name == "Fracture"])
    _frame_bones(scene, anatomy)
    stomach = rng.uniform(-1.0, 1.0, 8)
    scene.ellipse(
        (62.0 + 9.0 * stomach[0], 0.0, domes[LEFT] + 27.0),
        (27.0 + 7.0 * stomach[1], 12.0 + 4.0 * stomach[2]),
        70.0,
        _AIR,
    )
    scene.ellipse((70.0 * stomach[3], 0.0, 172.0 + 8.0 * stomach[4]), (24.0, 12.0 + 4.0 * stomach[5]), 26.0, _AIR)
    if anatomy.female and not lateral:
        breast = np.random.default_rng([anatomy.key, 8]).uniform(0.0, 1.0, 3)
        for sign in (-1.0, 1.0):
            half = (58.0 + 8.0 * breast[0], 52.0 + 8.0 * breast[1])
            scene.ellipse(
                (sign * 78.0, -110.0, 50.0 + 14.0 * breast[2]),
                half,
                14.0 + 10.0 * breast[0] + 0.5 * anatomy.fat,
                _FAT,
            )
    for finding in drawn:
        if finding.name in ("Pacemaker", "Central Line", "Tube"):
            _devices(scene, anatomy, finding)
        elif finding.name == "Edema":
            _edema(scene, anatomy, finding)
        elif finding.name not in ("Cardiomegaly", "Fracture"):
            _lung_findings(scene, anatomy, finding, domes)

    letter = "R" if not lateral and rng.random() < 0.4 else "L"
    h = (fov * 0.5 - rng.uniform(28.0, 44.0)) * (-1.0 if letter == "R" or lateral else 1.0)
    _letter(
        scene,
        letter,
        h,
        -fov * 0.5 + rng.uniform(16.0, 40.0) if not lateral else fov * 0.5 - rng.uniform(30.0, 60.0),
        rng.uniform(11.0, 15.0),
    )

    ellipses = _f32(scene.ellipses).reshape(-1, 9)
    opacities = _f32(scene.opacities).reshape(-1, 10)
    lattice = rng.standard_normal((64, 64), dtype=np.float32)
    volumes, visible = np.empty((size, size), np.float32), np.empty((size, size), np.float32)
    thorax, lung = np.empty((size, size), np.bool_), np.empty((size, size), np.bool_)
    _project_volumes(
        frame,
        *tables,
        ellipses,
        opacities,
        scene.fluid,
        scene.air,
        lattice,
        0.02,
        lateral,
        volumes,
        visible,
        thorax,
        lung,
    )
    portable = view == "AP"
    exposure = rng.normal(0.0, 1.0, 4)
    border = np.zeros(5, np.float32)
    if rng.random() < 0.45:
        border[:4] = np.floor(rng.uniform(0.0, 0.045, 4) * size)
        border[4] = 1.0 if rng.random() < 0.2 else 0.0
    noise = rng.standard_normal((size, size), dtype=np.float32)
    image = _expose(
        volumes, scene.bones, scene.vessels, visible, noise,
        scatter=0.11 if portable else 0.05,
        photons=(2.2e4 if portable else 5e4) * math.exp(0.3 * float(exposure[0])) * (256.0 / size) ** 2,
        equalise=0.42 + 0.04 * float(exposure[3]),
        black=-1.45 + 0.10 * float(exposure[1]),
        white=1.35 + 0.10 * float(exposure[2]),
        edges=border,
    )  # fmt: skip
    return image, thorax, lung
