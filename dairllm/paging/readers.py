"""Reader threads: they own the system calls that bring blocks into memory and give them up, so that neither the event loop nor the
computation waits for the disk unless what it needs is not there yet.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence

__all__ = ["Readers"]


class Readers:
    """Threads that work off calls in their order, urgent ones first. A call must not raise.

    Args:
        count: of threads.

    Attributes:
        count: of those that work; may be changed to fewer and back.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._calls: deque[Callable[[], None]] = deque()
        self._change = threading.Condition()
        self._stopped = False
        self._threads = [threading.Thread(target=self._work, args=(n,), name=f"reader-{n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, calls: Sequence[Callable[[], None]], *, urgent: bool = False) -> None:
        """Hand over calls; urgent ones go before all that wait."""
        with self._change:
            if urgent:
                self._calls.extendleft(reversed(calls))
            else:
                self._calls.extend(calls)
            if self.count < len(self._threads):  # those that may not work could be the ones that are woken
                self._change.notify_all()
            else:
                self._change.notify(len(calls))

    def close(self) -> None:
        """Forget what waits and end the threads; blocks until what is being read has come."""
        with self._change:
            self._calls.clear()
        self.finish()

    def finish(self) -> None:
        """Do what waits and end the threads."""
        with self._change:
            self._stopped = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self, number: int) -> None:
        while True:
            with self._change:
                while not (self._calls and number < self.count) and not self._stopped:
                    self._change.wait()
                if not self._calls:
                    return
                call = self._calls.popleft()
            call()
            del call  # it may hold what someone else wants to let go
