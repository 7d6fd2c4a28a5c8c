"""Weights in few bits, chosen by what they are multiplied with: GPTQ, and scales after AWQ.

A matrix W (K, N) is multiplied with activations x (rows of K channels). What its quantisation costs is
``|x (W - Q)|^2`` summed over the rows, which is ``trace((W - Q)^T H (W - Q))`` with the Gram matrix ``H = sum x^T x``:
K * K numbers stand for any number of rows, and every method here needs no more than them.

* ``rtn``: each weight to its nearest code (`export/decoder/quantise.py`); looks at no activations.
* ``clip``: the same with each block's largest weights clipped where that makes the rest finer, judged by how large
  each channel's activations are.
* ``gptq``: row by row, the error of each is made good in the rows that are not rounded yet (Frantar et al., "GPTQ:
  Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022, algorithm 1). In the channels'
  order, or with the largest activations first; the blocks stay those of consecutive channels, which is what
  `MatMulNBits` takes, so in the second case their scales are fixed beforehand.
* ``awq``: channels with large activations get larger weights, and so finer steps, by a factor that the operation before
  them undoes (Lin et al., "AWQ: Activation-aware Weight Quantization", 2023, section 3.2). The exponent is searched.
* ``awq+gptq``: both.

Which is best differs by matrix, and one that fits the collected activations best may fit them too well, so `choose`
judges by a second Gram matrix, of activations that nothing was fitted to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.errors import EdgeError
from pixano_edge.export.decoder.quantise import BLOCK, Quantised, pack, quantise

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Tie = Callable[[Floats], Floats]

RTN, CLIP, GPTQ, AWQ, BOTH = "rtn", "clip", "gptq", "awq", "awq+gptq"
AUTO = "auto"
METHODS = (RTN, CLIP, GPTQ, AWQ, BOTH)
EXPONENTS = tuple(round(0.1 * step, 1) for step in range(1, 10))
"""Of the activations' size, for AWQ's factors."""
SHRINKS = tuple(round(1 - 0.05 * step, 2) for step in range(11))
"""Fractions of a block's range that are tried; 1 clips nothing."""
DAMPING = 0.01
"""Added to the Gram matrix' diagonal, relative to its mean, as in GPTQ."""
BATCH = 128
"""Rows whose corrections to the later rows are applied in one product."""


@dataclass(frozen=True)
class Gram:
    """Activations that enter one matrix, as much of them as quantising it needs.

    Attributes:
        matrix: (K, K) ``sum x^T x``; float32 or float64, finite.
        rows: How many rows were added up.
    """

    matrix: npt.NDArray[np.floating]
    rows: int

    @property
    def sizes(self) -> Doubles:
        """(K,) root mean square of each channel."""
        found: Doubles = np.sqrt(np.maximum(np.diagonal(self.matrix), 0).astype(np.float64) / max(1, self.rows))
        return found


@dataclass(frozen=True)
class Fitted:
    """A matrix in few bits.

    Attributes:
        method: One of `METHODS`.
        weight: Codes and scales.
        factors: (K,) what the weights were multiplied with before; the activations must be divided by it. None: 1.
        exponent: Of the activations' size in `factors`; 0 without.
        error: See `relative_error`, on the activations it was judged by.
    """

    method: str
    weight: Quantised
    factors: Floats | None
    exponent: float
    error: float

    def dequantised(self) -> Floats:
        """The (K, N) matrix that stands for the original, with the factors undone."""
        values = self.weight.dequantised()
        return values if self.factors is None else values / self.factors[:, None]


def relative_error(weight: Floats, approximation: Floats, gram: Gram) -> float:
    """Size of the output's error relative to the output's size, both root mean square; 0 where the output is 0."""
    h = gram.matrix.astype(np.float32, copy=False)

    def size(matrix: Floats) -> float:
        return max(0.0, float(np.vdot(matrix, h @ matrix)))

    whole = size(weight)
    return float(np.sqrt(size(weight - approximation) / whole)) if whole else 0.0


def choose(
    weight: Floats, fit: Gram, check: Gram, *, method: str = AUTO, bits: int = 4, tie: Tie | None = None
) -> list[Fitted]:
    """Quantises a matrix in several ways.

    Args:
        weight: (K, N) float32.
        fit: Activations that the methods may look at.
        check: Others, by which they are judged.
        method: One of `METHODS`, or ``auto`` for all of them.
        bits: 4 or 8.
        tie: Makes (K,) factors into such as something before the matrix can undo; None: nothing can.

    Returns:
        The best first. ``rtn`` is always among them, for comparison.

    Raises:
        EdgeError: Unknown method, or Gram matrices that do not belong to the matrix.
    """
    if method not in (AUTO, *METHODS):
        raise EdgeError(f"There is no method '{method}'.", f"Use {AUTO} or one of {', '.join(METHODS)}.")
    for gram in (fit, check):
        check_gram(gram, weight.shape[0])
    asked = METHODS if method == AUTO else (method,)
    found = [_judged(RTN, weight, quantise(weight, bits), check)]
    for name, exponent, factors in _ways(weight, fit, asked, bits, tie):
        scaled, gram = _scaled(weight, fit, factors)
        if name in (GPTQ, BOTH):
            results = [gptq(scaled, gram, bits, largest_first=first) for first in (False, True)]
        else:
            results = [clipped(scaled, gram, bits)]
        found += [_judged(name, weight, result, check, factors, exponent) for result in results]
    # Where nothing can undo AWQ's factors, what is left is `rtn`.
    kept = [one for one in found if one.method in asked] or found
    return sorted(kept, key=lambda one: one.error) + [one for one in found if one.method == RTN and one not in kept]


def check_gram(gram: Gram, channels: int) -> None:
    """Raises EdgeError for a Gram matrix of another width, of no rows, or with values that are not finite."""
    if gram.matrix.shape != (channels, channels):
        raise EdgeError(
            f"Activations of {gram.matrix.shape[0]} channels were collected for a matrix that takes {channels}.",
            "Collect them again from this very graph.",
        )
    if gram.rows < 1 or not np.isfinite(gram.matrix).all():
        raise EdgeError(
            "The collected activations are empty, or hold values that are not finite.",
            "Run the fp32 variant on these data first: 'pixano-edge verify --precision fp32'.",
        )


def clipped(weight: Floats, gram: Gram, bits: int) -> Quantised:
    """Round to nearest with each block's range shrunk to where its error, weighted by the activations, is least."""
    squares = np.diagonal(gram.matrix).astype(np.float32)
    columns = weight.shape[1]
    blocks = [slice(at, at + BLOCK) for at in range(0, weight.shape[0], BLOCK)]
    scales = np.stack([_block_scales(weight[block], squares[block], bits) for block in blocks], axis=1)
    codes = np.zeros((columns, len(blocks), BLOCK), np.float32)
    for index, block in enumerate(blocks):
        codes[:, index, : weight[block].shape[0]] = _codes(weight[block], scales[:, index], bits).T
    return pack(codes, scales, bits, (weight.shape[0], columns))


def gptq(weight: Floats, gram: Gram, bits: int, *, largest_first: bool = False) -> Quantised:
    """GPTQ.

    Args:
        weight: (K, N) float32.
        gram: Of its activations.
        bits: 4 or 8.
        largest_first: Take the channels with the largest activations first.
    """
    rows, columns = weight.shape
    squares = np.diagonal(gram.matrix).astype(np.float32)
    order = np.argsort(-squares, kind="stable") if largest_first else np.arange(rows)
    upper = _inverse_factor(gram, order)
    work = weight[order].astype(np.float32)
    count = -(-rows // BLOCK)
    scales = np.zeros((columns, count), np.float32)
    if largest_first:  # a block's rows come apart, so its scale cannot wait for their corrections
        for block in range(count):
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            scales[:, block] = _block_scales(weight[part], squares[part], bits)
    codes = np.zeros((columns, count, BLOCK), np.float32)
    for start in range(0, rows, BATCH):
        end = min(start + BATCH, rows)
        errors = np.zeros((end - start, columns), np.float32)
        for at in range(start, end):
            channel = int(order[at])
            block, place = divmod(channel, BLOCK)
            if not largest_first and place == 0:
                part = slice(at, min(at + BLOCK, rows))
                scales[:, block] = _block_scales(work[part], squares[part], bits)
            code = _codes(work[at][None], scales[:, block], bits)[0]
            codes[:, block, place] = code
            errors[at - start] = (work[at] - code * scales[:, block]) / upper[at, at]
            work[at + 1 : end] -= np.outer(upper[at, at + 1 : end], errors[at - start])
        work[end:] -= upper[start:end, end:].T @ errors
    return pack(codes, scales, bits, (rows, columns))


def _ways(
    weight: Floats, fit: Gram, asked: Sequence[str], bits: int, tie: Tie | None
) -> Iterator[tuple[str, float, Floats | None]]:
    """Methods but ``rtn`` with exponent and factors."""
    for name in (CLIP, GPTQ):
        if name in asked:
            yield name, 0.0, None
    if tie is None or not {AWQ, BOTH} & set(asked):
        return
    tried = []
    for exponent in EXPONENTS:
        factors = tie(_factors(fit, exponent))
        scaled, gram = _scaled(weight, fit, factors)
        tried.append(
            (_judged(AWQ, weight, clipped(scaled, gram, bits), fit, factors, exponent).error, exponent, factors)
        )
    _, exponent, factors = min(tried, key=lambda one: one[0])
    for name in (AWQ, BOTH):
        if name in asked:
            yield name, exponent, factors


def _judged(
    name: str, weight: Floats, result: Quantised, check: Gram, factors: Floats | None = None, exponent: float = 0.0
) -> Fitted:
    made = Fitted(name, result, factors, exponent, 0.0)
    return Fitted(name, result, factors, exponent, relative_error(weight, made.dequantised(), check))


def _factors(gram: Gram, exponent: float) -> Floats:
    """AWQ's factors: the activations' sizes to a power, with 1 in the middle of their range."""
    sizes = gram.sizes
    sizes = np.maximum(sizes, 1e-4 * max(float(sizes.max()), 1e-30))  # a channel that was never used
    factors = sizes**exponent
    factors /= np.sqrt(factors.max() * factors.min())
    found: Floats = factors.astype(np.float32)
    return found


def _scaled(weight: Floats, gram: Gram, factors: Floats | None) -> tuple[Floats, Gram]:
    """Weights multiplied with the factors, and the Gram matrix of activations divided by them."""
    if factors is None:
        return weight, gram
    inverse = 1 / factors.astype(np.float64)
    return weight * factors[:, None], Gram(gram.matrix * np.outer(inverse, inverse), gram.rows)


def _block_scales(block: Floats, squares: Floats, bits: int) -> Floats:
    """(N,) scales of one block of rows: the fraction of its range with the least weighted error."""
    zero = 1 << (bits - 1)
    at = np.abs(block).argmax(axis=0)
    full = block[at, np.arange(block.shape[1])] / -zero
    # A block without activations is judged by its weights.
    importance = (squares if squares.any() else np.ones_like(squares))[:, None]
    best, least = full, np.full(full.shape, np.inf, np.float32)
    for shrink in SHRINKS:
        scale = full * np.float32(shrink)
        error = (importance * (block - _codes(block, scale, bits) * scale) ** 2).sum(axis=0)
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    found: Floats = best.astype(np.float32)
    return found


def _codes(rows: Floats, scales: Floats, bits: int) -> Floats:
    """Nearest codes of some rows, as float32 whole numbers; 0 where the scale is 0."""
    zero = 1 << (bits - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Floats = np.where(scales == 0, 0, np.clip(np.rint(rows / scales), -zero, zero - 1)).astype(np.float32)
    return found


def _inverse_factor(gram: Gram, order: npt.NDArray[np.intp]) -> Floats:
    """(K, K) upper Cholesky factor of the inverse of the damped Gram matrix, its channels in `order`."""
    matrix = gram.matrix.astype(np.float64)[np.ix_(order, order)]
    diagonal = np.diagonal(matrix).copy()
    mean = float(diagonal.mean()) or 1.0
    unused = diagonal <= 0
    damping = DAMPING * mean
    for _ in range(8):
        damped = matrix.copy()
        damped[np.diag_indices_from(damped)] += damping + np.where(unused, mean, 0)
        try:
            inverse = np.linalg.inv(damped)
            lower = np.linalg.cholesky((inverse + inverse.T) / 2)
        except np.linalg.LinAlgError:
            damping *= 10
            continue
        found: Floats = np.ascontiguousarray(lower.T).astype(np.float32)
        return found
    raise EdgeError("The collected activations give no usable matrix.", "Collect them again, from more samples.")
