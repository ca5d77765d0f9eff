"""Cross-entropy over the vocabulary: an online softmax, and the logits replaced by their
gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .device import INTERPRETED, store_as
from .launch import LaunchConfig, Problem, cdiv, cover, launch_config, tile_of


@triton.jit
def tanh(x):
    if INTERPRETED:  # it knows no libdevice
        decay = tl.exp(-2 * tl.abs(x).to(tl.float64))
        return (tl.where(x < 0, -1, 1) * (1 - decay) / (1 + decay)).to(tl.float32)
    return libdevice.tanh(x)


@triton.jit
def load_capped(logits_ptrs, mask, softcap, logit_scale, CAPPED: tl.constexpr):
    """z in float32, -inf outside the mask."""
    z = tl.load(logits_ptrs, mask=mask, other=0.0).to(tl.float32) * logit_scale
    if CAPPED:
        z = softcap * tanh(z / softcap)
    return tl.where(mask, z, float("-inf"))


@triton.jit
def store_grad(
    logits_ptrs,
    mask,
    z,
    offs_out,
    label,
    lse,
    ignored,
    vocabulary,
    label_smoothing,
    softcap,
    logit_scale,
    CAPPED: tl.constexpr,
):
    """The gradient of one token's loss, over its logits; zero for an ignored token."""
    grad = tl.exp(z - lse) - label_smoothing / vocabulary
    grad -= tl.where(offs_out == label, 1 - label_smoothing, 0.0)
    if CAPPED:
        ratio = z / softcap
        grad *= 1 - ratio * ratio
    store_as(logits_ptrs, tl.where(ignored, 0.0, grad * logit_scale), mask)


@triton.jit
def cross_entropy_grad_kernel(
    logits_ptr,  # [t, V]
    labels_ptr,  # [t] int64
    losses_ptr,  # [t] float32
    lse_ptr,  # [t] float32
    vocabulary,
    stride_logits_t,
    stride_logits_out,
    stride_labels_t,
    ignore_index,
    label_smoothing,
    softcap,
    logit_scale,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    logits_ptr += t * stride_logits_t
    label = tl.load(labels_ptr + t * stride_labels_t)
    ignored = label == ignore_index
    in_range = (label >= 0) & (label < vocabulary)

    # One running maximum, sum of exponentials and sum of z per lane; lanes meet once, after the
    # loop.
    peak = tl.full((BLOCK_OUT,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_OUT,), tl.float32)
    z_sum = tl.zeros((BLOCK_OUT,), tl.float32)
    for first in range(0, vocabulary, BLOCK_OUT):
        offs_out = first + tl.arange(0, BLOCK_OUT)
        mask = offs_out < vocabulary
        z = load_capped(
            logits_ptr + offs_out.to(tl.int64) * stride_logits_out,
            mask,
            softcap,
            logit_scale,
            CAPPED,
        )
        higher = tl.maximum(peak, z)
        # nothing but -inf so far: exp(-inf - 0) is 0
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - base) + tl.exp(z - base)
        peak = higher
        if SMOOTHED:
            z_sum += tl.where(mask, z, 0.0)
    top = tl.max(peak, axis=0)
    lse = top + tl.log(tl.sum(total * tl.exp(peak - top), axis=0))
    lse = tl.where(ignored | in_range, lse, float("nan"))

    target_ptr = logits_ptr + tl.where(in_range, label, 0) * stride_logits_out
    target = load_capped(target_ptr, in_range, softcap, logit_scale, CAPPED)
    loss = lse - (1 - label_smoothing) * target
    if SMOOTHED:
        loss -= label_smoothing * (tl.sum(z_sum, axis=0) / vocabulary)
    tl.store(losses_ptr + t, tl.where(ignored, 0.0, loss))
    tl.store(lse_ptr + t, lse)

    if WRITE_GRAD:
        tl.debug_barrier()  # all warps have read the target's logit before one of them writes its gradient there
        for first in range(0, vocabulary, BLOCK_OUT):
            offs_out = first + tl.arange(0, BLOCK_OUT)
            mask = offs_out < vocabulary
            ptrs = logits_ptr + offs_out.to(tl.int64) * stride_logits_out
            z = load_capped(ptrs, mask, softcap, logit_scale, CAPPED)
            store_grad(
                ptrs,
                mask,
                z,
                offs_out,
                label,
                lse,
                ignored,
                vocabulary,
                label_smoothing,
                softcap,
                logit_scale,
                CAPPED,
            )


@triton.jit
def cross_entropy_block_grad_kernel(
    logits_ptr,  # [t, block]
    labels_ptr,  # [t] int64
    lse_ptr,  # [t] float32
    block,
    first_out,
    vocabulary,
    stride_logits_t,
    stride_logits_out,
    stride_labels_t,
    stride_lse_t,
    ignore_index,
    label_smoothing,
    softcap,
    logit_scale,
    CAPPED: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    offs_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask = offs_out < block
    label = tl.load(labels_ptr + t * stride_labels_t)
    lse = tl.load(lse_ptr + t * stride_lse_t)
    ptrs = logits_ptr + t * stride_logits_t + offs_out.to(tl.int64) * stride_logits_out
    z = load_capped(ptrs, mask, softcap, logit_scale, CAPPED)
    store_grad(
        ptrs,
        mask,
        z,
        offs_out,
        label - first_out,
        lse,
        label == ignore_index,
        vocabulary,
        label_smoothing,
        softcap,
        logit_scale,
        CAPPED,
    )


@tile_of("cross_entropy_grad_")
def choose_tile(problem: Problem) -> LaunchConfig:
    return LaunchConfig(block_out=cover(problem.n_out, 16, 4096), num_warps=16)


def launch_cross_entropy_grad_(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    write_grad: bool,
) -> tuple[Tensor, Tensor]:
    """``ops.cross_entropy_grad_`` on the device: one program a token, the logits read twice and
    written once."""
    tokens, vocabulary = logits.shape
    losses, lse = (logits.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    if tokens == 0:
        return losses, lse
    config = launch_config("cross_entropy_grad_", logits, tokens=tokens, n_out=vocabulary)
    with torch.cuda.device_of(logits):
        cross_entropy_grad_kernel[(tokens,)](
            logits,
            labels,
            losses,
            lse,
            vocabulary,
            *logits.stride(),
            *labels.stride(),
            ignore_index,
            float(label_smoothing),
            float(softcap or 1.0),
            float(logit_scale),
            CAPPED=softcap is not None,
            SMOOTHED=label_smoothing != 0,
            WRITE_GRAD=write_grad,
            BLOCK_OUT=config.block_out,
            **config.compiler,
        )
    return losses, lse


def launch_cross_entropy_block_grad_(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    first_out: int,
    vocabulary: int,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """``ops.cross_entropy_block_grad_`` on the device: one read and one write of the block."""
    tokens, block = logits.shape
    if logits.numel() == 0:
        return
    config = launch_config("cross_entropy_grad_", logits, tokens=tokens, n_out=block)
    with torch.cuda.device_of(logits):
        cross_entropy_block_grad_kernel[(tokens, cdiv(block, config.block_out))](
            logits,
            labels,
            lse,
            block,
            first_out,
            vocabulary,
            *logits.stride(),
            *labels.stride(),
            *lse.stride(),
            ignore_index,
            float(label_smoothing),
            float(softcap or 1.0),
            float(logit_scale),
            CAPPED=softcap is not None,
            BLOCK_OUT=config.block_out,
            **config.compiler,
        )
