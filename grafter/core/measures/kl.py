"""KL(A||B) of logits, in float64: how much is lost where B's distribution stands for A's.

    p = softmax(a), q = softmax(b) along one dim      KL = sum(p * (log p - log q))      in nats, never below 0

Logits that are -inf in both have no part in it (a masked token); -inf in B alone makes the divergence infinite.
"""

from __future__ import annotations

import math

import torch

# Rows of a step: some ten float64 temporaries of them are held at once.
_STEP_BYTES = 2 << 20


class Divergence:
    """Rows of logits, block by block; only sums are kept."""

    def __init__(self) -> None:
        self._sums: list[float] = []
        self.rows = 0
        self.undefined = 0
        self.largest = 0.0
        self.worst_row: int | None = None

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """[rows, n] of both, real, of any dtype, whole along the dim of the logits."""
        step = max(1, _STEP_BYTES // (8 * max(1, a.shape[1])))
        for start in range(0, a.shape[0], step):
            self._add_step(a[start : start + step].double(), b[start : start + step].double())

    def _add_step(self, a: torch.Tensor, b: torch.Tensor) -> None:
        log_p, log_q = a.log_softmax(1), b.log_softmax(1)
        p = log_p.exp()
        terms = (p * (log_p - log_q)).where(p > 0, 0.0)
        # NaN logits have p NaN, which is not > 0.
        undefined = log_p.isnan().any(1) | log_q.isnan().any(1)
        # Rounding may leave a sum of -1e-17 where both are the same.
        rows = terms.sum(1).clamp_(min=0.0).where(~undefined, 0.0)
        self.undefined += int(undefined.sum())
        values = rows.tolist()
        largest = max(values, default=0.0)
        if largest > self.largest:
            self.largest, self.worst_row = largest, self.rows + values.index(largest)
        # A step is some rows: their sums are exactly rounded, and do not depend on how many make a step.
        self._sums.extend(values)
        self.rows += len(values)

    def mean(self) -> float | None:
        """Over the rows in which it is defined; None where there is none."""
        defined = self.rows - self.undefined
        if not defined:
            return None
        return math.inf if self.largest == math.inf else math.fsum(self._sums) / defined
