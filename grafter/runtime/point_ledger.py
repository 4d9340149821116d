"""The ledger of one rank's points: its file, failures that are reported later, and failures in the job's log.

record          a line of this rank's own point; a sender's is kept, since a receiver may still report that it failed
write_line      a line from any thread
report_failure  a receiver's: the senders' ledgers say `failed` about two seconds later
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from pathlib import Path

from grafter.core.points import PointKey
from grafter.core.processes import is_from_signal_handler
from grafter.core.records import LedgerLine, LedgerRecord, RankSummary
from grafter.core.roles import Place
from grafter.store.ledger import LedgerWriter
from grafter.wire.failed_points import FailedPoints, SentPoints
from grafter.wire.monitor.housekeeping import Housekeeping
from grafter.wire.store_client import StoreClient

logger = logging.getLogger("grafter")

# How often a line is written again if a signal's handler raises meanwhile.
_LEDGER_TRIES = 3
# How long a rank that leaves waits for the store to take its last failures.
_LAST_REPORT_SECONDS = 2.0
_MOST_LINES = 100
_LONGEST_REASON = 600


class PointLedger:
    """The ledger of one rank. `record` and `report_failure` are called on the dump thread, `poll` on housekeeping's."""

    def __init__(self, place: Place, run_directory: Path, run_prefix: str, housekeeping: Housekeeping) -> None:
        self._place, self._housekeeping = place, housekeeping
        self._writer = LedgerWriter(run_directory / place.role, place.role_rank)
        self.failures = FailureLog(place.who)
        self._failed = FailedPoints(run_prefix, self._note_failure)
        self._sent: SentPoints[LedgerLine] = SentPoints()
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        """The file."""
        return self._writer.path

    def record(self, line: LedgerLine, key: PointKey | None = None) -> None:
        """Write one line. key: of a point whose receivers may still report that it failed."""
        reason = None
        with self._lock:
            self._write(line)
            if key is not None:
                reason = self._sent.add(key.digest, line)
        if key is not None and reason is not None:
            self._note_failure(key.digest, reason)

    def write_line(self, record: LedgerRecord) -> None:
        """Write one line; called on any thread."""
        if record.outcome == "failed" and self._housekeeping.aborted is None:
            self.failures.add(record.name, f"{record.name!r} (step={record.step})", record.reason or "")
        with self._lock:
            self._write(record)

    def _write(self, record: LedgerRecord | LedgerLine) -> None:
        arrived: BaseException | None = None
        for _ in range(_LEDGER_TRIES):
            try:
                self._writer.write(record)
                break
            except BaseException as error:
                if not isinstance(error, Exception) or is_from_signal_handler(error):
                    # The program's own exception, which must not cost the line. A line that is there twice counts once.
                    arrived = arrived or error
                    continue
                if not isinstance(error, OSError):
                    raise
                # A full disk costs the ledger, not the run; logged for each point, so that it is not missed.
                logger.error("grafter: the ledger %s cannot be written: %s", self.path, error)
                break
        if arrived is not None:
            try:
                raise arrived
            finally:
                # Otherwise a cycle with this frame would keep it alive, and what the callers hold with it.
                del arrived

    # Failures that receivers report to senders.

    def report_failure(self, key: PointKey, reason: str) -> None:
        """Called by every receiver of a point that has failed: the senders learn it within about two seconds."""
        self._failed.add(key.digest, reason)

    def expect_failures(self) -> None:
        """This rank sends: from now on it reads which points have failed."""
        self._failed.is_listening = True

    def poll(self, client: StoreClient) -> None:
        """Called on the housekeeping thread, once a second."""
        self._failed.tell(client)
        self._failed.hear(client)

    def _note_failure(self, digest: str, reason: str) -> None:
        with self._lock:
            line = self._sent.take_failed(digest, reason)
            if line is not None:
                self._write({**line, "outcome": "failed", "reason": reason})
        if line is not None and self._place.role_rank == min(line["participants"][self._place.role]):
            self.failures.add(line["name"], f"{line['name']!r} (step={line['step']})", reason)

    # At the end.

    def leave(self, client: StoreClient) -> None:
        """Report the last failures. Called before this rank says that it leaves."""
        self._failed.leave(client, _LAST_REPORT_SECONDS)

    def write_summary(self, summary: RankSummary) -> None:
        """Raises OSError."""
        self._writer.write_summary(summary)

    def close(self) -> None:
        """No line is written after this."""
        self._writer.close()
        self.failures.close()


class FailureLog:
    """The failures of one rank's points in the job's log: one line for each name and reason, and then a count.

    Called on the dump thread, and on the housekeeping thread where a sender learns of a failure.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self._lock = threading.Lock()
        # By name and reason.
        self._counts: Counter[tuple[str, str]] = Counter()
        self._left_out = 0

    def add(self, name: str, point: object, reason: str) -> None:
        """point: as messages name it."""
        reason = " ".join(reason.split())
        if len(reason) > _LONGEST_REASON:
            reason = f"{reason[:_LONGEST_REASON]}... (the ledger has all of it)"
        with self._lock:
            known = (name, reason)
            is_new = known not in self._counts
            if is_new and len(self._counts) >= _MOST_LINES:
                self._left_out += 1
                return
            self._counts[known] += 1
        if is_new:
            logger.warning("grafter: %s: the point %s failed, and nothing was written: %s", self._who, point, reason)

    def close(self) -> None:
        """Log how many more there were."""
        with self._lock:
            again = {name: 0 for name, _ in self._counts}
            for (name, _), count in self._counts.items():
                again[name] += count - 1
            left_out = self._left_out
        repeated = [f"{name!r} {count} more time{'s' * (count != 1)}" for name, count in again.items() if count]
        if repeated:
            more = f", and {len(repeated) - 8} other points" if len(repeated) > 8 else ""
            logger.warning(
                "grafter: %s: failed again for a reason given above: %s%s", self._who, ", ".join(repeated[:8]), more
            )
        if left_out:
            logger.warning("grafter: %s: %d more failures, whose reasons are in the ledger alone", self._who, left_out)
