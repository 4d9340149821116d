"""The saver: takes a point as it is at the call, and writes it exactly once, whatever happens afterwards.

at the call     limits; snapshots; encoded metadata                     (`take`, on the program's thread)
after a graft   second snapshots, and the outcome of the point          (`finish`)
in background   figures or the file, then the line                      (`_write`, on the write queue's thread)
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

from grafter.config.options import PointOptions
from grafter.config.settings.config import GrafterConfig
from grafter.config.settings.field_types import DumpLevel
from grafter.core.points import PointKey
from grafter.core.processes import is_from_signal_handler
from grafter.core.records import PointOutcome
from grafter.core.roles import Direction, RankIdentity
from grafter.core.sizes import read_size
from grafter.core.tokens.tokens import TokenRuns
from grafter.core.untraced import unobserved
from grafter.store.dumps.limits import Limits
from grafter.store.dumps.pending_record import Parts, PendingRecord, leaf_of, tensors_of
from grafter.store.dumps.record import DumpedLeaf, DumpRecord, MetadataEncoder, safe_repr
from grafter.store.dumps.snapshot import (
    Buffers,
    NothingToSave,
    Snapshot,
    held_bytes,
    saveable,
    snapshot_bytes,
    take_snapshot,
)
from grafter.store.dumps.termination import Termination
from grafter.store.dumps.writer import WriteQueue, earlier_dumps, file_name, record_metadata, record_text, write_tensors
from grafter.store.written_files import LineFile

logger = logging.getLogger("grafter")

_LONGEST_RECORD = 1 << 24
# How long a process that is about to end waits for one file.
_PATIENCE_SECONDS = 60.0
# The fields of a record in their order, with their defaults.
_NO_FIELDS = {name: field.get_default(call_default_factory=True) for name, field in DumpRecord.model_fields.items()}
_UNFINISHED = "the process ended, or the run did, while this point met the other side"


class Saver:
    """The writer of one rank's dumps. `take` and `finish` are called under the lock of its points."""

    def __init__(self, config: GrafterConfig, place: RankIdentity, role_directory: Path, limits: Limits) -> None:
        """Raises ConfigError if the directory holds this rank's dumps of an earlier run."""
        self._place, self._directory = place, role_directory
        self._exclude = config.dump_exclude_keys
        self._rank_name = f"rank{place.role_rank}"
        try:
            (role_directory / self._rank_name).mkdir(parents=True, exist_ok=True)
            self._log = LineFile(role_directory / f"rank{place.role_rank}.dumps.jsonl", is_new=True)
        except FileExistsError as error:
            raise earlier_dumps(role_directory, place.who) from error
        queue_bytes = read_size(config.dump_queue_bytes)
        self._buffers = Buffers(queue_bytes, in_order=True)
        self._write_queue = WriteQueue(queue_bytes, place.who)
        self._limits = limits
        self._order = 0
        self._unfinished: dict[int, PendingRecord] = {}
        self._is_closed = False
        # Written by the write queue's thread.
        self.outcomes: Counter[str] = Counter()
        self._has_reported_failure = False
        self._termination = Termination(self._end_all)
        self._termination.install()

    # On the program's thread.

    def take(
        self,
        key: PointKey,
        tags: dict[str, Any],
        value: Any,
        options: PointOptions,
        site: str,
        participants: tuple[int, ...],
        axes: tuple[tuple[str, int, int], ...],
        direction: Direction | None = None,
        header: str | None = None,
    ) -> PendingRecord | None:
        """Take the point as it is now; None if a limit is reached. The value may be changed once this returns.

        value: a tensor or any pytree; the record says what cannot be saved. header: this rank's header, if the point is
        recorded for a later graft; such a point is saved in full, whatever dumps leave out. Waits while the write
        queue is full.
        """
        with unobserved(), torch.no_grad():
            parts = Parts(value, options)
            level: DumpLevel = options.dump_level if header is None else "full"
            nbytes = sum(snapshot_bytes(tensor) for _, tensor in parts.leaves) if level == "full" else 0
            if header is None and not self._limits.take(nbytes):
                return None
            fields: dict[str, Any] = {
                "time": time.time(), "direction": direction, "participants": participants, "axes": axes,
                "call_site": site, "header": header,
            }  # fmt: skip
            pending = PendingRecord(self._order, key, level, fields)
            self._order += 1
            self._encode(pending, tags, parts, options, self._exclude if header is None else frozenset())
            pending.unsaved = {**parts.unsaved, **dict.fromkeys((leaf.path for leaf, _ in parts.leaves), _UNFINISHED)}
            self._unfinished[pending.order] = pending
            for leaf, tensor in parts.leaves:
                pending.leaves.append(leaf)
                leaf.value = self._snapshot_of_leaf(pending, tensor, leaf.path)
                if leaf.value is not None:
                    del pending.unsaved[leaf.path]
            pending.reasons += parts.reasons
            return pending

    def finish(
        self,
        pending: PendingRecord,
        outcome: PointOutcome | None = None,
        grafted: Any = None,
        reason: str | None = None,
    ) -> None:
        """Hand the completed point to the writer. grafted: the value after a graft wrote it."""
        if outcome == "grafted":
            with unobserved(), torch.no_grad():
                parts = Parts(grafted, None)
                pending.unsaved |= parts.unsaved
                after = {leaf.path: tensor for leaf, tensor in parts.leaves}
                for leaf in pending.leaves:
                    if leaf.path in after:
                        leaf.grafted = self._snapshot_of_leaf(pending, after[leaf.path], leaf.path)
        pending.fields["outcome"] = outcome
        if reason is not None:
            pending.reasons.append(reason)
        self._hand_over(pending)

    def end_step(self) -> None:
        """Wait until the points of earlier steps are on disk. Those of this step may still be waiting."""
        self._write_queue.wait_for_last_step()

    def flush(self) -> None:
        """Wait until all completed points are on disk."""
        self._write_queue.flush()

    def close(self) -> None:
        """Write everything to disk, including points whose exchange is unfinished, and end the writing thread."""
        if self._is_closed:
            return
        self._is_closed = True
        self._end_all()
        self._write_queue.close()
        self._termination.uninstall()
        self._log.close()

    def _end_all(self) -> None:
        """Write all points as they are. A signal handler may call this at any time, even in the middle of `take`."""
        for pending in list(self._unfinished.values()):
            if not pending.is_over:
                pending.reasons.append(_UNFINISHED)
            self._hand_over(pending)
        self._write_queue.flush(_PATIENCE_SECONDS)

    def _hand_over(self, pending: PendingRecord) -> None:
        pending.is_over = True
        # A SIGTERM handler may run in between and hand it over as well; `_write` ignores the second one.
        if pending.order in self._unfinished:
            self._write_queue.put(partial(self._write, pending))
            self._unfinished.pop(pending.order, None)

    def _snapshot_of_leaf(self, pending: PendingRecord, tensor: torch.Tensor, path: str) -> Snapshot | None:
        snapshot = self._snapshot(pending, tensor, path)
        if snapshot is None:
            pending.unsaved[path] = pending.reasons[-1]
        return snapshot

    def _snapshot(self, pending: PendingRecord, tensor: torch.Tensor, what: str) -> Snapshot | None:
        nbytes = held_bytes(tensor)
        self._write_queue.reserve(nbytes)
        pending.reserved += nbytes
        try:
            return take_snapshot(tensor, self._buffers)
        except (RuntimeError, MemoryError, NotImplementedError) as error:
            if is_from_signal_handler(error):
                raise
            # Out of memory, or a dtype that cannot be copied: only this tensor is lost, not the run.
            pending.reasons.append(f"{what or 'the tensor'}: {type(error).__name__}: {safe_repr(str(error))}")
            return None

    def _encode(
        self, pending: PendingRecord, tags: dict[str, Any], parts: Parts, options: PointOptions, exclude: frozenset[str]
    ) -> None:
        encoder, fields = MetadataEncoder(exclude), pending.fields
        fields["name"] = encoder.text(pending.key.name, "name")
        fields["tags"] = {
            encoder.text(tag, "tags"): encoder.encode(value, f"tags.{tag}") for tag, value in tags.items()
        }
        fields["others"] = {
            encoder.text(path, "others"): encoder.encode(value, f"others{path}") for path, value in parts.others
        }
        if parts.layout_error is not None:
            encoder.not_encoded["layout"] = parts.layout_error
        if options.extras is not None:
            extras = encoder.encode(options.extras, "extras")
            fields["extras"] = extras if isinstance(extras, dict) else {"": extras}
        if options.tokens is not None:
            fields["tokens"] = _token_runs(options.tokens, encoder)
        for number, tensor in enumerate(encoder.tensors):
            if pending.level != "full":
                encoder.not_encoded[f"extras{number}"] = f"a tensor, which the level {pending.level} does not save"
                continue
            try:
                snapshot = self._snapshot(pending, saveable(tensor), f"extras{number}")
            except NothingToSave as reason:
                pending.reasons.append(f"extras{number}: {reason}")
                continue
            if snapshot is not None:
                pending.extras[number] = snapshot
        fields["not_encoded"], fields["excluded"] = encoder.not_encoded, tuple(encoder.excluded)

    # On the write queue's thread.

    def _write(self, pending: PendingRecord) -> None:
        if pending.is_written:
            return
        pending.is_written = True
        snapshots = pending.snapshots
        try:
            for snapshot in snapshots:
                snapshot.wait()
            self._write_point(pending)
            self.outcomes["saved"] += 1
        except BaseException as error:
            self._report_failure(pending, error)
        finally:
            for snapshot in snapshots:
                self._buffers.give_back(snapshot.buffer)
            self._write_queue.release(pending.reserved)

    def _write_point(self, pending: PendingRecord) -> None:
        tensors = tensors_of(pending)
        file = None
        if pending.level == "full" and tensors:
            file = f"{self._rank_name}/{file_name(pending.order, pending.key.name)}"
        leaves = tuple(
            leaf_of(leaf, pending) for leaf in pending.leaves if leaf.value is not None or leaf.grafted is not None
        )
        record = self._record(pending, leaves, file)
        text = record_text(record)
        if len(text) > _LONGEST_RECORD:
            too_long = {**record["not_encoded"], "extras": f"{len(text)} bytes of JSON are more than a record takes"}
            record |= {"extras": None, "not_encoded": too_long}
            text = record_text(record)
        if file is not None:
            try:
                write_tensors(f"{self._directory}/{file}", tensors, record_metadata(text))
            except Exception as error:
                # The line is small and may still fit on the disk.
                lost = f"the file could not be written: {type(error).__name__}: {error}"
                self._log.append(record_text({**record, "file": None, "reason": lost}).encode())
                raise
        self._log.append(text.encode())

    def _record(self, pending: PendingRecord, leaves: tuple[DumpedLeaf, ...], file: str | None) -> dict[str, Any]:
        """The fields of a `DumpRecord`."""
        key, place = pending.key, self._place
        return {
            **_NO_FIELDS, "order": pending.order, "step": key.step, "phase": key.phase, "occurrence": key.occurrence,
            "role": place.role, "role_rank": place.role_rank, "role_world_size": place.role_world_size,
            "level": pending.level, "file": file, "reason": "; ".join(pending.reasons) or None,
            "unsaved": pending.unsaved, "leaves": leaves,
            **pending.fields,
        }  # fmt: skip

    def _report_failure(self, pending: PendingRecord, error: BaseException) -> None:
        self.outcomes["lost"] += 1
        if not self._has_reported_failure:
            self._has_reported_failure = True
            logger.error(
                "grafter: %s: the dump of %s is lost; the run continues. Others may be lost too: the rank summary "
                "counts them, and they are not reported one by one: %s: %s",
                self._place.who, pending.key, type(error).__name__, error,
            )  # fmt: skip


def _token_runs(tokens: Any, encoder: MetadataEncoder) -> TokenRuns | None:
    try:
        runs = tokens.record()
        if not isinstance(runs, TokenRuns):
            raise TypeError("tokens= is not a grafter.Tokens")
        return runs
    except Exception as error:
        if is_from_signal_handler(error):
            raise
        encoder.not_encoded["tokens"] = f"{safe_repr(tokens)}: {type(error).__name__}: {safe_repr(str(error))}"
        return None
