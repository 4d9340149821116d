"""The saver: takes a point as it is at the call, and sees to it that it is written, once, whatever comes after.

at the call     limits; the snapshot; metadata encoded                  (`take`, on the program's thread)
after a graft   a second snapshot, and what the point came to           (`finish`)
in background   figures or the file, then the line                      (`_write`, on the backlog's thread)
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
from grafter.core.points import PointKey
from grafter.core.processes import is_from_signal_handler
from grafter.core.records import Outcome
from grafter.core.roles import Direction, Place
from grafter.core.rows.tokens import TokenRuns
from grafter.core.sizes import read_size
from grafter.core.untraced import unobserved
from grafter.store.dumps.limits import Limits
from grafter.store.dumps.record import DumpedLeaf, DumpRecord, Level, MetadataEncoder, safe_repr
from grafter.store.dumps.snapshot import (
    Buffers,
    NothingToSave,
    Snapshot,
    held_bytes,
    saveable,
    snapshot_bytes,
    take_snapshot,
)
from grafter.store.dumps.taken import Parts, Taken, leaf_of, tensors_of
from grafter.store.dumps.termination import Termination
from grafter.store.dumps.writer import Backlog, earlier_dumps, file_name, record_metadata, record_text, write_tensors
from grafter.store.written_files import LineFile

logger = logging.getLogger("grafter")

_LONGEST_RECORD = 1 << 24
# A process that is to end waits no longer than this for one file.
_PATIENCE_SECONDS = 60.0
# In the order of the record, with what stands where nothing is said.
_NO_FIELDS = {name: field.get_default() for name, field in DumpRecord.model_fields.items()}
_UNFINISHED = "the process ended, or the run did, while this point met the other side"


class Saver:
    """One rank's dumps. `take` and `finish` are called under the lock of its points."""

    def __init__(self, config: GrafterConfig, place: Place, role_directory: Path, limits: Limits) -> None:
        """Raises ConfigError where the directory holds this rank's dumps of an earlier run."""
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
        self._backlog = Backlog(queue_bytes, place.who)
        self._limits = limits
        self._order = 0
        self._unfinished: dict[int, Taken] = {}
        self._is_closed = False
        # Written by the backlog's thread.
        self.outcomes: Counter[str] = Counter()
        self._has_told_failure = False
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
    ) -> Taken | None:
        """The point as it is now; None where a limit is reached. The value may be changed once this returns.

        value: a tensor or any pytree; what of it cannot be saved is told in the record. header: this rank's header as
        it travels, for a graft from this recording: what is to be grafted later is saved in full, whatever dumps leave
        out. Waits while the backlog is full.
        """
        with unobserved(), torch.no_grad():
            parts = Parts(value, options)
            level: Level = options.dump_level if header is None else "full"
            nbytes = sum(snapshot_bytes(tensor) for _, tensor in parts.leaves) if level == "full" else 0
            if header is None and not self._limits.take(nbytes):
                return None
            fields: dict[str, Any] = {
                "time": time.time(), "direction": direction, "participants": participants, "axes": axes,
                "call_site": site, "header": header,
            }  # fmt: skip
            taken = Taken(self._order, key, level, fields)
            self._order += 1
            self._encode(taken, tags, parts, options, self._exclude if header is None else frozenset())
            taken.unsaved = {**parts.unsaved, **dict.fromkeys((leaf.path for leaf, _ in parts.leaves), _UNFINISHED)}
            self._unfinished[taken.order] = taken
            for leaf, tensor in parts.leaves:
                taken.leaves.append(leaf)
                leaf.value = self._snapshot_of_leaf(taken, tensor, leaf.path)
                if leaf.value is not None:
                    del taken.unsaved[leaf.path]
            taken.reasons += parts.reasons
            return taken

    def finish(
        self, taken: Taken, outcome: Outcome | None = None, grafted: Any = None, reason: str | None = None
    ) -> None:
        """The point is over: hand it to the writer. grafted: what the program goes on with, where a graft wrote it."""
        if outcome == "grafted":
            with unobserved(), torch.no_grad():
                parts = Parts(grafted, None)
                taken.unsaved |= parts.unsaved
                after = {leaf.path: tensor for leaf, tensor in parts.leaves}
                for leaf in taken.leaves:
                    if leaf.path in after:
                        leaf.grafted = self._snapshot_of_leaf(taken, after[leaf.path], leaf.path)
        taken.fields["outcome"] = outcome
        if reason is not None:
            taken.reasons.append(reason)
        self._hand_over(taken)

    def end_step(self) -> None:
        """What was dumped before this step is on disk when this returns; this step's points may be under way."""
        self._backlog.wait_for_last_step()

    def flush(self) -> None:
        """All points that are over are on disk when this returns."""
        self._backlog.flush()

    def close(self) -> None:
        """Everything is on disk when this returns, also points in the middle of a meeting."""
        if self._is_closed:
            return
        self._is_closed = True
        self._end_all()
        self._backlog.close()
        self._termination.uninstall()
        self._log.close()

    def _end_all(self) -> None:
        """Also called by a signal's handler, in the middle of anything: what is half taken is written as it is."""
        for taken in list(self._unfinished.values()):
            if not taken.is_over:
                taken.reasons.append(_UNFINISHED)
            self._hand_over(taken)
        self._backlog.flush(_PATIENCE_SECONDS)

    def _hand_over(self, taken: Taken) -> None:
        taken.is_over = True
        # Whoever comes in between, as SIGTERM may, hands it over once more, which the writer sees.
        if taken.order in self._unfinished:
            self._backlog.put(partial(self._write, taken))
            self._unfinished.pop(taken.order, None)

    def _snapshot_of_leaf(self, taken: Taken, tensor: torch.Tensor, path: str) -> Snapshot | None:
        snapshot = self._snapshot(taken, tensor, path)
        if snapshot is None:
            taken.unsaved[path] = taken.reasons[-1]
        return snapshot

    def _snapshot(self, taken: Taken, tensor: torch.Tensor, what: str) -> Snapshot | None:
        nbytes = held_bytes(tensor)
        self._backlog.reserve(nbytes)
        taken.reserved += nbytes
        try:
            return take_snapshot(tensor, self._buffers)
        except (RuntimeError, MemoryError, NotImplementedError) as error:
            if is_from_signal_handler(error):
                raise
            # Out of memory, or a dtype that cannot be copied: it costs this tensor, not the run.
            taken.reasons.append(f"{what or 'the tensor'}: {type(error).__name__}: {safe_repr(str(error))}")
            return None

    def _encode(
        self, taken: Taken, tags: dict[str, Any], parts: Parts, options: PointOptions, exclude: frozenset[str]
    ) -> None:
        encoder, fields = MetadataEncoder(exclude), taken.fields
        fields["name"] = encoder.text(taken.key.name, "name")
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
            if taken.level != "full":
                encoder.not_encoded[f"extras{number}"] = f"a tensor, which the level {taken.level} does not save"
                continue
            try:
                snapshot = self._snapshot(taken, saveable(tensor), f"extras{number}")
            except NothingToSave as reason:
                taken.reasons.append(f"extras{number}: {reason}")
                continue
            if snapshot is not None:
                taken.extras[number] = snapshot
        fields["not_encoded"], fields["excluded"] = encoder.not_encoded, tuple(encoder.excluded)

    # On the backlog's thread.

    def _write(self, taken: Taken) -> None:
        if taken.is_written:
            return
        taken.is_written = True
        snapshots = taken.snapshots
        try:
            for snapshot in snapshots:
                snapshot.wait()
            self._write_point(taken)
            self.outcomes["saved"] += 1
        except BaseException as error:
            self._tell_failure(taken, error)
        finally:
            for snapshot in snapshots:
                self._buffers.give_back(snapshot.buffer)
            self._backlog.release(taken.reserved)

    def _write_point(self, taken: Taken) -> None:
        tensors = tensors_of(taken)
        file = None
        if taken.level == "full" and tensors:
            file = f"{self._rank_name}/{file_name(taken.order, taken.key.name)}"
        leaves = tuple(
            leaf_of(leaf, taken) for leaf in taken.leaves if leaf.value is not None or leaf.grafted is not None
        )
        record = self._record(taken, leaves, file)
        text = record_text(record)
        if len(text) > _LONGEST_RECORD:
            too_long = {**record["not_encoded"], "extras": f"{len(text)} bytes of JSON are more than a record takes"}
            record |= {"extras": None, "not_encoded": too_long}
            text = record_text(record)
        if file is not None:
            try:
                write_tensors(f"{self._directory}/{file}", tensors, record_metadata(text))
            except Exception as error:
                # The line is small, and may have room where the tensors have not.
                lost = f"the file could not be written: {type(error).__name__}: {error}"
                self._log.append(record_text({**record, "file": None, "reason": lost}).encode())
                raise
        self._log.append(text.encode())

    def _record(self, taken: Taken, leaves: tuple[DumpedLeaf, ...], file: str | None) -> dict[str, Any]:
        """The fields of a `DumpRecord`."""
        key, place = taken.key, self._place
        return {
            **_NO_FIELDS, "order": taken.order, "step": key.step, "phase": key.phase, "occurrence": key.occurrence,
            "role": place.role, "role_rank": place.role_rank, "role_world_size": place.role_world_size,
            "level": taken.level, "file": file, "reason": "; ".join(taken.reasons) or None, "unsaved": taken.unsaved,
            "leaves": leaves,
            **taken.fields,
        }  # fmt: skip

    def _tell_failure(self, taken: Taken, error: BaseException) -> None:
        self.outcomes["lost"] += 1
        if not self._has_told_failure:
            self._has_told_failure = True
            logger.error(
                "grafter: %s: the dump of %s is lost, and so may be others, which are counted (rank summary) and not "
                "told one by one; the run goes on: %s: %s",
                self._place.who, taken.key, type(error).__name__, error,
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
