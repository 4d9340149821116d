"""Assignment: one-to-one pairs with the highest total score (the Hungarian method, with potentials)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def best_pairs(scores: NDArray[np.float64], threshold: float) -> list[tuple[int, int]]:
    """The (row, column) pairs, sorted, each row and column at most once, with the highest sum of `score - threshold`.

    Pairs at or below the threshold are left out. O(rows^2 * columns), where rows is the smaller of the two numbers.
    """
    profit = np.maximum(scores - threshold, 0.0)
    if not profit.size or not profit.any():
        return []
    turned = profit.shape[0] > profit.shape[1]
    rows_of = _columns_rows(-(profit.T if turned else profit))
    pairs = [(int(row), column) for column, row in enumerate(rows_of) if row >= 0]
    if turned:
        pairs = [(column, row) for row, column in pairs]
    return sorted((row, column) for row, column in pairs if profit[row, column] > 0)


def _columns_rows(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each column its row, or -1, such that every row has a column and the cost is the lowest; rows <= columns."""
    rows, columns = cost.shape
    row_potential, column_potential = np.zeros(rows), np.zeros(columns + 1)
    row_of = np.full(columns + 1, -1)  # the last column holds a row that has no column yet
    for row in range(rows):
        row_of[columns] = row
        column = columns
        least, way = np.full(columns, np.inf), np.full(columns, -1)
        used = np.zeros(columns + 1, dtype=bool)
        while row_of[column] >= 0:
            used[column] = True
            here = row_of[column]
            free = ~used[:columns]
            reduced = cost[here] - row_potential[here] - column_potential[:columns]
            better = free & (reduced < least)
            least[better], way[better] = reduced[better], column
            next_column = int(np.argmin(np.where(free, least, np.inf)))
            delta = least[next_column]
            row_potential[row_of[used]] += delta
            column_potential[used] -= delta
            least[free] -= delta
            column = next_column
        while column != columns:
            previous = int(way[column])
            row_of[column] = row_of[previous]
            column = previous
    return row_of[:columns]
