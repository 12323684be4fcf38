"""Computing with weights that are used where they lie in a mapped file, for as long as that is the file that was opened.

What somebody writes into the file shows in the map at once, and what is cut off it would end the process when it is touched (SIGBUS). So
the file is looked at before a pass and after it, which takes microseconds. What is left is a file that is cut short within a pass.
"""

import os
from collections.abc import Iterable

from dairllm.engine.program import Program
from dairllm.engine.weights import WeightsFile
from dairllm.errors import EngineError
from dairllm.runtime.compute import Compute

__all__ = ["ResidentCompute"]


class ResidentCompute:
    """Takes the place of a node's `Compute` for one program, from its making to `close`.

    Args:
        compute: open; stays the caller's.
        n_segments: of the program.
        files: that its weights lie in.

    Raises:
        EngineError: a file is another one by now.
    """

    def __init__(self, compute: Compute[Program], n_segments: int, files: Iterable[WeightsFile]) -> None:
        self._compute, self._n_segments = compute, n_segments
        self._files: list[tuple[WeightsFile, int]] = []
        try:
            for file in files:
                self._files.append((file, os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)))
            self._check()
        except OSError as error:
            self.close()
            raise EngineError(f"{error.filename} cannot be opened: {error.strerror or error}") from None
        except BaseException:
            self.close()
            raise

    async def run(self, program: Program, first: int, stop: int, position: int, rows: int, first_row: int = 0) -> None:
        """As `Compute.run`. Raises as well:

        EngineError: a file was cut or written to.
        """
        if first == 0:
            self._check()
        await self._compute.run(program, first, stop, position, rows, first_row)
        if stop == self._n_segments:
            self._check()  # what was written meanwhile may have been computed with

    def _check(self) -> None:
        for file, descriptor in self._files:
            change = file.stamp.change(file.path, descriptor)
            if change is not None:
                raise EngineError(change)

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop()[1])
