"""SIGTERM and SIGINT as a request that the loop answers at its next step boundary."""

import os
import signal
import threading
from types import FrameType
from typing import Any

from openblip.train import distributed


class StopSignals:
    """Within a `with` block SIGTERM and SIGINT set `is_requested`; a second SIGINT raises KeyboardInterrupt.

    The handlers that were there before come back at its end. Only the main thread can handle signals: in
    another the block does nothing. Under torchrun a second SIGINT is no sign of impatience, for the launcher
    passes on the Ctrl-C that the terminal has sent to all processes already.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._handle) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested and number == signal.SIGINT and distributed.world_size() == 1:
            raise KeyboardInterrupt
        if not self.is_requested:  # os.write, since the signal may have interrupted a print
            os.write(2, b"\nstopping and saving after this step (Ctrl-C again: at once, without saving)\n")
        self.is_requested = True
