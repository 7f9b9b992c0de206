"""SIGINT and SIGTERM: the first ends the work at its next commit, the second where it stands."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from dataflex import environment
from dataflex.commands.console import Console
from dataflex.progress import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNALS_HEARD = frozenset(map(int, SIGNALS))
END = 0  # no signal has this number
NOTICE = b"\nfinishing the batch in hand; once more to stop at once\n"


@contextlib.contextmanager
def stoppable(console: Console) -> Iterator[None]:
    """While the block runs, let a signal raise `Interrupted`: out of the next `advance` where a task is under way,
    else, and the second time, at once.

    Only the main thread may set a handler, and is the one it is called in; elsewhere the caller's own handling holds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()
    launched = environment.launched()

    def handle(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a forked helper has no commit to wait for
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if console.stop_code and launched:
            return  # the launcher passes on what this process was sent as well, and kills what does not end
        at_once = bool(console.stop_code) or not console.tasks_open
        console.stop_code = 128 + number
        if at_once:
            raise Interrupted(console.stop_code)

    former = [signal.signal(number, handle) for number in SIGNALS]
    try:
        with _answered_at_once(console):
            yield
    finally:
        for number, handler in zip(SIGNALS, former, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def _answered_at_once(console: Console) -> Iterator[None]:
    """While the block runs, say on the first signal what will happen, if a task is under way.

    Python calls a handler when it is back from what it has called, and a backward pass takes seconds. The signal itself
    puts its number into a pipe, which a thread reads.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)

    def listen() -> None:
        answered = False
        while (numbers := os.read(heard, 64)) and END not in numbers:
            if SIGNALS_HEARD & set(numbers) and console.tasks_open and not answered:
                answered = True
                if not console.quiet:
                    os.write(2, NOTICE)  # past the streams, one of which the signal may have come in the middle of

    listener = threading.Thread(target=listen, daemon=True)
    former = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former)
        os.write(told, bytes([END]))
        listener.join()
        os.close(heard)
        os.close(told)
