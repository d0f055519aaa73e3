"""The selective scan's kernels for the CPU, in numba: a value of sixteen lanes, then both passes written with it.

A `Lanes` is one LLVM vector, so that a kernel is vectorised as it is written and not as a loop optimiser sees fit. The
compiler splits it where a processor's registers are narrower. All is in one file, because numba's cache on disk goes
by the file of the compiled function.
"""

import operator
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
TILE = 32
"""Steps that a kernel works on at once; a multiple of LANES."""
BLOCK = TILE * LANES
OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_VECTOR, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_FUSE = ("contract",)


class Lanes(types.Type):
    """The numba type of sixteen float32."""

    def __init__(self) -> None:
        super().__init__(name="Lanes16")


lanes = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [ir.Constant(_FLOAT, value)] * LANES)


def _place(builder: Any, pointer: Any, index: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [index]), _VECTOR.as_pointer())


floats: Any = types.CPointer(types.float32)  # type: ignore[attr-defined]
integers: Any = types.CPointer(types.int64)  # type: ignore[attr-defined]


@intrinsic
def floats_at(typing: Any, address: Any) -> Any:
    """The float32 numbers that begin at an address."""
    return floats(types.int64), lambda context, builder, signature, given: builder.inttoptr(
        given[0], _FLOAT.as_pointer()
    )


@intrinsic
def integers_at(typing: Any, address: Any) -> Any:
    """The int64 numbers that begin at an address."""
    return integers(types.int64), lambda context, builder, signature, given: builder.inttoptr(
        given[0], ir.IntType(64).as_pointer()
    )


@intrinsic
def take(typing: Any, pointer: Any, index: Any) -> Any:
    """Reads an integer and adds one to it, as one step for all threads."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", builder.gep(given[0], [given[1]]), one, "monotonic")

    return types.int64(integers, types.int64), generate


def _shuffle(builder: Any, a: Any, b: Any, picks: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, LANES), picks))


@intrinsic
def load(typing: Any, pointer: Any, index: Any) -> Any:
    """Sixteen neighbours at an address."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.load(_place(builder, *given), align=4)

    return lanes(floats, types.int64), generate


@intrinsic
def store(typing: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Writes sixteen neighbours at an address."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        builder.store(given[2], _place(builder, given[0], given[1]), align=4)
        return context.get_dummy_value()

    return types.void(floats, types.int64, lanes), generate


@intrinsic
def at(typing: Any, pointer: Any, index: Any) -> Any:
    """One number in every lane."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return _splat(builder, builder.load(builder.gep(given[0], [given[1]])))

    return lanes(floats, types.int64), generate


@intrinsic
def fill(typing: Any, value: Any) -> Any:
    """One number in every lane."""
    return lanes(types.float32), lambda context, builder, signature, given: _splat(builder, given[0])


def _splat(builder: Any, value: Any) -> Any:
    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_INT, 0))
    return _shuffle(builder, first, first, [0] * LANES)


def _operator(function: Any, name: str) -> None:
    """Teaches numba a Python operator between two Lanes."""

    @intrinsic
    def operation(typing: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return getattr(builder, name)(*given, flags=_FUSE)

        return lanes(lanes, lanes), generate

    # numba compares the two signatures, so neither is annotated.
    @overload(function)
    def choose(a, b):  # type: ignore[no-untyped-def]
        return (lambda a, b: operation(a, b)) if isinstance(a, Lanes) and isinstance(b, Lanes) else None


for _function, _name in ((operator.add, "fadd"), (operator.mul, "fmul")):
    _operator(_function, _name)


def _exponential(builder: Any, x: Any) -> Any:
    """e^x to 1 unit in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; 0 below e^-87.3."""

    def fused(a: Any, b: Any, c: Any) -> Any:
        return builder.fadd(builder.fmul(a, b, flags=_FUSE), c, flags=_FUSE)

    # Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    shift = _constant(12582912.0)
    shifted = fused(x, _constant(1.4426950216293335), shift)
    n = builder.fsub(shifted, shift)
    # ln 2 in two parts, the first with few bits, so that n times it is exact.
    r = fused(n, _constant(-0.693359375), x)
    r = fused(n, _constant(2.1219444170128554e-4), r)
    p = _constant(0.00019841270113829523)
    for factorial in (720, 120, 24, 6, 2, 1, 1):
        p = fused(p, r, _constant(_single(1 / factorial)))
    bits = builder.add(
        builder.bitcast(p, _INTS), builder.shl(builder.bitcast(shifted, _INTS), ir.Constant(_INTS, [23] * LANES))
    )
    e = builder.select(builder.fcmp_ordered("<", x, _constant(-87.0)), _constant(0.0), builder.bitcast(bits, _VECTOR))
    e = builder.select(builder.fcmp_ordered(">", x, _constant(88.0)), _constant(float("inf")), e)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, e)


def _single(value: float) -> float:
    return float(np.float32(value))


@intrinsic
def exp(typing: Any, x: Any) -> Any:
    """e^x in every lane."""
    return lanes(lanes), lambda context, builder, signature, given: _exponential(builder, given[0])


@intrinsic
def softplus(typing: Any, x: Any) -> Any:
    """log(1 + e^x) in every lane, exact to a few units in the last place however small it is."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        (x,) = given
        zero, two = _constant(0.0), _constant(2.0)
        positive = builder.fcmp_ordered(">", x, zero)
        z = _exponential(builder, builder.select(positive, builder.fneg(x), x))
        # log(1 + z) = 2 artanh(s) with s = z / (2 + z) at most 1/3, so that the series is short.
        s = builder.fdiv(z, builder.fadd(two, z))
        q = builder.fmul(s, s)
        p = _constant(_single(1 / 15))
        for odd in (13, 11, 9, 7, 5, 3, 1):
            p = builder.fadd(builder.fmul(p, q, flags=_FUSE), _constant(_single(1 / odd)), flags=_FUSE)
        p = builder.fmul(builder.fmul(s, p), two)
        return builder.fadd(p, builder.select(positive, x, zero))

    return lanes(lanes), generate


@intrinsic
def sigmoid(typing: Any, x: Any) -> Any:
    """1 / (1 + e^-x) in every lane: the slope of softplus."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        (x,) = given
        positive = builder.fcmp_ordered(">", x, _constant(0.0))
        z = _exponential(builder, builder.select(positive, builder.fneg(x), x))
        one = _constant(1.0)
        return builder.fdiv(builder.select(positive, one, z), builder.fadd(one, z))

    return lanes(lanes), generate


@intrinsic
def sums(typing: Any, pointer: Any, index: Any) -> Any:
    """The sixteen sums of sixteen neighbours each."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        rows = _rows(builder, given[0], given[1], ir.Constant(given[1].type, LANES))
        while len(rows) > 1:
            rows = [
                builder.fadd(
                    _shuffle(builder, a, b, list(range(0, 2 * LANES, 2))),
                    _shuffle(builder, a, b, list(range(1, 2 * LANES, 2))),
                )
                for a, b in zip(rows[0::2], rows[1::2], strict=True)
            ]
        return rows[0]

    return lanes(floats, types.int64), generate


@intrinsic
def transpose(typing: Any, source: Any, start: Any, stride: Any, target: Any, index: Any, step: Any) -> Any:
    """Sixteen runs of sixteen numbers, `stride` apart, become sixteen runs `step` apart of one number of each."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        source, start, stride, target, index, step = given
        rows = _rows(builder, source, start, stride)
        width = 1
        while width < LANES:
            # Swaps the off-diagonal quarters of every square of 2 x width rows and columns.
            low = [i if i % (2 * width) < width else LANES + i - width for i in range(LANES)]
            high = [i + width if i % (2 * width) < width else LANES + i for i in range(LANES)]
            for i in range(LANES):
                if i % (2 * width) < width:
                    a, b = rows[i], rows[i + width]
                    rows[i], rows[i + width] = _shuffle(builder, a, b, low), _shuffle(builder, a, b, high)
            width *= 2
        for i, row in enumerate(rows):
            at = builder.add(index, builder.mul(step, ir.Constant(step.type, i)))
            builder.store(row, _place(builder, target, at), align=4)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(floats, integer, integer, floats, integer, integer), generate


def _rows(builder: Any, pointer: Any, start: Any, stride: Any) -> list[Any]:
    places = [builder.add(start, builder.mul(stride, ir.Constant(stride.type, i))) for i in range(LANES)]
    return [builder.load(_place(builder, pointer, place), align=4) for place in places]


@numba.njit(**OPTIONS)
def _read(
    source: Any, base: int, by_channel: int, by_place: int, order: Any, first: int, count: int, width: int,
    tile: Any, offset: int,
) -> None:  # fmt: skip
    """`count` steps of `width` channels, a step a row; lanes beyond the width are zero."""
    t = 0
    if by_channel == 1 and width == LANES:
        while t < count:
            store(tile, offset + t * LANES, load(source, base + order[first + t] * by_place))
            t += 1
    elif by_place == 1 and width == LANES:
        # Only sequences lie like this, and their order is that of memory.
        while t + LANES <= count:
            transpose(source, base + first + t, by_channel, tile, offset + t * LANES, LANES)
            t += LANES
    while t < count:
        store(tile, offset + t * LANES, fill(np.float32(0)))
        place = base + order[first + t] * by_place
        for j in range(width):
            tile[offset + t * LANES + j] = source[place + j * by_channel]
        t += 1


@numba.njit(**OPTIONS)
def _write(
    target: Any, base: int, by_channel: int, by_place: int, order: Any, first: int, count: int, width: int,
    tile: Any, offset: int, add: bool,
) -> None:  # fmt: skip
    """The inverse of `_read`; `add` adds to what is there."""
    t = 0
    if by_channel == 1 and width == LANES:
        while t < count:
            place = base + order[first + t] * by_place
            row = load(tile, offset + t * LANES)
            if add:
                row = row + load(target, place)
            store(target, place, row)
            t += 1
    elif by_place == 1 and width == LANES and not add:
        while t + LANES <= count:
            transpose(tile, offset + t * LANES, LANES, target, base + first + t, by_channel)
            t += LANES
    while t < count:
        place = base + order[first + t] * by_place
        for j in range(width):
            value = tile[offset + t * LANES + j]
            if add:
                value += target[place + j * by_channel]
            target[place + j * by_channel] = value
        t += 1


def forward(given: Any) -> None:
    """Tasks of batch x groups x spans of blocks of channels, the directions one after the other."""
    u, u_b, u_c, u_l = floats_at(given[3]), given[4], given[5], given[6]
    delta, d_b, d_k, d_c, d_l = floats_at(given[7]), given[8], given[9], given[10], given[11]
    B, B_b, B_g, B_n, B_l = floats_at(given[12]), given[13], given[14], given[15], given[16]
    C, C_b, C_g, C_n, C_l = floats_at(given[17]), given[18], given[19], given[20], given[21]
    A, skip, bias, soft = floats_at(given[22]), floats_at(given[23]), floats_at(given[24]), given[25] != 0
    orders, K, L, N = integers_at(given[26]), given[27], given[28], given[29]
    batch, groups, channels, span = given[30], given[31], given[32], given[33]
    y, y_b, y_c, y_l = floats_at(given[34]), given[35], given[36], given[37]
    starts, keep = floats_at(given[38]), given[38] != 0
    blocks, tiles = (channels + LANES - 1) // LANES, (L + TILE - 1) // TILE
    spans = (blocks + span - 1) // span
    # Of a tile: input, steps, steps x input, output. Of each block: states, A, bias, skip.
    U, S, X, Y = 0, BLOCK, 2 * BLOCK, 3 * BLOCK
    H, AT, BIAS = 4 * BLOCK, 4 * BLOCK + span * N * LANES, 4 * BLOCK + 2 * span * N * LANES
    SKIP = BIAS + span * LANES
    work = floats_at(given[2] + 4 * (SKIP + span * LANES) * take(given, 0))
    nothing = fill(np.float32(0))
    tasks = batch * groups * spans
    task = take(given, 1)
    while task < tasks:
        b, g, block = task // (groups * spans), task // spans % groups, task % spans * span
        wide = min(span, blocks - block)
        for k in range(K):
            order, row = k * L, (k * groups + g) * channels + block * LANES
            for j in range(H, SKIP + span * LANES, LANES):
                store(work, j, nothing)
            for j in range(min(wide * LANES, channels - block * LANES)):
                for n in range(N):
                    work[AT + (j // LANES * N + n) * LANES + j % LANES] = A[(row + j) * N + n]
                work[BIAS + j], work[SKIP + j] = bias[row + j], skip[row + j]
            from_B, from_C = b * B_b + (k * groups + g) * B_g, b * C_b + (k * groups + g) * C_g
            for i in range(tiles):
                t0 = i * TILE
                count = min(TILE, L - t0)
                for s in range(wide):
                    c = (block + s) * LANES
                    width = min(LANES, channels - c)
                    from_u, from_y = b * u_b + (g * channels + c) * u_c, b * y_b + (g * channels + c) * y_c
                    from_delta = b * d_b + k * d_k + (g * channels + c) * d_c
                    if keep:
                        place = ((((b * groups + g) * blocks + block + s) * K + k) * tiles + i) * N * LANES
                        for n in range(N):
                            store(starts, place + n * LANES, load(work, H + (s * N + n) * LANES))
                    _read(u, from_u, u_c, u_l, orders, order + t0, count, width, work, U)
                    _read(delta, from_delta, d_c, d_l, orders, order + t0, count, width, work, S)
                    v_bias, v_skip = load(work, BIAS + s * LANES), load(work, SKIP + s * LANES)
                    for t in range(0, count * LANES, LANES):
                        x = load(work, U + t)
                        step = load(work, S + t) + v_bias
                        if soft:
                            step = softplus(step)
                        store(work, S + t, step)
                        store(work, X + t, step * x)
                        store(work, Y + t, v_skip * x)
                    for n in range(N):
                        own = (s * N + n) * LANES
                        a, h = load(work, AT + own), load(work, H + own)
                        at_B, at_C = from_B + n * B_n, from_C + n * C_n
                        for t in range(count):
                            o, place = t * LANES, orders[order + t0 + t]
                            h = exp(load(work, S + o) * a) * h + at(B, at_B + place * B_l) * load(work, X + o)
                            store(work, Y + o, load(work, Y + o) + at(C, at_C + place * C_l) * h)
                        store(work, H + own, h)
                    _write(y, from_y, y_c, y_l, orders, order + t0, count, width, work, Y, k > 0)
        task = take(given, 1)


def backward(given: Any) -> None:
    """Tasks of batch x groups x shares of the blocks. `of_u` lies as u, `of_delta` as delta; `of_B` and `of_C`
    (shares, batch, K groups, N, steps) hold a share's sums in the order of walking."""
    u, u_b, u_c, u_l = floats_at(given[3]), given[4], given[5], given[6]
    delta, d_b, d_k, d_c, d_l = floats_at(given[7]), given[8], given[9], given[10], given[11]
    B, B_b, B_g, B_n, B_l = floats_at(given[12]), given[13], given[14], given[15], given[16]
    C, C_b, C_g, C_n, C_l = floats_at(given[17]), given[18], given[19], given[20], given[21]
    A, skip, bias, soft = floats_at(given[22]), floats_at(given[23]), floats_at(given[24]), given[25] != 0
    orders, K, L, N = integers_at(given[26]), given[27], given[28], given[29]
    batch, groups, channels, span = given[30], given[31], given[32], given[33]
    grad, g_b, g_c, g_l = floats_at(given[34]), given[35], given[36], given[37]
    starts, shares = floats_at(given[38]), given[39]
    of_u, o_b, o_c, o_l = floats_at(given[40]), given[41], given[42], given[43]
    of_delta, p_b, p_k, p_c, p_l = floats_at(given[44]), given[45], given[46], given[47], given[48]
    of_A, of_B, of_C = floats_at(given[49]), floats_at(given[50]), floats_at(given[51])
    of_skip, of_bias = floats_at(given[52]), floats_at(given[53])
    blocks, tiles = (channels + LANES - 1) // LANES, (L + TILE - 1) // TILE
    # Of a tile: input, steps, their slope, gradient of the output, steps x input; gradients of the last and of the
    # steps; products to be summed for C and B; decays; states, one more than steps.
    U, S, P, Q, X, GX, GS, SC, SB, E, HS = range(0, 11 * BLOCK, BLOCK)
    # Of each block: A, gradients of the states and of A; bias, skip and their gradients.
    AT = 11 * BLOCK + LANES
    GH, GA, BIAS = AT + span * N * LANES, AT + 2 * span * N * LANES, AT + 3 * span * N * LANES
    SKIP, GBIAS, GSKIP = BIAS + span * LANES, BIAS + 2 * span * LANES, BIAS + 3 * span * LANES
    work = floats_at(given[2] + 4 * (GSKIP + span * LANES) * take(given, 0))
    nothing = fill(np.float32(0))
    tasks = batch * groups * shares
    task = take(given, 1)
    while task < tasks:
        b, g, share = task // (groups * shares), task // shares % groups, task % shares
        for block in range(share * blocks // shares, (share + 1) * blocks // shares, span):
            wide = min(span, (share + 1) * blocks // shares - block)
            channels_here = min(wide * LANES, channels - block * LANES)
            for k in range(K):
                order, row = k * L, (k * groups + g) * channels + block * LANES
                for j in range(AT, GSKIP + span * LANES, LANES):
                    store(work, j, nothing)
                for j in range(channels_here):
                    for n in range(N):
                        work[AT + (j // LANES * N + n) * LANES + j % LANES] = A[(row + j) * N + n]
                    work[BIAS + j], work[SKIP + j] = bias[row + j], skip[row + j]
                from_B, from_C = b * B_b + (k * groups + g) * B_g, b * C_b + (k * groups + g) * C_g
                sums_at = ((share * batch + b) * K * groups + k * groups + g) * N * tiles * TILE
                for i in range(tiles - 1, -1, -1):
                    t0 = i * TILE
                    count = min(TILE, L - t0)
                    for s in range(wide):
                        c = (block + s) * LANES
                        width = min(LANES, channels - c)
                        from_u = b * u_b + (g * channels + c) * u_c
                        from_grad = b * g_b + (g * channels + c) * g_c
                        from_delta = b * d_b + k * d_k + (g * channels + c) * d_c
                        states_at = ((((b * groups + g) * blocks + block + s) * K + k) * tiles + i) * N * LANES
                        _read(u, from_u, u_c, u_l, orders, order + t0, count, width, work, U)
                        _read(delta, from_delta, d_c, d_l, orders, order + t0, count, width, work, S)
                        _read(grad, from_grad, g_c, g_l, orders, order + t0, count, width, work, Q)
                        v_bias, v_skip = load(work, BIAS + s * LANES), load(work, SKIP + s * LANES)
                        for t in range(0, count * LANES, LANES):
                            step = load(work, S + t) + v_bias
                            if soft:
                                store(work, P + t, sigmoid(step))
                                step = softplus(step)
                            store(work, S + t, step)
                            store(work, X + t, step * load(work, U + t))
                            store(work, GX + t, nothing)
                            store(work, GS + t, nothing)
                        for t in range(count * LANES, (count + LANES - 1) // LANES * LANES * LANES, LANES):
                            store(work, SC + t, nothing)
                            store(work, SB + t, nothing)
                        for n in range(N):
                            own = (s * N + n) * LANES
                            a = load(work, AT + own)
                            at_B, at_C = from_B + n * B_n, from_C + n * C_n
                            h = load(starts, states_at + n * LANES)
                            store(work, HS, h)
                            for t in range(count):
                                o = t * LANES
                                e = exp(load(work, S + o) * a)
                                h = e * h + at(B, at_B + orders[order + t0 + t] * B_l) * load(work, X + o)
                                store(work, E + o, e)
                                store(work, HS + LANES + o, h)
                            gh, ga = load(work, GH + own), load(work, GA + own)
                            for t in range(count - 1, -1, -1):
                                o, place = t * LANES, orders[order + t0 + t]
                                q = load(work, Q + o)
                                gh = gh + at(C, at_C + place * C_l) * q
                                store(work, SC + o, q * load(work, HS + LANES + o))
                                store(work, SB + o, gh * load(work, X + o))
                                store(work, GX + o, load(work, GX + o) + gh * at(B, at_B + place * B_l))
                                gh = gh * load(work, E + o)
                                exponent = gh * load(work, HS + o)
                                ga = ga + exponent * load(work, S + o)
                                store(work, GS + o, load(work, GS + o) + exponent * a)
                            store(work, GH + own, gh)
                            store(work, GA + own, ga)
                            place = sums_at + n * tiles * TILE + t0
                            for t in range(0, count, LANES):
                                store(of_C, place + t, load(of_C, place + t) + sums(work, SC + t * LANES))
                                store(of_B, place + t, load(of_B, place + t) + sums(work, SB + t * LANES))
                        g_bias, g_skip = load(work, GBIAS + s * LANES), load(work, GSKIP + s * LANES)
                        for t in range(0, count * LANES, LANES):
                            x, q, gx = load(work, U + t), load(work, Q + t), load(work, GX + t)
                            g_step = load(work, GS + t) + gx * x
                            if soft:
                                g_step = g_step * load(work, P + t)
                            g_bias, g_skip = g_bias + g_step, g_skip + q * x
                            store(work, GS + t, g_step)
                            store(work, GX + t, gx * load(work, S + t) + q * v_skip)
                        store(work, GBIAS + s * LANES, g_bias)
                        store(work, GSKIP + s * LANES, g_skip)
                        to_u = b * o_b + (g * channels + c) * o_c
                        _write(of_u, to_u, o_c, o_l, orders, order + t0, count, width, work, GX, k > 0)
                        to_delta = b * p_b + k * p_k + (g * channels + c) * p_c
                        _write(of_delta, to_delta, p_c, p_l, orders, order + t0, count, width, work, GS, False)
                for j in range(channels_here):
                    for n in range(N):
                        of_A[(b * K * groups * channels + row + j) * N + n] = work[GA + (j // LANES * N + n) * LANES + j % LANES]
                    at_row = b * K * groups * channels + row + j
                    of_bias[at_row], of_skip[at_row] = work[GBIAS + j], work[GSKIP + j]
        task = take(given, 1)
