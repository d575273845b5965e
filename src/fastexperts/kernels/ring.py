"""What the Hopper kernels share, in Gluon: a ring of slots in shared memory between warps with roles.

One program per SM computes output blocks [BM, BN], in their order, each as soon as it is free (`claim`):
neighbours run at the same time and share their operands in L2, whatever the blocks before them took. A
producer fills the ring, a slot per step of the contraction: through the copy engine (TMA), gathered rows by
cp.async. Two consumers of four warps own 64 rows of the block each and multiply from the ring; they drift
apart up to its depth, so that one's epilogue runs beside the other's products. Results leave through
`staging` and the copy engine.

An expert's rows end where the next one's begin, and no block has to know: a "ragged" descriptor moves the
expert's end to the tensor's bound, where the hardware reads zeros and drops writes (the idea of
triton.tools.ragged_tma: coordinates whose 64-bit addresses wrap around).

Barriers: `full` of a slot counts its copies, `empty` its consumers. Slots hold bf16 or fp16, sums are fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastexperts import settings
from fastexperts.kernels.launch import FAR, Described
from fastexperts.kernels.operands import describable

CONSUMERS = gl.constexpr(2)
CONSUMER_WARPS = 4
REGISTERS = gl.constexpr(504)  # a thread of each of the three warp groups, together
BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
SLICE = gl.constexpr(64)  # columns of an epilogue's step: 128 bytes of bf16, the swizzle's width
CLAIM, CLAIM_SLOTS = gl.constexpr(128), gl.constexpr(2)  # integers of a slot: one a thread of four warps
END = gl.constexpr(FAR)  # bound of a ragged descriptor's rows


def available(*tensors: Tensor) -> bool:
    """Whether these operands of one dtype go through the ring: two bytes, on Hopper, with strides for the
    copy engine.
    """
    return (
        settings.allow_tma()
        and _is_hopper(tensors[0].device)
        and tensors[0].dtype in (torch.bfloat16, torch.float16)
        and all(
            t.dtype == tensors[0].dtype and t.shape[0] <= END.value and (t.shape[0] == 0 or describable(t))
            for t in tensors
        )
    )


def gatherable(tokens: Tensor) -> bool:
    """Whether rows of `tokens` are copied 16 bytes at a time: Triton knows of integers whether 16 divides."""
    return tokens.shape[1] % 16 == 0 and tokens.stride(0) % 16 == 0


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def swizzled(rank: int, bits: int = 16, width: int = 128) -> gl.NVMMASharedLayout:
    """The shared layout of blocks that wgmma and the copy engine read: rows of `width` bytes, swizzled."""
    return gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=bits, rank=rank)


def described(tensor: Tensor, block: Sequence[int]) -> Described:
    size = tensor.element_size()
    layout = swizzled(len(block), 8 * size, min(128, size * block[-1]))
    return Described(TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block), layout))


def ragged(tensor: Tensor, block: Sequence[int]) -> Described:
    """Descriptors whose rows end where the coordinates of `rows` say. `block` leads with its rows."""
    far, stride = 0x7FFF0000, tensor.stride(0)
    descriptor = TensorDescriptor(
        tensor,
        [far, far, END.value, *tensor.shape[1:]],
        [2**34 - stride, stride, *tensor.stride()],
        [1, 1, *block],
        swizzled(2 + len(block), 8 * tensor.element_size()),
    )
    return Described(descriptor, ragged=True)


@gluon.jit
def rows(row, end):
    """The three leading coordinates of `row` in a ragged descriptor of rows that end at `end`."""
    return END, end, END - (end - row)


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    """The ring's next slot; the phase of its barriers flips with every round."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def before(slot, STAGES: gl.constexpr):
    """The slot before `slot`. Not a loop variable: Triton 3.6 and 3.7 take one that starts as an alias of
    `slot` for a constant of the loop.
    """
    return gl.where(slot == 0, STAGES - 1, slot - 1)


@gluon.jit
def columns(block, WHICH: gl.constexpr, NUM: gl.constexpr):
    """Slice WHICH of NUM equal slices of the columns; in registers."""
    if NUM == 1:
        return block
    else:
        HALF: gl.constexpr = block.shape[1] // 2
        left, right = block.reshape([block.shape[0], 2, HALF]).permute((0, 2, 1)).split()
        if WHICH < NUM // 2:
            return columns(left, WHICH, NUM // 2)
        else:
            return columns(right, WHICH - NUM // 2, NUM // 2)


@gluon.jit
def swizzle(i, num_m, num_n, GROUP: gl.constexpr):
    """(row, column) of block i: GROUP rows of blocks walk the columns together, so that their operands meet
    in L2.
    """
    first_m = i // (GROUP * num_n) * GROUP
    size_m = gl.minimum(num_m - first_m, GROUP)
    return first_m + i % (GROUP * num_n) % size_m, i % (GROUP * num_n) // size_m


@gluon.jit
def claim(p_schedule, WARPS: gl.constexpr):
    """A number of blocks claimed before, by all programs of the launch, for a producer of WARPS warps: in
    element 0 of what `handed` makes an integer, so that nothing waits for it here.
    """
    LANES: gl.constexpr = gl.BlockedLayout([CLAIM // (32 * WARPS)], [32], [WARPS], [0])
    lane = gl.arange(0, CLAIM, LANES)
    one = gl.full_like(lane, 1)
    return gl.atomic_add(p_schedule + 2 + 0 * lane, one, mask=lane == 0, sem="relaxed")


@gluon.jit
def handed(claimed, p_schedule, num_blocks):
    """The block of a claim. A program's first two blocks are given, and it claims one whenever it begins one:
    the last claim is known by its number, and sets the counter back for the next launch.
    """
    lane = gl.arange(0, CLAIM, claimed.type.layout)
    number = gl.sum(gl.where(lane == 0, claimed, 0), 0)
    gl.store(p_schedule + 2, 0, mask=number == num_blocks - 1)
    return 2 * gl.num_programs(0) + number


@gluon.jit
def hand_over(claims, slot, phase, i_tile, WARPS: gl.constexpr):
    """Tell the consumers the block after the next."""
    claim_s, full, empty = claims
    LANES: gl.constexpr = gl.BlockedLayout([CLAIM // (32 * WARPS)], [32], [WARPS], [0])
    mbarrier.wait(empty.index(slot), phase)
    claim_s.index(slot).store(gl.full([CLAIM], i_tile, gl.int32, LANES))
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def take_over(claims, slot, phase):
    """What `hand_over` told."""
    claim_s, full, empty = claims
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(full.index(slot), phase)
    i_tile = gl.max(claim_s.index(slot).load(LANES), 0)
    mbarrier.arrive(empty.index(slot), count=1)
    return i_tile


@gluon.jit
def make_claims():
    """What `hand_over` and `take_over` share. A fence must follow."""
    claim_s = gl.allocate_shared_memory(gl.int32, [CLAIM_SLOTS, CLAIM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, empty = barriers(CLAIM_SLOTS, 1)
    return claim_s, full, empty


@gluon.jit
def put(out, coord, value, staging, SIDE: gl.constexpr, NUM: gl.constexpr, BUFFERS: gl.constexpr):
    """Store number NUM of a block: through the next staging buffer, once its last store has been read. Blocks
    have an even number of stores, so that two buffers alternate across blocks too.
    """
    tma.store_wait(BUFFERS - 1)
    buffer = staging.index(SIDE * BUFFERS + NUM % BUFFERS)
    buffer.store(value.to(out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, coord, buffer)


@gluon.jit
def barriers(NUM: gl.constexpr, FILLS: gl.constexpr):
    """(full, empty) of NUM slots, a slot full after FILLS arrivals. A fence must follow."""
    full = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(full.index(i), count=FILLS)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    return full, empty
