"""The row-tiled grouped GEMM: out[row] = A[row] @ W[expert of row]^T, with the layer's passes as its options.

    pass    A                      W (E, N, K)           epilogue
    up      x[token of row]        w1                    h = acc, a = act(h)
    down    a                      w2                    y = acc
    dh      dout[token of row]     w2^T                  v = acc; dh, weight * a, dweight from h
    dx      dh                     w1^T                  dx = acc
    shrink  any of these           factor                out = acc, of few columns

W is read where it lies, whichever of N and K is stored last. The first four take one more step of the
contraction, acc += X[row] @ V[expert of row]^T, a low-rank update; the first two a bias.

Legend: see moe.py; N output columns, K contraction, C parts of w1 of which a block computes the same columns
(2 for gates stored before ups, else 1), S tiles, NB column blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastexperts.activations import RELU2, Activation
from fastexperts.dtypes import accumulator
from fastexperts.errors import FastexpertsError
from fastexperts.kernels import hopper_mm, tiles
from fastexperts.kernels.combine import sum_dweight
from fastexperts.kernels.epilogues import halves, store_act, store_dact, store_plain
from fastexperts.kernels.launch import Plan, cdiv, planned
from fastexperts.kernels.operands import operand, packed, precision, processors, tl_accumulator
from fastexperts.kernels.tiles import narrowed
from fastexperts.routing import Routing, schedule_length
from fastexperts.weights import Step


@triton.jit
def _load_w(
    W, i_e, n0, k0, N, K, stride_e, stride_c, stride_n, stride_k,
    BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    TMA: tl.constexpr, KN: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """Block [BK, PARTS * BN] of an expert, parts side by side; zero behind K. KN: W is stored N last."""
    if TMA:
        if KN:
            return W.load([i_e, 0, k0, n0]).reshape(BK, BN)
        else:
            return W.load([i_e, 0, n0, k0]).reshape(PARTS * BN, BK).T
    else:
        o_k = k0 + tl.arange(0, BK)
        o_c = tl.arange(0, PARTS * BN)
        o_n = n0 + (o_c % BN if PARTS > 1 else o_c)
        p_n = o_n.to(tl.int64) * stride_n
        if PARTS > 1:
            p_n += (o_c // BN).to(tl.int64) * stride_c
        p_w = W + i_e.to(tl.int64) * stride_e + p_n[None, :] + o_k[:, None].to(tl.int64) * stride_k
        # masks and not clamps: a clamp hides from the compiler that columns are adjacent
        if EVEN_K and EVEN_N:
            return tl.load(p_w)
        else:
            return tl.load(p_w, mask=(o_n < N)[None, :] & (o_k < K)[:, None], other=0.0)


@triton.jit
def _load_v(p_v, n0, o_r, N, R, BN: tl.constexpr, PARTS: tl.constexpr, RN: tl.constexpr):
    """Block [BR, PARTS * BN] of an expert's share of the further step, parts N apart; zero behind R. RN: it
    is stored N last.
    """
    o_c = tl.arange(0, PARTS * BN)
    o_n = n0 + (o_c % BN if PARTS > 1 else o_c)
    if RN:
        o_v = o_r[:, None] * N + o_n[None, :]
    else:
        o_v = ((o_c // BN * N if PARTS > 1 else 0) + o_n)[None, :] * R + o_r[:, None]
    return tl.load(p_v + o_v, mask=(o_n < N)[None, :] & (o_r < R)[:, None], other=0.0)


@triton.jit(do_not_specialize=["num_rows"])
def _grouped_mm(
    A,  # descriptor or pointer: [rows or T, K]
    W,  # descriptor or pointer: (E, C, N, K), or (E, C, K, N) with KN
    p_out,  # [P, N]: y, a or weight * a
    p_h,  # [P, G]: out of "act", in of "dact"
    p_dh,  # [P, G]: out of "dact"
    p_weight,  # [P] by pair
    p_dweight,  # [NB, P] by row: partial sums
    X,  # [P, R]: rows of one more step
    V,  # (E, C, N, R), or (E, R, N) with V_RN
    p_pair_of_row,  # [P]
    p_schedule,  # [S, 3]
    p_bias,  # [E, C * N]
    stride_a, stride_we, stride_wc, stride_wn, stride_wk, N, K, num_rows,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, KN: tl.constexpr, EPILOGUE: tl.constexpr,
    STORE_H: tl.constexpr, STORE_OUT: tl.constexpr, STORE_DWEIGHT: tl.constexpr, ACT: tl.constexpr,
    BIAS: tl.constexpr, SPREAD: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, V_RN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    FLATTEN: tl.constexpr, SUBTILES: tl.constexpr, A_TMA: tl.constexpr, W_TMA: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (programs,), persistent: each program owns every programs-th output block [BM rows of one expert,
    BN].

    EPILOGUE "act" of a gated ACT computes gate and up of its block. Rows behind an expert's end are computed
    from whatever lies there and not stored.
    """
    # gate and up of a block: two parts of W, or one part twice as wide
    PARTS: tl.constexpr = 2 if EPILOGUE == "act" and ACT.gated and not ACT.interleaved else 1
    WIDTH: tl.constexpr = 2 if ACT.gated else 1
    num_n = tl.cdiv(N, BN)
    num_m = tl.load(p_schedule)
    for i_tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        # GROUP row tiles walk the columns together, so that A and W blocks meet in L2
        first_m = i_tile // (GROUP * num_n) * GROUP
        size_m = tl.minimum(num_m - first_m, GROUP)
        i_m = first_m + i_tile % (GROUP * num_n) % size_m
        i_n = i_tile % (GROUP * num_n) // size_m
        p_tile = p_schedule + 3 + 3 * i_m
        i_e = tl.load(p_tile)
        row0 = tl.load(p_tile + 1)
        n0 = i_n * BN

        o_m = row0 + tl.arange(0, BM)
        m_m = o_m < tl.load(p_tile + 2)
        if GATHER:
            token = tl.load(p_pair_of_row + o_m, mask=m_m, other=0) // TOP_K
            p_a = A + token.to(tl.int64) * stride_a
        elif not A_TMA:
            p_a = A + tl.where(m_m, o_m, row0).to(tl.int64) * stride_a

        acc = tl.zeros([BM, PARTS * SPREAD * BN], ACC)
        for k0 in range(0, K, BK):
            if A_TMA:
                a = A.load([row0, k0])
            else:
                o_k = k0 + tl.arange(0, BK)
                if EVEN_K:
                    a = tl.load(p_a[:, None] + o_k[None, :])
                else:
                    a = tl.load(p_a[:, None] + o_k[None, :], mask=o_k[None, :] < K, other=0.0)
            w = _load_w(
                W, i_e, SPREAD * n0, k0, SPREAD * N, K, stride_we, stride_wc, stride_wn, stride_wk,
                SPREAD * BN, BK, PARTS, W_TMA, KN, EVEN_K, EVEN_N,
            )  # fmt: skip
            acc = tl.dot(a, w, acc, input_precision=PRECISION, out_dtype=ACC)

        if R > 0:
            p_v = V + i_e.to(tl.int64) * (PARTS * SPREAD * N * R)
            for r0 in tl.static_range(0, R, BR):
                o_r = r0 + tl.arange(0, BR)
                p_x = X + tl.where(m_m, o_m, row0).to(tl.int64)[:, None] * R + o_r[None, :]
                x = tl.load(p_x, mask=(o_r < R)[None, :], other=0.0)
                v = _load_v(p_v, SPREAD * n0, o_r, SPREAD * N, R, SPREAD * BN, PARTS, V_RN)
                acc = tl.dot(x, v, acc, input_precision=PRECISION, out_dtype=ACC)
        if BIAS:
            o_c = tl.arange(0, PARTS * SPREAD * BN)
            o_n = SPREAD * n0 + o_c % (SPREAD * BN)
            p_b = p_bias + i_e * (PARTS * SPREAD * N) + o_c // (SPREAD * BN) * N + o_n
            acc += tl.load(p_b, mask=o_n < SPREAD * N, other=0.0).to(ACC)[None, :]

        p_out_m = p_out + row0.to(tl.int64) * N
        p_h_m = p_h + row0.to(tl.int64) * (WIDTH * N)
        if EPILOGUE == "none":
            store_plain(acc, p_out_m, n0, N, m_m, SUBTILES)
        elif EPILOGUE == "act":
            if SPREAD > 1:
                g, u = acc.reshape(BM, BN, 2).split()
            elif PARTS > 1:
                g, u = halves(acc)
            else:
                g, u = acc, acc
            store_act(g, u, p_out_m, p_h_m, n0, N, m_m, STORE_H, ACT, SUBTILES)
        else:
            pair = tl.load(p_pair_of_row + o_m, mask=m_m, other=0)
            weight = tl.load(p_weight + pair, mask=m_m, other=0.0).to(ACC)
            p_dh_m = p_dh + row0.to(tl.int64) * (WIDTH * N)
            dweight = store_dact(
                acc, p_out_m, p_h_m, p_dh_m, weight, n0, N, m_m, STORE_OUT, STORE_H, ACT, SUBTILES
            )
            if STORE_DWEIGHT:
                tl.store(p_dweight + i_n.to(tl.int64) * num_rows + o_m, dweight, mask=m_m)


def _product_view(w: Tensor, name: str, activation: Activation | None) -> tuple[Tensor, bool]:
    """(w of pass `name` as (E, C, N, K), False), or as (E, C, K, N) and True where N is stored last."""
    w_EC__ = w[:, None]
    if name in ("dh", "dx"):
        w_EC__ = w_EC__.mT
    elif name == "up" and activation is not None and activation.gated and not activation.interleaved:
        w_EC__ = w.unflatten(1, (2, -1))
    kn = w_EC__.stride(3) != 1 and w_EC__.stride(2) == 1
    return w_EC__.mT if kn else w_EC__, kn


@planned
def _plan(
    a: Tensor,
    w: Tensor,
    out_PN: Tensor | None,
    h_PG: Tensor | None,
    dh_PG: Tensor | None,
    weight_TK: Tensor | None,
    more_rows_PR: Tensor | None,
    more_w: Tensor | None,
    bias_EN: Tensor | None,
    *,
    name: str,
    gather: bool,
    top_k: int,
    activation: Activation | None,
    store_dweight: bool,
) -> Plan:
    """Pass `name` of the table above: descriptors where possible, the tile of tiles.py. None is not asked
    for.
    """
    w_EC__, kn = _product_view(w, name, activation)
    _, parts, *dims = w_EC__.shape
    dim_k, dim_n = dims if kn else dims[::-1]
    spread = 2 if name == "up" and activation is not None and activation.interleaved else 1
    dim_n //= spread
    options = dict(
        TOP_K=top_k, GATHER=gather, KN=kn, EPILOGUE={"up": "act", "dh": "dact"}.get(name, "none"),
        STORE_H=(h_PG if name == "up" else dh_PG) is not None, STORE_OUT=out_PN is not None,
        STORE_DWEIGHT=store_dweight, ACT=activation or RELU2, BIAS=bias_EN is not None, SPREAD=spread,
    )  # fmt: skip
    more = None
    if more_rows_PR is not None and more_w is not None:
        more_EC__ = more_w.unflatten(1, (parts, -1)) if parts > 1 else more_w[:, None]
        more = Step(more_rows_PR, more_EC__)
    part_n = 2 * dim_n if activation is not None and activation.interleaved else dim_n
    turned = more is not None and kn != (name in ("dh", "dx"))  # an update that is not stored as W is
    ours = not turned and name != "shrink"
    if ours and hopper_mm.serves(a, w_EC__, out_PN, h_PG, dh_PG, more, part_n, gather=gather):
        return hopper_mm.plan(name, a, w_EC__, out_PN, h_PG, dh_PG, more, dim_k, dim_n, options)
    tile = tiles.tile(a.device, a.dtype, name)
    if name == "shrink":
        tile = narrowed(tile, n=dim_n)
    rank, columns = more.rows_PR.shape[1] if more else 0, spread * tile.n
    a_view = None if gather else operand(a, [tile.m, tile.k])
    if not kn:
        w_view = operand(w_EC__, [1, parts, columns, tile.k])
    else:  # parts side by side in shared memory would have to be moved
        w_view = operand(w_EC__, [1, 1, tile.k, columns]) if parts == 1 else None
    stride_e, stride_c, *inner = w_EC__.stride()
    stride_k, stride_n = inner if kn else inner[::-1]
    return Plan(
        _grouped_mm,
        (a_view, w_view, *(None,) * 10),
        (a.stride(0), stride_e, stride_c, stride_n, stride_k, dim_n, dim_k),
        dict(
            options, R=rank, BR=min(64, triton.next_power_of_2(max(16, rank))),
            V_RN=name in ("dh", "dx"),
            BM=tile.m, BN=tile.n, BK=tile.k, GROUP=tile.group, FLATTEN=tile.flatten,
            SUBTILES=tile.subtiles, A_TMA=a_view is not None, W_TMA=w_view is not None,
            EVEN_K=dim_k % tile.k == 0, EVEN_N=dim_n % tile.n == 0,
            ACC=tl_accumulator(a.dtype), PRECISION=precision(a.dtype),
        ),
        blocks=cdiv(dim_n, tile.n),
        most_programs=processors(a.device) * tile.programs_per_sm,
        warps=tile.warps,
        stages=tile.stages,
    )  # fmt: skip


def _launch(
    name: str,
    a: Tensor,
    w: Tensor,
    out_PN: Tensor | None,
    routing: Routing,
    *,
    activation: Activation | None = None,
    h_PG: Tensor | None = None,
    dh_PG: Tensor | None = None,
    weight_TK: Tensor | None = None,
    partial_NP: Tensor | None = None,
    more: Step | None = None,
    bias_EN: Tensor | None = None,
    gather: bool = False,
) -> None:
    """Launch pass `name`. w: w1_EGD, w2_EDF or a factor, as stored. gather: `a` holds tokens. None: not asked
    for.
    """
    pair_of_row_P, schedule_S3 = routing.pair_of_row_P, routing.schedule_S3
    rows = routing.num_pairs
    if rows == 0:
        return
    operands = (packed(a), w, out_PN, h_PG, dh_PG, weight_TK)
    extra = more or (None, None)
    plan = _plan(
        *operands, *extra, bias_EN, name=name, gather=gather, top_k=routing.top_k, activation=activation,
        store_dweight=partial_NP is not None,
    )  # fmt: skip
    block_m, length = plan.constants["BM"], schedule_S3.shape[0]
    if length != schedule_length(rows, w.shape[0], block_m):
        raise FastexpertsError(
            f"fastexperts: `schedule` of {length} tiles got tiles of {block_m} rows; it needs "
            "those of the backend that routed. Leave FASTEXPERTS_BACKEND alone between a forward and its "
            "backward."
        )
    # the schedule stands in for what is not asked for
    every = (*operands, partial_NP, *extra, pair_of_row_P, schedule_S3, bias_EN)
    tensors = tuple(schedule_S3 if t is None else t for t in every)
    plan((plan.programs(length - 1),), tensors, rows)


def up(
    x_TD: Tensor,
    w1_EGD: Tensor,
    bias_EG: Tensor | None,
    routing: Routing,
    activation: Activation,
    keep_h: bool,
    more: Step | None = None,
) -> tuple[Tensor, Tensor]:
    """See backend.Backend."""
    rows, dim_g = routing.num_pairs, w1_EGD.shape[1]
    h_PG, a_PF = (
        x_TD.new_empty((rows if keep_h else 0, dim_g)),
        x_TD.new_empty(rows, dim_g // activation.parts),
    )
    _launch(
        "up", x_TD, w1_EGD, a_PF, routing, activation=activation, h_PG=h_PG if keep_h else None, more=more,
        bias_EN=_contiguous(bias_EG), gather=True,
    )  # fmt: skip
    return h_PG, a_PF


def down(
    a_PF: Tensor, w2_EDF: Tensor, bias_ED: Tensor | None, routing: Routing, more: Step | None = None
) -> Tensor:
    """See backend.Backend."""
    y_PD = a_PF.new_empty((a_PF.shape[0], w2_EDF.shape[1]))
    _launch("down", a_PF, w2_EDF, y_PD, routing, more=more, bias_EN=_contiguous(bias_ED))
    return y_PD


def _contiguous(bias_EN: Tensor | None) -> Tensor | None:
    return None if bias_EN is None else bias_EN.contiguous()


def dx(dh_PG: Tensor, w1_EGD: Tensor, routing: Routing, more: Step | None = None) -> Tensor:
    """See backend.Backend."""
    dx_PD = dh_PG.new_empty((dh_PG.shape[0], w1_EGD.shape[2]))
    _launch("dx", dh_PG, w1_EGD, dx_PD, routing, more=more)
    return dx_PD


def shrink(rows: Tensor, factor_ERK: Tensor, routing: Routing, tokens: bool) -> Tensor:
    """See backend.Backend."""
    rows_PR = rows.new_empty((routing.num_pairs, factor_ERK.shape[1]))
    _launch("shrink", rows, factor_ERK, rows_PR, routing, gather=tokens)
    return rows_PR


def dh(
    dout_TD: Tensor,
    w2_EDF: Tensor,
    h_PG: Tensor,
    weight_TK: Tensor,
    routing: Routing,
    activation: Activation,
    needs: tuple[bool, bool, bool],
    more: Step | None = None,
    plus_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See backend.Backend."""
    need_dh, need_wa, need_dweight = needs
    (rows, dim_g), dim_f = h_PG.shape, w2_EDF.shape[2]
    wa_PF = h_PG.new_empty((rows if need_wa else 0, dim_f))
    dh_PG = h_PG.new_empty((rows if need_dh else 0, dim_g))
    # the ring's blocks are as wide as the table's: tiles.RINGS
    blocks = cdiv(dim_f, tiles.tile(h_PG.device, h_PG.dtype, "dh").n)
    partial_NP = h_PG.new_empty((blocks if need_dweight else 0, rows), dtype=accumulator(h_PG.dtype))
    _launch(
        "dh", dout_TD, w2_EDF, wa_PF if need_wa else None, routing, activation=activation, h_PG=h_PG,
        dh_PG=dh_PG if need_dh else None, weight_TK=weight_TK.contiguous(),
        partial_NP=partial_NP if need_dweight else None, more=more, gather=True,
    )  # fmt: skip
    dweight_TK = (
        sum_dweight(partial_NP, plus_TK, routing, weight_TK) if need_dweight else weight_TK[:0].clone()
    )
    return dh_PG, wa_PF, dweight_TK
