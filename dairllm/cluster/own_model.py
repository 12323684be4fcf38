"""The model that a worker has on a disk of its own: which one it is, and what of it a root's graph needs."""

from pathlib import Path

import structlog

from dairllm.engine.located_weights import LocatedWeights
from dairllm.errors import GraphError, RemoteProtocolError
from dairllm.formats.digest import Progress, kept_digests, model_digests
from dairllm.formats.model_file import ModelFile
from dairllm.graph.references import NO_MODEL, WeightReference, weight_references
from dairllm.graph.slicing import equal_shares
from dairllm.protocol.dllama.codec import KIN
from dairllm.protocol.dllama.events import NodeReceived
from dairllm.runtime.prepared_share import find_share

__all__ = ["OwnModel"]

log = structlog.get_logger()


class OwnModel:
    """A model file, for session after session.

    Args:
        file: open; it stays the caller's.
        identity: of all its bytes.
    """

    def __init__(self, file: ModelFile, identity: bytes) -> None:
        self.file, self._identity = file, identity
        self._told: dict[Path, str] = {}  # of prepared shares, to the log

    @classmethod
    def open(cls, path: str | Path, progress: Progress | None = None) -> "OwnModel":
        """Open a file and find out which model it is, which may take as long as to read it: for a thread.

        Raises:
            FormatError: it is no whole model file, or changes meanwhile.
        """
        file = ModelFile.open(path)
        digests, kept = model_digests(file, progress), kept_digests(file)
        torn = [] if kept is None else kept.differences(digests, file)
        if torn:
            log.warning("the model is not what its digests were made of", model=str(path), first=torn[0], tensors=len(torn))
        return cls(file, digests.identity)

    @property
    def identity(self) -> bytes:
        """Of the model; NO_MODEL where the file is not the one any more that was opened."""
        change = self.file.stamp.change(self.file.path)
        if change is None:
            return self._identity
        log.warning("the model is not used", reason=f"{change}; start this worker again to use it as it is now")
        return NO_MODEL

    def weights(self, received: NodeReceived, marker: bytes, told: bytes) -> tuple[LocatedWeights, LocatedWeights] | None:
        """Where the weights of a root's graph are in the file, and the same packed; None where they must come over the wire. Says why in
        the log.

        Args:
            received: the root's configuration of this node.
            marker: what it left in the network configuration.
            told: the identity that it was told.

        Raises:
            RemoteProtocolError: a root of ours refers to weights that the model does not have.
        """
        if received.references:
            try:
                return self._locate(received, received.references)
            except GraphError as error:
                raise RemoteProtocolError(f"the root's references to weights: {error}") from error
        if told == NO_MODEL:
            return None
        if marker.startswith(KIN):
            log.info("weights come over the wire", reason=f"the root's model is another than {self.file.path}")
            return None
        # distributed-llama, whose nodes have equal shares
        try:
            spec, node = self.file.spec, received.node
            share = equal_shares(spec, received.network.n_nodes)[node.node]
            return self._locate(received, weight_references(spec, share, node))
        except GraphError as error:
            log.info("weights come over the wire", reason=f"the root's graph is not that of {self.file.path}: {error}")
            return None

    def _locate(self, received: NodeReceived, references: tuple[WeightReference, ...]) -> tuple[LocatedWeights, LocatedWeights]:
        share = find_share(self.file, references, lambda: self._identity, self._told)
        strided, packed = (LocatedWeights(self.file, received.node, references, share, packed=packed) for packed in (False, True))
        return strided, packed

    def close(self) -> None:
        self.file.close()
