"""Standing: whether this rank still takes part in its run, and what a point that cannot be grafted is told."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from grafter.config.settings.config import GrafterConfig
from grafter.core.roles import RankIdentity
from grafter.errors import PeerLostError, RunError, UsageError
from grafter.runtime.rank_summary import last_error
from grafter.runtime.session import Session

logger = logging.getLogger("grafter")


class RankStatus:
    """Of one rank, from its first call on. Changed under the lock of its points."""

    def __init__(self, config: GrafterConfig, place: RankIdentity) -> None:
        self._config, self.who = config, place.who
        # The process that may graft: a child that is forked from it is another one.
        self.process_id = os.getpid()
        self.is_closed = False
        # What ended the run for this rank.
        self.fault: BaseException | None = None
        # Why it goes on ungrafted, where the other job was lost.
        self.detached: str | None = None

    def refuse_where_impossible(self, name: str, site: str) -> None:
        """Raises UsageError for a matched point that can be neither grafted nor saved here."""
        if os.getpid() != self.process_id:
            raise UsageError(
                f"the point {name!r} at {site} is in a process that was forked from {self.who} (a data loader's "
                f"worker?). Only the process that joined can graft; dump in it, or start the child with spawn."
            )
        if self.is_closed:
            raise UsageError(f"the point {name!r} at {site} comes after grafter.close().")
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            raise UsageError(
                f"the point {name!r} at {site} is in a CUDA graph capture, where nothing can be read or exchanged: the "
                f"replay would repeat the capture's values. Run this part without CUDA graphs (eager, or "
                f"`mode='default'` for torch.compile) while grafting."
            )

    def end_where_interrupted(self, session: Session | None) -> None:
        """This rank leaves with an error while another thread of it is at a point: no rank shall wait there."""
        error = last_error(self.fault)
        if error is not None and session is not None:
            session.housekeeping.abort(PeerLostError(f"{self.who} has left with {type(error).__name__}: {error}"))

    def end_run(self, error: RunError, value: Any, session: Session | None) -> Any:
        """The run is over: every rank of both jobs must hear of it, and raise the same."""
        if session is not None:
            housekeeping = session.housekeeping
            if isinstance(error, PeerLostError):
                error = housekeeping.fuller_story(error)
            elif housekeeping.aborted is None:
                error = housekeeping.abort(error, session.client)
        self.fault = error
        if not isinstance(error, PeerLostError) or self._config.on_peer_loss == "raise":
            raise error
        self.detached = str(error)
        logger.warning("grafter: %s goes on ungrafted from here (on_peer_loss=detach): %s", self.who, error)
        return value
