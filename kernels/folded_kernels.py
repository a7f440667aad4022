"""The Triton kernels of LoRA that is folded beside its weights; lora_folded.py has the maths and launches them.

Dropout's arguments (keys, places, number, threshold, inverse) are those of `Mask` there.
"""

from ptst.kernels.dispatch import jit, tl


@jit
def _kept(keys, places, number, threshold, t, here, at, BT: tl.constexpr, BN: tl.constexpr):
    """What dropout's mask keeps, (BT, BN), of tokens t and columns from `at`, a multiple of 4: Philox4x32 with the
    document's seed as its key counts tokens of the document, fours of columns and places."""
    key, place = tl.load(keys + t, mask=here, other=0)[:, None], tl.load(places + t, mask=here, other=0)[:, None]
    four = (at // 4 + tl.arange(0, BN // 4))[None, :] + tl.zeros([BT, 1], tl.int32)
    nothing = tl.zeros([BT, BN // 4], tl.int32)
    a, b, c, d = tl.philox(key + nothing.to(tl.int64), place + nothing, four, number + nothing, nothing)
    drawn = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return drawn >= tl.cast(threshold, tl.uint32)


@jit
def norm_shrink(
    x, w, a, out, z, r, x_row, out_row, T, N, R, eps, keys, places, number, threshold, inverse, DROP: tl.constexpr,
    IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out (T, N + R) = [n | n a^T] with n = x r w; z its last R columns again; r the norm's statistic."""
    t, n, k = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BN), tl.arange(0, BR)
    here, ranks = (t < T)[:, None], k < R
    rows, to = x + t.to(tl.int64)[:, None] * x_row, out + t.to(tl.int64)[:, None] * out_row
    squares = tl.zeros([BT], tl.float32)
    for at in range(0, N, BN):
        xs = tl.load(rows + (at + n)[None, :], mask=here & (at + n < N)[None, :], other=0.0).to(tl.float32)
        squares += tl.sum(xs * xs, axis=1)
    rstd = 1.0 / tl.sqrt(squares / N + eps)
    tl.store(r + t, rstd, mask=t < T)
    total = tl.zeros([BT, BR], tl.float32)
    for at in range(0, N, BN):
        inside = at + n < N
        xs = tl.load(rows + (at + n)[None, :], mask=here & inside[None, :], other=0.0).to(tl.float32)
        scaled = xs * rstd[:, None] * tl.load(w + at + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        ns = scaled.to(out.dtype.element_ty)
        tl.store(to + (at + n)[None, :], ns, mask=here & inside[None, :])
        part = tl.load(a + k[None, :] * N + (at + n)[:, None], mask=ranks[None, :] & inside[:, None], other=0.0)
        if DROP:
            ns = tl.where(_kept(keys, places, number, threshold, t, t < T, at, BT, BN), ns, 0.0)
        total += tl.dot(ns, part, input_precision="ieee" if IEEE else "tf32")
    zs = (total * inverse if DROP else total).to(out.dtype.element_ty)
    tl.store(to + N + k[None, :], zs, mask=here & ranks[None, :])
    tl.store(z + t.to(tl.int64)[:, None] * R + k[None, :], zs, mask=here & ranks[None, :])


@jit
def swiglu_shrink(
    gate_up, a, out, z, in_row, out_row, T, F, R, keys, places, number, threshold, inverse, DROP: tl.constexpr,
    IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out (T, F + R) = [h | h a^T] with h = silu(gate) up; z its last R columns again."""
    t, n, k = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BN), tl.arange(0, BR)
    here, ranks = (t < T)[:, None], k < R
    rows, to = gate_up + t.to(tl.int64)[:, None] * in_row, out + t.to(tl.int64)[:, None] * out_row
    total = tl.zeros([BT, BR], tl.float32)
    for at in range(0, F, BN):
        inside = at + n < F
        g = tl.load(rows + (at + n)[None, :], mask=here & inside[None, :], other=0.0).to(tl.float32)
        u = tl.load(rows + F + (at + n)[None, :], mask=here & inside[None, :], other=0.0).to(tl.float32)
        # Masked, though zero already where nothing was loaded: or else the compiler computes h anew in the layout of
        # the product's operand, once for each warp that holds a copy of it.
        hs = tl.where(here & inside[None, :], g * tl.sigmoid(g) * u, 0.0).to(out.dtype.element_ty)
        tl.store(to + (at + n)[None, :], hs, mask=here & inside[None, :])
        part = tl.load(a + k[None, :] * F + (at + n)[:, None], mask=ranks[None, :] & inside[:, None], other=0.0)
        if DROP:
            hs = tl.where(_kept(keys, places, number, threshold, t, t < T, at, BT, BN), hs, 0.0)
        total += tl.dot(hs, part, input_precision="ieee" if IEEE else "tf32")
    zs = (total * inverse if DROP else total).to(out.dtype.element_ty)
    tl.store(to + F + k[None, :], zs, mask=here & ranks[None, :])
    tl.store(z + t.to(tl.int64)[:, None] * R + k[None, :], zs, mask=here & ranks[None, :])


@jit
def add_product(
    y, base, z, b, out, y_row, base_row, z_row, b_row, b_col, T, N, R, keys, places, number, threshold, inverse,
    DROP: tl.constexpr, PLUS: tl.constexpr, IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out (T, N) = y + z b^T, the product with DROP times the mask, and with PLUS + base."""
    t, n = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BN + tl.arange(0, BN)
    k, row, here = tl.arange(0, BR), t.to(tl.int64)[:, None], (t < T)[:, None] & (n < N)[None, :]
    total = tl.load(y + row * y_row + n[None, :], mask=here, other=0.0).to(tl.float32)
    if PLUS:
        total += tl.load(base + row * base_row + n[None, :], mask=here, other=0.0).to(tl.float32)
    zs = tl.load(z + row * z_row + k[None, :], mask=(t < T)[:, None] & (k < R)[None, :], other=0.0)
    bs = tl.load(b + k[:, None] * b_col + n[None, :] * b_row, mask=(k < R)[:, None] & (n < N)[None, :], other=0.0)
    added = tl.dot(zs, bs, input_precision="ieee" if IEEE else "tf32")
    if DROP:
        kept = _kept(keys, places, number, threshold, t, t < T, tl.program_id(1) * BN, BT, BN)
        added *= tl.where(kept, inverse, 0.0)
    tl.store(out + row * N + n[None, :], (total + added).to(out.dtype.element_ty), mask=here)


@jit
def norm_backward(
    d, x, w, r, a, dtotal, dx, d_row, x_row, T, N, R, keys, places, number, threshold, inverse, DROP: tl.constexpr,
    ADD: tl.constexpr, IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx (T, N) of n = x r w from d (T, N + R) = [dn' | e] with dn = dn' + e a, and with ADD + dtotal."""
    t, n, k = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BN), tl.arange(0, BR)
    row, there, ranks = t.to(tl.int64)[:, None], (t < T)[:, None], k < R
    rstd = tl.load(r + t, mask=t < T, other=0.0)[:, None]
    es = tl.load(d + row * d_row + N + k[None, :], mask=there & ranks[None, :], other=0.0)
    along = tl.zeros([BT], tl.float32)
    for at in range(0, N, BN):
        inside = at + n < N
        part = tl.load(a + k[:, None] * N + (at + n)[None, :], mask=ranks[:, None] & inside[None, :], other=0.0)
        ds = tl.load(d + row * d_row + (at + n)[None, :], mask=there & inside[None, :], other=0.0).to(tl.float32)
        added = tl.dot(es, part, input_precision="ieee" if IEEE else "tf32")
        if DROP:
            added *= tl.where(_kept(keys, places, number, threshold, t, t < T, at, BT, BN), inverse, 0.0)
        ds += added
        ns = tl.load(x + row * x_row + (at + n)[None, :], mask=there & inside[None, :], other=0.0).to(tl.float32) * rstd
        along += tl.sum(ds * tl.load(w + at + n, mask=inside, other=0.0).to(tl.float32)[None, :] * ns, axis=1)
    mean = (along / N)[:, None]
    for at in range(0, N, BN):
        inside = at + n < N
        here = there & inside[None, :]
        part = tl.load(a + k[:, None] * N + (at + n)[None, :], mask=ranks[:, None] & inside[None, :], other=0.0)
        ds = tl.load(d + row * d_row + (at + n)[None, :], mask=here, other=0.0).to(tl.float32)
        added = tl.dot(es, part, input_precision="ieee" if IEEE else "tf32")
        if DROP:
            added *= tl.where(_kept(keys, places, number, threshold, t, t < T, at, BT, BN), inverse, 0.0)
        ds += added
        ns = tl.load(x + row * x_row + (at + n)[None, :], mask=here, other=0.0).to(tl.float32) * rstd
        out = rstd * (ds * tl.load(w + at + n, mask=inside, other=0.0).to(tl.float32)[None, :] - ns * mean)
        if ADD:
            out += tl.load(dtotal + row * N + (at + n)[None, :], mask=here, other=0.0).to(tl.float32)
        tl.store(dx + row * N + (at + n)[None, :], out.to(dx.dtype.element_ty), mask=here)


@jit
def swiglu_backward(
    d, gate_up, a, z, out, parts, d_row, in_row, part, T, F, R, Z, GATE, UP, share, scale, keys, places, number,
    threshold, inverse, DROP: tl.constexpr, IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    BZ: tl.constexpr,
):  # fmt: skip
    """out (T, 2F) = the gradients of gate and up from d (T, F + R) = [dh' | e] with dh = dh' + e a; and over the p-th
    share of tokens parts[p] = e^T h (R, F), then scale dgate^T z (F, GATE), then scale dup^T z (F, UP)."""
    first = tl.program_id(0) * BN
    n, t, k, j = first + tl.arange(0, BN), tl.arange(0, BT), tl.arange(0, BR), tl.arange(0, BZ)
    inside, ranks = n < F, k < R
    low = tl.program_id(1) * share
    high = tl.minimum(low + share, T)
    weight = tl.load(a + k[:, None] * F + n[None, :], mask=ranks[:, None] & inside[None, :], other=0.0)
    of_a = tl.zeros([BR, BN], tl.float32)
    of_gate, of_up = tl.zeros([BZ, BN], tl.float32), tl.zeros([BZ, BN], tl.float32)
    for at in range(low, high, BT):
        row, there = (at + t).to(tl.int64)[:, None], (at + t < high)[:, None]
        here = there & inside[None, :]
        es = tl.load(d + row * d_row + F + k[None, :], mask=there & ranks[None, :], other=0.0)
        dh = tl.load(d + row * d_row + n[None, :], mask=here, other=0.0).to(tl.float32)
        added = tl.dot(es, weight, input_precision="ieee" if IEEE else "tf32")
        if DROP:
            kept = _kept(keys, places, number, threshold, at + t, at + t < high, first, BT, BN)
            added *= tl.where(kept, inverse, 0.0)
        dh += added
        g = tl.load(gate_up + row * in_row + n[None, :], mask=here, other=0.0).to(tl.float32)
        u = tl.load(gate_up + row * in_row + F + n[None, :], mask=here, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        dup, dgate = (dh * g * s).to(es.dtype), (dh * u * s * (1.0 + g * (1.0 - s))).to(es.dtype)
        tl.store(out + row * (2 * F) + n[None, :], dgate, mask=here)
        tl.store(out + row * (2 * F) + F + n[None, :], dup, mask=here)
        h = (g * s * u).to(es.dtype)
        if DROP:
            h = tl.where(kept, h, 0.0)
        of_a += tl.dot(tl.trans(es), h, input_precision="ieee" if IEEE else "tf32")
        zg = tl.load(z + row * Z + j[None, :], mask=there & (j < GATE)[None, :], other=0.0)
        zu = tl.load(z + row * Z + GATE + j[None, :], mask=there & (j < UP)[None, :], other=0.0)
        of_gate += tl.dot(tl.trans(zg), dgate, input_precision="ieee" if IEEE else "tf32")
        of_up += tl.dot(tl.trans(zu), dup, input_precision="ieee" if IEEE else "tf32")
    if DROP:
        of_a *= inverse
    to = parts + tl.program_id(1).to(tl.int64) * part
    tl.store(to + k[:, None] * F + n[None, :], of_a, mask=ranks[:, None] & inside[None, :])
    to += R * F
    tl.store(to + n[None, :] * GATE + j[:, None], of_gate * scale, mask=(j < GATE)[:, None] & inside[None, :])
    to += F * GATE
    tl.store(to + n[None, :] * UP + j[:, None], of_up * scale, mask=(j < UP)[:, None] & inside[None, :])


@jit
def _reduce(
    left, right, r, w, to, left_row, right_row, out_r, out_n, one, low, high, N, R, scale, keys, places, number,
    threshold, inverse, DROP: tl.constexpr, NORM: tl.constexpr, IEEE: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A block, `one`, of scale left^T right (R, N) over tokens low to high, into `to`; with NORM of right r w, with
    DROP of right times the mask."""
    blocks = (N + BN - 1) // BN
    first = one % blocks * BN
    n, k, t = first + tl.arange(0, BN), one // blocks * BR + tl.arange(0, BR), tl.arange(0, BT)
    total = tl.zeros([BR, BN], tl.float32)
    for at in range(low, high, BT):
        row, there = (at + t).to(tl.int64)[:, None], (at + t < high)[:, None]
        ls = tl.load(left + row * left_row + k[None, :], mask=there & (k < R)[None, :], other=0.0)
        rs = tl.load(right + row * right_row + n[None, :], mask=there & (n < N)[None, :], other=0.0)
        if NORM:
            rstd = tl.load(r + at + t, mask=at + t < high, other=0.0)[:, None]
            weight = tl.load(w + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            rs = (rs.to(tl.float32) * rstd * weight).to(right.dtype.element_ty)
        if DROP:
            kept = _kept(keys, places, number, threshold, at + t, at + t < high, first, BT, BN)
            rs = (rs.to(tl.float32) * tl.where(kept, inverse, 0.0)).to(right.dtype.element_ty)
        total += tl.dot(tl.trans(ls), rs, input_precision="ieee" if IEEE else "tf32")
    at = to + k[:, None] * out_r + n[None, :] * out_n
    tl.store(at, total * scale, mask=(k < R)[:, None] & (n < N)[None, :])


@jit
def gradients(
    e, x, r, w, parts, e_row, x_row, part, T, N, R, share, scale, z, z_row, d1, d2, d3, d1_row, d2_row, d3_row, N1,
    N2, N3, R1, R2, R3, keys, places, number, threshold, inverse, DROP: tl.constexpr, NORM: tl.constexpr,
    IEEE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Over the p-th share of tokens parts[p] = e^T x (R, N), then scale d^T z (N1, R1), (N2, R2), (N3, R3), with z's
    columns in that order."""
    one = tl.program_id(0)
    low = tl.program_id(1) * share
    high = tl.minimum(low + share, T)
    to = parts + tl.program_id(1).to(tl.int64) * part
    blocks = (N + BN - 1) // BN * ((R + BR - 1) // BR)
    blocks1 = blocks + (N1 + BN - 1) // BN * ((R1 + BR - 1) // BR)
    blocks2 = blocks1 + (N2 + BN - 1) // BN * ((R2 + BR - 1) // BR)
    if one < blocks:
        _reduce(e, x, r, w, to, e_row, x_row, N, 1, one, low, high, N, R, 1.0,
                keys, places, number, threshold, inverse, DROP, NORM, IEEE, BT, BN, BR)  # fmt: skip
    elif one < blocks1:
        to += R * N
        _reduce(z, d1, r, w, to, z_row, d1_row, 1, R1, one - blocks, low, high, N1, R1, scale,
                keys, places, number, threshold, inverse, False, False, IEEE, BT, BN, BR)  # fmt: skip
    elif one < blocks2:
        to += R * N + N1 * R1
        _reduce(z + R1, d2, r, w, to, z_row, d2_row, 1, R2, one - blocks1, low, high, N2, R2, scale,
                keys, places, number, threshold, inverse, False, False, IEEE, BT, BN, BR)  # fmt: skip
    else:
        to += R * N + N1 * R1 + N2 * R2
        _reduce(z + R1 + R2, d3, r, w, to, z_row, d3_row, 1, R3, one - blocks2, low, high, N3, R3, scale,
                keys, places, number, threshold, inverse, False, False, IEEE, BT, BN, BR)  # fmt: skip


@jit
def shrink_dropped(
    x, a, z, x_row, T, N, R, keys, places, number, threshold, inverse, IEEE: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """z (T, R) = (x mask) a^T."""
    t, n, k = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BN), tl.arange(0, BR)
    total = tl.zeros([BT, BR], tl.float32)
    for at in range(0, N, BN):
        inside = at + n < N
        here = (t < T)[:, None] & inside[None, :]
        xs = tl.load(x + t.to(tl.int64)[:, None] * x_row + (at + n)[None, :], mask=here, other=0.0)
        part = tl.load(a + k[None, :] * N + (at + n)[:, None], mask=(k < R)[None, :] & inside[:, None], other=0.0)
        xs = tl.where(_kept(keys, places, number, threshold, t, t < T, at, BT, BN), xs, 0.0)
        total += tl.dot(xs, part, input_precision="ieee" if IEEE else "tf32")
    to = z + t.to(tl.int64)[:, None] * R + k[None, :]
    tl.store(to, (total * inverse).to(z.dtype.element_ty), mask=(t < T)[:, None] & (k < R)[None, :])
