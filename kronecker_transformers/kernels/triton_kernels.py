"""The kernels of `triton_linear`, which says what they compute.

Strides are in entries, one for each index: x_t is that of x over t. NS, NQ and NR count small indices and terms; S2, Q2
and R2 are powers of two that hold them, for kernels that use them. SIZE, that of T, is for tuning only. ROWS, COLUMNS
and DEPTH are those of the tile of a GEMM.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["SIZE", "T"])
def mix_after(
    x, L, S, bias, y, other, partial, SIZE, T, P, K,
    x_t, x_s, x_k, l_p, l_r, l_k, s_q, s_r, s_s, y_t, y_q, y_p,
    NS: tl.constexpr, NQ: tl.constexpr, NR: tl.constexpr, S2: tl.constexpr, Q2: tl.constexpr, R2: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Accumulate sums over k of x[t, s, k] L[p, r, k] in rows (t, s) and columns (p, r).

    Then mix S into them, which gives y, or reduce them against `other`, of the layout of y, which gives parts (q, r, s)
    of the gradient of S, or do both.
    """
    BT: tl.constexpr = ROWS // S2
    BP: tl.constexpr = COLUMNS // R2
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    t, s = (tl.program_id(0) * BT + row // S2).to(tl.int64), row % S2
    p, r = tl.program_id(1) * BP + column // R2, column % R2
    x_at, x_in = x + (t * x_t + s * x_s)[:, None], ((t < T) & (s < NS))[:, None]
    l_at, l_in = L + (p * l_p + r * l_r)[None, :], ((p < P) & (r < NR))[None, :]
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, DEPTH):
        k = start + tl.arange(0, DEPTH)
        left = tl.load(x_at + (k * x_k)[None, :], x_in & (k < K)[None, :], 0.0)
        right = tl.load(l_at + (k * l_k)[:, None], l_in & (k < K)[:, None], 0.0)
        accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
    tile = tl.reshape(accumulator, (BT, S2, BP, R2))
    t, s = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64), tl.arange(0, S2)
    p, r = tl.program_id(1) * BP + tl.arange(0, BP), tl.arange(0, R2)
    at, inside = (t * y_t)[:, None] + (p * y_p)[None, :], (t < T)[:, None] & (p < P)[None, :]
    small = (s < NS)[:, None] & (r < NR)[None, :]
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    for q in tl.static_range(NQ):
        if y is not None:
            c = tl.load(S + q * s_q + (s * s_s)[:, None] + (r * s_r)[None, :], small, 0.0).to(tl.float32)
            mixed = tl.sum(tl.sum(tile * c[None, :, None, :], 3), 1)
            if bias is not None:
                mixed += tl.load(bias + q * y_q + p * y_p, p < P, 0.0).to(tl.float32)[None, :]
            tl.store(y + at + q * y_q, mixed.to(y.dtype.element_ty), inside)
        if other is not None:
            met = tl.load(other + at + q * y_q, inside, 0.0).to(tl.float32)
            part = tl.sum(tl.sum(tile * met[:, None, :, None], 2), 0)
            tl.store(partial + ((program * NQ + q) * NR + r[None, :]) * NS + s[:, None], part, small)


@triton.jit(do_not_specialize=["SIZE", "T"])
def mix_before(
    x, L, S, bias, y, SIZE, T, P, K,
    x_t, x_s, x_k, l_p, l_r, l_k, s_q, s_r, s_s, y_t, y_q, y_p,
    NS: tl.constexpr, NQ: tl.constexpr, NR: tl.constexpr, S2: tl.constexpr, Q2: tl.constexpr, R2: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Accumulate y in rows (t, q) and columns p; for each term, the rows of the left operand mix those of x with S."""
    BT: tl.constexpr = ROWS // Q2
    t, q = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64), tl.arange(0, Q2)
    p = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    for r in range(NR):
        for start in range(0, K, DEPTH):
            k = start + tl.arange(0, DEPTH)
            mixed = tl.zeros((BT, Q2, DEPTH), tl.float32)
            for s in tl.static_range(NS):
                inside = (t < T)[:, None] & (k < K)[None, :]
                part = tl.load(x + s * x_s + (t * x_t)[:, None] + (k * x_k)[None, :], inside, 0.0).to(tl.float32)
                c = tl.load(S + q * s_q + r * s_r + s * s_s, q < NQ, 0.0).to(tl.float32)
                mixed += part[:, None, :] * c[None, :, None]
            left = tl.reshape(mixed, (ROWS, DEPTH)).to(x.dtype.element_ty)
            inside = (k < K)[:, None] & (p < P)[None, :]
            right = tl.load(L + r * l_r + (k * l_k)[:, None] + (p * l_p)[None, :], inside, 0.0)
            accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
    row = tl.arange(0, ROWS)
    t, q = (tl.program_id(0) * BT + row // Q2).to(tl.int64), row % Q2
    inside = ((t < T) & (q < NQ))[:, None] & (p < P)[None, :]
    if bias is not None:
        accumulator += tl.load(bias + (q * y_q)[:, None] + (p * y_p)[None, :], inside, 0.0).to(tl.float32)
    tl.store(y + (t * y_t + q * y_q)[:, None] + (p * y_p)[None, :], accumulator.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["SIZE", "T", "SHARE"])
def large_gradient(
    u, v, S, partial, SIZE, T, P, K, SHARE,
    u_t, u_s, u_p, v_t, v_q, v_k, s_q, s_r, s_s, g_p, g_r, g_k,
    NS: tl.constexpr, NQ: tl.constexpr, NR: tl.constexpr, S2: tl.constexpr, Q2: tl.constexpr, R2: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Accumulate sums over t, q, s of S[q, r, s] u[t, s, p] v[t, q, k] in rows p and columns k, for a share of t."""
    BT: tl.constexpr = DEPTH // Q2
    blocks = tl.cdiv(P, ROWS)
    p = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    k = (tl.program_id(0) // blocks) * COLUMNS + tl.arange(0, COLUMNS)
    r, split = tl.program_id(1), tl.program_id(2)
    pair, q = tl.arange(0, DEPTH), tl.arange(0, Q2)
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(split * SHARE, tl.minimum((split + 1) * SHARE, T), BT):
        t = (start + tl.arange(0, BT)).to(tl.int64)
        mixed = tl.zeros((BT, Q2, ROWS), tl.float32)
        for s in tl.static_range(NS):
            inside = (t < T)[:, None] & (p < P)[None, :]
            part = tl.load(u + s * u_s + (t * u_t)[:, None] + (p * u_p)[None, :], inside, 0.0).to(tl.float32)
            c = tl.load(S + q * s_q + r * s_r + s * s_s, q < NQ, 0.0).to(tl.float32)
            mixed += part[:, None, :] * c[None, :, None]
        left = tl.trans(tl.reshape(mixed, (DEPTH, ROWS))).to(u.dtype.element_ty)
        t, other = (start + pair // Q2).to(tl.int64), pair % Q2
        inside = ((t < T) & (other < NQ))[:, None] & (k < K)[None, :]
        right = tl.load(v + (t * v_t + other * v_q)[:, None] + (k * v_k)[None, :], inside, 0.0)
        accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
    at = partial + split.to(tl.int64) * P * K * NR + r * g_r
    tl.store(at + (p * g_p)[:, None] + (k * g_k)[None, :], accumulator, (p < P)[:, None] & (k < K)[None, :])
