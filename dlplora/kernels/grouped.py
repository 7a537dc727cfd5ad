"""Triton kernels for many rows that share experts; no factor is copied, however many rows keep it.

The buffers list the kept experts of every row as (row, expert) pairs. The first kernel multiplies by A: pairs are grouped by expert into
blocks, so that one program reads an expert's A once for many rows. The second multiplies by B and sums the K pairs of a row in a fixed
order, without atomics, so equal inputs give equal bits. The layout of blocks depends on sizes only, so buffers can be rewritten under a
captured graph. Source of the idea: grouped LoRA kernels of Punica (arXiv:2310.18547) and S-LoRA (arXiv:2311.03285), which serve one adapter
per token; here a row keeps several, with weights.

Needs Triton and a CUDA device, or Triton's interpreter (``TRITON_INTERPRET=1``) on any device.
Shapes: B rows, T tokens, E experts, R rank, I inputs, O outputs, K experts per row at most, P = B * K pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from dlplora.kernels.folded import kept_first, kept_width

PAIRS = 16
"""Pairs of one block; the smallest edge of a matrix product in Triton."""
INTERPRETED = bool(triton.knobs.runtime.interpret)
"""The interpreter multiplies bfloat16 wrongly; there products are taken in float32, which is what the device accumulates in anyway."""


@triton.jit
def _shrink(  # type: ignore[no-untyped-def]
    x, a, scales, block_expert, block_pairs, z, tokens, width, d_in, rank,
    PAIRS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """z[pair, t, :] = scale[pair] * A[expert] @ x[row, t]; program (block, tile of PAIRS * T positions)."""
    block = tl.program_id(0)
    expert = tl.load(block_expert + block).to(tl.int64)
    if expert >= 0:
        position = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        slot = position // tokens
        token = position % tokens
        pair = tl.load(block_pairs + block * PAIRS + slot, mask=slot < PAIRS, other=-1).to(tl.int64)
        alive = pair >= 0
        source = (pair // width) * tokens + token
        r = tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for start in range(0, d_in, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            left = tl.load(x + source[:, None] * d_in + i[None, :], mask=alive[:, None] & (i < d_in)[None, :], other=0.0)
            right = tl.load(a + (expert * rank + r[None, :]) * d_in + i[:, None], mask=(r < rank)[None, :] & (i < d_in)[:, None], other=0.0)
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            total += tl.dot(left, right, input_precision="ieee")
        scale = tl.load(scales + pair, mask=alive, other=0.0)
        where = (pair * tokens + token)[:, None] * rank + r[None, :]
        tl.store(z + where, total * scale[:, None], mask=alive[:, None] & (r < rank)[None, :])


@triton.jit
def _expand(  # type: ignore[no-untyped-def]
    z, b, experts, out, tokens, width, d_out, rank,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[row, t, :] = sum over the row's pairs of B[expert] @ z[pair, t]; program (row, tile of T, tile of O)."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    r = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for k in range(width):
        expert = tl.load(experts + row * width + k).to(tl.int64)
        if expert >= 0:
            source = ((row * width + k) * tokens + t)[:, None] * rank + r[None, :]
            left = tl.load(z + source, mask=(t < tokens)[:, None] & (r < rank)[None, :], other=0.0)
            right = tl.load(
                b + (expert * rank + r[:, None]) * d_out + o[None, :], mask=(r < rank)[:, None] & (o < d_out)[None, :], other=0.0
            )
            left = left.to(right.dtype)  # rounded as the other backends round it
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            total += tl.dot(left, right, input_precision="ieee")
    where = (row * tokens + t)[:, None] * d_out + o[None, :]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=(t < tokens)[:, None] & (o < d_out)[None, :])


class GroupedBuffers(nn.Module):
    """Kept experts of each row as indices, and the blocks of pairs the first kernel works through.

    Args:
        rows: B, or 1 for weights that all rows share.
        width: K, experts a row can keep.
        lora_a: (E, R, I) of a layer, for the number of experts and the device. Layers of equal scaling can share the buffers.

    Attributes:
        experts: (B, K) int32, -1 where nothing is kept. scales: (B, K) float32, routing weight times scaling.
        block_expert: (N,) int32, -1 for blocks not in use. block_pairs: (N, 16) int32, -1 for places not in use.
    """

    experts: Tensor
    scales: Tensor
    block_expert: Tensor
    block_pairs: Tensor

    def __init__(self, rows: int, width: int, lora_a: Tensor) -> None:
        super().__init__()
        self.num_experts = lora_a.shape[0]
        self.width = min(width, self.num_experts)
        pairs = rows * self.width
        # Every expert in use ends at most one block early.
        blocks = min(pairs, self.num_experts) + pairs // PAIRS
        shapes = {"experts": (rows, self.width), "block_expert": (blocks,), "block_pairs": (blocks, PAIRS)}
        with torch.inference_mode(False):
            for name, shape in shapes.items():
                self.register_buffer(name, torch.full(shape, -1, dtype=torch.int32, device=lora_a.device), persistent=False)
            self.register_buffer("scales", torch.zeros((rows, self.width), device=lora_a.device), persistent=False)
        self.eval()

    @torch.no_grad()
    def write(self, chosen: tuple[Tensor, Tensor], rows: Tensor | None = None, fullest: int | None = None) -> None:
        """Write the weights of all rows, or of some, in place. Nothing waits for the device.

        Args:
            chosen: ``kept_first`` of routing weight times scaling (N, E), with room for ``width`` experts.
            rows: Row indices (N,); None for all.
            fullest: Experts that the fullest row keeps; the sizes of these buffers do not depend on it.
        """
        order, kept = chosen
        order = order.masked_fill(kept == 0, -1).to(torch.int32)
        if rows is None:
            self.experts.copy_(order)
            self.scales.copy_(kept)
        else:
            self.experts[rows] = order
            self.scales[rows] = kept.to(self.scales)
        self._group()

    def _group(self) -> None:
        """Sort the pairs by expert and cut them into blocks of one expert each."""
        flat = self.experts.flatten().long()
        owner = torch.where(flat < 0, self.num_experts, flat)  # pairs without an expert go after all others
        owner, pair = torch.sort(owner, stable=True)
        counts = torch.zeros(self.num_experts + 1, dtype=torch.long, device=flat.device).scatter_add_(0, owner, torch.ones_like(owner))
        first_pair = counts.cumsum(0) - counts
        needed = (counts + PAIRS - 1) // PAIRS
        first_block = needed.cumsum(0) - needed
        place = torch.arange(len(pair), device=flat.device) - first_pair[owner]
        block = first_block[owner] + place // PAIRS
        blocks = len(self.block_expert)
        used = owner < self.num_experts
        # One block more than there are takes the pairs without an expert, and is cut off.
        block = torch.where(used, block, blocks)
        pairs = torch.full((blocks + 1, PAIRS), -1, dtype=torch.int32, device=flat.device)
        pairs[block, place % PAIRS] = pair.to(torch.int32)
        experts = torch.full((blocks + 1,), -1, dtype=torch.int32, device=flat.device)
        experts[block] = owner.to(torch.int32)
        self.block_pairs.copy_(pairs[:blocks])
        self.block_expert.copy_(experts[:blocks])

    def delta(self, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        """The delta (B, T, O) in the dtype of ``x`` (B, T, I); accumulated in float32.

        Args:
            x: Any layout; cast to the dtype of ``lora_a`` for the computation.
            lora_a: (E, R, I), contiguous.
            lora_b: (E, O, R), stored by rank: ``lora_b.mT`` is contiguous.
        """
        shape = x.shape
        rows = self.experts.shape[0]
        inner = x.to(lora_a.dtype).reshape(rows, -1, shape[-1]).contiguous()
        tokens, d_in, rank, d_out = inner.shape[1], shape[-1], lora_a.shape[1], lora_b.shape[1]
        z = torch.empty((rows * self.width, tokens, rank), dtype=torch.float32, device=x.device)
        out = torch.empty((rows, tokens, d_out), dtype=lora_a.dtype, device=x.device)
        block_r = max(16, triton.next_power_of_2(rank))
        block_m = 16 if tokens == 1 else 32
        grid = (len(self.block_expert), triton.cdiv(PAIRS * tokens, block_m))
        _shrink[grid](
            inner, lora_a.contiguous(), self.scales, self.block_expert, self.block_pairs, z, tokens, self.width, d_in, rank,
            PAIRS=PAIRS, BLOCK_M=block_m, BLOCK_I=64, BLOCK_R=block_r, UPCAST=INTERPRETED,
        )  # fmt: skip
        block_t = 16 if tokens <= 16 else 32
        _expand[(rows, triton.cdiv(tokens, block_t), triton.cdiv(d_out, 64))](
            z, lora_b.mT.contiguous(), self.experts, out, tokens, self.width, d_out, rank,
            BLOCK_T=block_t, BLOCK_O=64, BLOCK_R=block_r, UPCAST=INTERPRETED,
        )  # fmt: skip
        return out.view(*shape[:-1], d_out).to(x.dtype)


def fused_delta(x: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor) -> Tensor:
    """Write buffers and apply them in one call, for (E,) and (B, E) weights; the same operation as ``reference.fused_delta``."""
    rows = weights.reshape(-1, weights.shape[-1])
    buffers = GroupedBuffers(rows.shape[0], kept_width(rows), lora_a)
    buffers.write(kept_first(rows, buffers.width))
    return buffers.delta(x, lora_a, lora_b)
