"""What can go wrong, as one tree. Every message says what happened, what it means, and what to do.

GrafterError
|-- ConfigError            a setting is missing, misspelt or illegal; read before anything is opened
|   `-- FilterError        a filter expression does not parse, or uses what filters may not use
|-- UsageError             one call of the public functions was made with arguments it cannot take
|   |-- DirectionConflict  two filters match one point
|   `-- LayoutError        a layout is none: its text, its sizes, or how the ranks of a job fit together
|-- RunError               the run is over for every rank of both jobs
|   |-- JoinError          the two jobs could not agree to start
|   |-- PairingError       the two jobs ask for different points
|   |-- PeerLostError      a process of the run, or its store, is gone
|   |-- PointTimeoutError  no rank is gone or provably stuck, but the time is up
|   `-- ProtocolError      a message is unsigned, empty, or not what the protocol allows
|-- TransformError         a user transform cannot be loaded
|-- DumpError              a directory, file or record of dumps is not what the format allows, or is not there
|-- PointFailed            one point failed and `on_transform_error` is `raise`; or a write that all had agreed on did
`-- WriteRefused           this value may not be written into this tensor; nothing was written
"""

from __future__ import annotations


class GrafterError(RuntimeError):
    """The root: `except grafter.GrafterError` catches everything that grafter raises on purpose."""


class ConfigError(GrafterError, ValueError):
    """A setting is missing, misspelt or illegal. Raised before anything is opened."""


class FilterError(ConfigError):
    """A filter expression does not parse, or uses syntax that filters do not have."""


class UsageError(GrafterError, TypeError):
    """A public function was called with arguments it cannot take; the message names the argument."""


class DirectionConflict(UsageError):
    """Two filters match the same point, so its direction is not decided."""


class LayoutError(UsageError, ValueError):
    """A layout is none: its text does not parse, or what it says of the ranks of a job does not fit together."""


class RunError(GrafterError):
    """The run is over for every rank of both jobs; every later matched point raises the same text."""


class JoinError(RunError):
    """The two jobs could not agree to start: a place claimed twice, versions or filters that differ."""


class PairingError(RunError):
    """The two jobs ask for different points, or ranks of one role describe one point differently."""


class PeerLostError(RunError):
    """A process of the run, or the store that connects them, is gone."""


class PointTimeoutError(RunError):
    """A point waited `timeout` seconds. No rank is provably gone or stuck; the message shows the board."""


class ProtocolError(RunError):
    """What a peer sent is unsigned, empty, or not what the protocol allows."""


class TransformError(GrafterError):
    """A user transform cannot be loaded, or is not what a transform must be."""


class DumpError(GrafterError):
    """A directory, file or record of dumps is not what the format allows, or lacks what was asked for."""


class PointFailed(GrafterError):
    """One point failed on every receiver, nothing was written, and `on_transform_error` is `raise`.

    Also: all receivers had agreed to write, and this one could not (out of memory). The message says which leaves it
    has written.
    """


class WriteRefused(GrafterError):
    """This value may not be written into this tensor (shape, dtype, overlap, gradient rule)."""
