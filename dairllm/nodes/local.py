"""One node that computes the whole model: the graph for one node, run from the model's file in place."""

from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from dairllm.engine.executor import Executor
from dairllm.engine.program import compile_program
from dairllm.engine.weights import FileWeights
from dairllm.errors import EngineError
from dairllm.formats.model_file import ModelFile
from dairllm.graph.build import LOGITS_PIPE, TOKEN_PIPE, build_graph
from dairllm.graph.types import FloatType

__all__ = ["PROMPT_ROWS", "LocalNode", "default_sync"]

PROMPT_ROWS = 256
"""Rows of a prompt that go through the layers together."""


def default_sync(weight_type: FloatType) -> FloatType:
    """What crosses the wire where nobody chose:

    F32 for F32 weights, else Q80. A local run rounds likewise, so that its answer is a cluster's.
    """
    return FloatType.F32 if weight_type == FloatType.F32 else FloatType.Q80


class LocalNode:
    """Owns the executor and the program; a context manager that closes them. The model file stays the caller's and must stay open.

    Args:
        model: open; its spec's seq_len is the context length.
        n_threads: compute threads.
        kernels: a form of dairllm.kernels.forms, or "auto".
        sync: type of the pipe ZQ; `default_sync` if None.

    Raises:
        ConfigError: this processor cannot run that form.
        GraphError: the model has a shape that we cannot compute.
    """

    def __init__(self, model: ModelFile, *, n_threads: int, kernels: str = "auto", sync: FloatType | None = None) -> None:
        spec = model.spec
        self.seq_len, self.vocab_size = spec.seq_len, spec.vocab_size
        self.n_batches = min(PROMPT_ROWS, spec.seq_len)
        network, (node,) = build_graph(spec, 1, default_sync(spec.weight_type) if sync is None else sync, self.n_batches)
        self._executor = Executor(n_threads, kernels).start()
        try:
            self._program = compile_program(network, node, FileWeights(model), n_threads=n_threads)
        except BaseException:
            self._executor.close()
            raise
        self._tokens, self._logits = (self._program.values(pipe) for pipe in (TOKEN_PIPE, LOGITS_PIPE))
        self.kernel_form, self.n_threads = self._executor.form, n_threads

    def feed(self, tokens: list[int], position: int) -> NDArray[np.float32]:
        """Compute tokens at position, position + 1, ...; returns the logits after the last of them, float32 [vocab], a
        view until the next call.

        Raises:
            EngineError: no token, a token outside of the vocabulary, or no room for so many.
        """
        if not tokens or min(tokens) < 0 or max(tokens) >= self.vocab_size:
            raise EngineError(f"token ids must lie in 0..{self.vocab_size - 1} and be at least one")
        if position < 0 or position + len(tokens) > self.seq_len:
            raise EngineError(f"positions {position} to {position + len(tokens) - 1}: the context has room for {self.seq_len}")
        last = self._program.n_segments - 1
        rows = 0
        for first in range(0, len(tokens), self.n_batches):
            batch = tokens[first : first + self.n_batches]
            rows = len(batch)
            self._tokens[:rows, 0] = batch
            end = first + rows == len(tokens)
            if rows == 1 and end:
                self._executor.run(self._program, 0, last + 1, position + first, 1)
            else:
                self._executor.run(self._program, 0, last, position + first, rows)
                if end:
                    # the last segment is the classifier, wanted for the last row alone
                    self._executor.run(self._program, last, last + 1, position + first, rows, first_row=rows - 1)
        logits: NDArray[np.float32] = self._logits[rows - 1]
        return logits

    def close(self) -> None:
        self._executor.close()

    def __enter__(self) -> "LocalNode":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
