"""Whether an exception was raised by a signal handler of the program, or by the call that it interrupted."""

from __future__ import annotations

import inspect


def is_from_signal_handler(error: BaseException) -> bool:
    """Whether a Python signal handler raised this exception, which the calling function has caught.

    A handler may run, and raise, between any two steps of the main thread. Its `TimeoutError` is then an OSError to
    whoever catches those around a socket, and is not theirs. Python calls a handler with the frame that it interrupted,
    which is also the frame that it returns to.
    """
    # Not the frame that caught it. To ask that for its variables would make them live on in a cycle with the exception.
    traceback = error.__traceback__.tb_next if error.__traceback__ is not None else None
    while traceback is not None:
        frame, caller = traceback.tb_frame, traceback.tb_frame.f_back
        if caller is not None:
            arguments = inspect.getargvalues(frame)
            given = [arguments.locals.get(name) for name in arguments.args]
            given += arguments.locals.get(arguments.varargs or "", ())
            if any(value is caller for value in given):
                return True
        traceback = traceback.tb_next
    return False
