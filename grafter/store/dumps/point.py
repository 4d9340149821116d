"""One dumped point of a job: what each rank recorded of it, each rank's tensors, and the whole ones they make."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch

from grafter.core.points import OWN_TAGS, PointKey
from grafter.core.records import Role
from grafter.core.rows.tokens import Tokens
from grafter.errors import DumpError, LayoutError
from grafter.store.dumps.lazy_tensor import LazyTensor
from grafter.store.dumps.pieces import LocalPart, find_pieces
from grafter.store.dumps.record import TENSOR_MARK, DumpedLeaf, DumpRecord
from grafter.store.dumps.record_file import opened, record_in, shown
from grafter.store.dumps.tensor_file import map_tensor, read_header

Which = Literal["value", "grafted"]

# What a file's own record and its line must say alike.
_SAME_IN_BOTH = ("order", "name", "tags", "step", "phase", "occurrence", "role", "role_rank")


class DumpedPoint:
    """One point, merged over the ranks of a job. Nothing is read from its files before it is asked for.

    key: name, identifying tags, step, phase and occurrence; also as fields. records: by role rank.
    tags: as filters see them: those of the lowest rank, and name, step, phase, occurrence.
    """

    def __init__(self, directory: Path, key: PointKey, records: Mapping[int, DumpRecord]) -> None:
        self._directory = directory
        self.key = key
        self.records: dict[int, DumpRecord] = dict(sorted(records.items()))
        # Not kept alive from here: each holds mapped files, of which a process cannot have any number.
        self._lazy: WeakValueDictionary[tuple[str, Which], LazyTensor] = WeakValueDictionary()
        # Undeclared tensors that were found to be the same on all ranks.
        self._copies: set[tuple[str, Which]] = set()

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def step(self) -> int:
        return self.key.step

    @property
    def phase(self) -> str:
        return self.key.phase

    @property
    def occurrence(self) -> int:
        return self.key.occurrence

    @property
    def first(self) -> DumpRecord:
        """The record of the lowest rank that has the point."""
        return next(iter(self.records.values()))

    @property
    def tags(self) -> dict[str, Any]:
        own = {"name": self.name, "step": self.step, "phase": self.phase, "occurrence": self.occurrence}
        return {**{tag: value for tag, value in self.first.tags.items() if tag not in OWN_TAGS}, **own}

    @property
    def role(self) -> Role:
        return self.first.role

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self.records)

    @property
    def missing_ranks(self) -> tuple[int, ...]:
        """Ranks that share the point, as those that are here say, and of which there is no record."""
        shared = {rank for record in self.records.values() for rank in record.participants}
        return tuple(sorted(shared - self.records.keys()))

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of its tensors; of a point that is a bare tensor, one that is empty."""
        return tuple(dict.fromkeys(leaf.path for record in self.records.values() for leaf in record.leaves))

    def __str__(self) -> str:
        return self.key.text

    def __repr__(self) -> str:
        return f"<DumpedPoint {self.key.text} on {self.role} ranks {list(self.ranks)}>"

    # Tensors.

    def ranks_with(self, path: str = "", which: Which = "value") -> tuple[int, ...]:
        """The ranks whose files hold this tensor.

        There are none at levels that save no tensors, and none for `grafted` where no graft wrote.
        """
        return tuple(rank for rank in self.records if self._has(rank, path, which))

    def local(self, rank: int, path: str = "", which: Which = "value") -> torch.Tensor:
        """One rank's own tensor, on the CPU, with the shape and dtype it had there; its memory is the mapped file's.

        which: `value`, as it was when the program came to the point, or `grafted`, as the program went on with it.

        Writing to the tensor never changes the file, only this tensor. Raises DumpError where there is none, or where
        the file is damaged or says otherwise than its record.
        """
        record = self._record(rank)
        leaf = self._leaf(rank, path)
        if record.file is None:
            why = record.reason or f"it was saved at the level {record.level!r}"
            raise DumpError(f"{self._who(rank)}: there is no tensor of it, because {why}.")
        name = f"{which}{path}"
        with opened(self._directory, record.file) as descriptor:
            file = read_header(descriptor, f"{self._directory}/{shown(record.file)}")
            self._check_same(record, record_in(file, rank), file.where)
            entry = file.entries.get(name)
            if entry is None:
                raise DumpError(self._why_absent(rank, path, which, file.where))
            stored_as = leaf.stored_as or leaf.dtype
            if entry.dtype != stored_as or (leaf.stored_as is None and entry.shape != leaf.shape):
                raise DumpError(
                    f"{file.where}: the record says {stored_as}{list(leaf.shape)} of {name!r}, and the file has "
                    f"{entry.dtype}{list(entry.shape)}."
                )
            return map_tensor(descriptor, file, name, _torch_dtype(leaf, file.where), leaf.shape)

    def reader(self, path: str = "", which: Which = "value") -> LazyTensor:
        """The whole tensor of all ranks, to be read box by box, so that it may be larger than memory.

        Parts are put together by the layouts that the ranks declared. Where nothing is declared, one rank's tensor is
        the whole one; those of several ranks must be the same bit for bit, which is looked at here, once. Files stay
        mapped as long as the reader, or a tensor that it gave, is alive.

        Raises DumpError naming point and ranks where the parts make no whole tensor.
        """
        found = self._lazy.get((path, which)) or self._make_reader(path, which)
        if found.is_undeclared and found.replicas > 1 and (path, which) not in self._copies:
            self._check_copies(found)
            self._copies.add((path, which))
        self._lazy[path, which] = found
        return found

    def whole(self, path: str = "", which: Which = "value") -> torch.Tensor:
        """The whole tensor, as `reader(...).read()` returns it.

        The first of several replicas is used, and summands are added in float32 or better.
        `reader(...).differing_replicas()` checks the replicas.
        """
        return self.reader(path, which).read()

    def extras(self, rank: int) -> dict[str, Any] | None:
        """The extras that one rank gave at the point, with its tensors; tuples are lists. None: there were none."""
        record = self._record(rank)
        if record.extras is None:
            return None
        restored = self._restored(record.extras, record, rank)
        assert isinstance(restored, dict)
        return restored

    def other(self, rank: int, path: str) -> Any:
        """A leaf of one rank's value that is no tensor, as it was encoded; NumPy's arrays are tensors. None: there is
        none, or it is None."""
        record = self._record(rank)
        return self._restored(record.others.get(path), record, rank)

    def tokens(self, rank: int) -> Tokens | None:
        """Which token each row of one rank's tensor is; None where that was not said."""
        record = self._record(rank)
        if record.tokens is None:
            return None
        try:
            return Tokens.from_record(record.tokens)
        except ValueError as error:
            raise DumpError(f"{self._who(rank)}: its tokens are none: {error}") from error

    def let_go(self) -> None:
        """Unmap the files that readers of this point have opened; reading opens them again."""
        for tensor in list(self._lazy.values()):
            tensor.let_go()

    # The steps.

    def _who(self, rank: int) -> str:
        return f"{self.key.text} on {self.role} rank {rank}"

    def _record(self, rank: int) -> DumpRecord:
        if rank not in self.records:
            raise DumpError(f"{self.key.text}: {self.role} rank {rank} has no dump of it; ranks {list(self.ranks)} do.")
        return self.records[rank]

    def _find_leaf(self, rank: int, path: str) -> DumpedLeaf | None:
        return next((leaf for leaf in self.records[rank].leaves if leaf.path == path), None)

    def _leaf(self, rank: int, path: str) -> DumpedLeaf:
        leaf = self._find_leaf(rank, path)
        if leaf is None:
            there = ", ".join(repr(leaf.path) for leaf in self.records[rank].leaves) or "none"
            raise DumpError(f"{self._who(rank)}: it has no leaf {path!r}. Its leaves: {there}.")
        return leaf

    def _has(self, rank: int, path: str, which: Which) -> bool:
        record, leaf = self.records[rank], self._find_leaf(rank, path)
        if leaf is None or record.file is None:
            return False
        if which == "value" and record.reason is None:
            return True
        try:
            with opened(self._directory, record.file) as descriptor:
                return f"{which}{path}" in read_header(descriptor, record.file).entries
        except DumpError:
            # It is damaged, and reading it says so.
            return True

    def _check_same(self, line: DumpRecord, own: DumpRecord, where: str) -> None:
        for name in _SAME_IN_BOTH:
            # As texts, in which NaN is NaN, and 1, 1.0 and True are apart.
            said, own_value = repr(getattr(line, name)), repr(getattr(own, name))
            if said != own_value:
                raise DumpError(
                    f"{where}: its own record says {name} {shown(own_value)}, and the line that names it says "
                    f"{shown(said)}. One of the two was changed, or copied from another run."
                )

    def _why_absent(self, rank: int, path: str, which: Which, where: str) -> str:
        if which == "grafted":
            return f"{self._who(rank)}: no graft changed {path or 'it'} there, so there is only its `value`."
        reason = self.records[rank].reason
        if reason is not None:
            return f"{self._who(rank)}: there is no tensor {which + path!r} of it, because {shown(reason)}."
        return f"{where}: it has no tensor {which + path!r}, which its record describes. It is damaged."

    def _make_reader(self, path: str, which: Which) -> LazyTensor:
        ranks = self.ranks_with(path, which)
        if not ranks:
            # Says why, in the words for one rank.
            self.local(self.ranks[0], path, which)
        parts = tuple(self._part(rank, path) for rank in ranks)
        who = f"{self.key.text}{f', leaf {path}' if path else ''} at {self.role}"
        try:
            pieces = find_pieces(self.role, parts)
        except (LayoutError, ValueError, OverflowError) as error:
            raise DumpError(f"{who}: {error}{self._what_is_missing()}") from error
        dtype = _torch_dtype(self._leaf(ranks[0], path), who)
        return LazyTensor(who, parts, pieces, dtype, lambda rank: self.local(rank, path, which))

    def _part(self, rank: int, path: str) -> LocalPart:
        leaf = self._leaf(rank, path)
        return LocalPart(rank, leaf.shape, leaf.dtype, leaf.device, leaf.layout, self.records[rank].axes)

    def _check_copies(self, found: LazyTensor) -> None:
        differing = found.differing_replicas()
        if differing:
            worst = differing[0]
            raise DumpError(
                f"{found.who}: nothing says how the tensors of ranks {list(found.ranks)} make one, and they are no "
                f"copies: ranks {list(worst.ranks)} and {list(worst.other_ranks)} differ in {worst.count} of "
                f"{prod(found.shape)} values, first at {list(worst.index)}. Declare dims= at the dump, or in a rule of "
                f"the plan file; or read each rank's own with `local`.{self._what_is_missing()}"
            )

    def _what_is_missing(self) -> str:
        refused = next((r.not_encoded["layout"] for r in self.records.values() if "layout" in r.not_encoded), None)
        absent = list(self.missing_ranks)
        return (f" (There is no dump of ranks {absent}.)" if absent else "") + (
            f" (A layout was declared that does not fit: {shown(refused)})" if refused is not None else ""
        )

    def _restored(self, value: Any, record: DumpRecord, rank: int) -> Any:
        if isinstance(value, list):
            return [self._restored(item, record, rank) for item in value]
        if not isinstance(value, dict):
            return value
        if set(value) != {TENSOR_MARK}:
            return {key: self._restored(item, record, rank) for key, item in value.items()}
        name = f"extras{value[TENSOR_MARK]}"
        if record.file is None:
            raise DumpError(
                f"{self._who(rank)}: a tensor is among its metadata, and at the level {record.level!r} none is saved."
            )
        with opened(self._directory, record.file) as descriptor:
            file = read_header(descriptor, f"{self._directory}/{shown(record.file)}")
            entry = file.entries.get(name)
            if entry is None:
                raise DumpError(f"{file.where}: it has no tensor {shown(name)!r}, which its metadata names.")
            return map_tensor(descriptor, file, name, _dtype_named(entry.dtype, file.where), entry.shape)


def _torch_dtype(leaf: DumpedLeaf, where: str) -> torch.dtype:
    return _dtype_named(leaf.dtype, where)


def _dtype_named(name: str, where: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise DumpError(f"{where}: this torch {torch.__version__} has no dtype {shown(name)!r}.")
    return dtype
