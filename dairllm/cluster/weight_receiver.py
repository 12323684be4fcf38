"""What a worker does with the weights of a root, from its node configuration to the end of the weights: one of three things."""

from collections.abc import Awaitable, Callable

from dairllm.cluster.weight_check import Arrived, WeightCheck
from dairllm.engine.weights import WireWeights
from dairllm.errors import LocalProtocolError, RemoteProtocolError
from dairllm.net.runner import in_thread
from dairllm.protocol.dllama.codec import WeightHeader
from dairllm.protocol.dllama.events import Event, Filled, WeightReceived, WeightsEnd
from dairllm.protocol.dllama.worker import WorkerSession

__all__ = ["WeightReceiver"]


class WeightReceiver:
    """Each method returns how many bytes of weights came, once the root has said that they are all.

    Args:
        wire: the session.
        next_event: waits for its next event, within a deadline.

    Raises:
        RemoteProtocolError: weights that do not belong to the graph, or not all of them.
        NetworkError: the root is gone or silent.
    """

    def __init__(self, wire: WorkerSession, next_event: Callable[[], Awaitable[Event]]) -> None:
        self._wire, self._next = wire, next_event

    async def receive(self, weights: WireWeights) -> int:
        """Straight into the memory that the kernels will read."""
        came = 0
        while (header := await self._next_header()) is not None:
            self._wire.receive_into(weights.into(header.name, header.index, header.offset, header.nbytes))
            await self._expect(WeightReceived)
            came += header.nbytes
        _check_complete(weights.missing())
        return came

    async def compare(self, check: WeightCheck) -> int:
        """Through buffers, past the node's own file. Raises FormatError too: they differ."""
        came = 0
        while (header := await self._next_header()) is not None:
            before: Arrived | None = None
            for piece in check.pieces(header):
                self._wire.receive_into(piece.data)
                if before is not None:
                    await self._compared(check, before)
                await self._expect(Filled if piece.start + len(piece.data) < header.offset + header.nbytes else WeightReceived)
                before = piece
            if before is not None:
                await self._compared(check, before)
            came += header.nbytes
        _check_complete(check.missing())
        return came

    async def nothing(self) -> int:
        """The root has referred to weights that are here."""
        header = await self._next_header()
        if header is not None:
            raise RemoteProtocolError(f"the root sends {header.name} of layer {header.index}, though it has referred to all weights")
        return 0

    async def _compared(self, check: WeightCheck, piece: Arrived) -> None:
        await in_thread("compare", lambda: check.compare(piece))

    async def _next_header(self) -> WeightHeader | None:
        event = await self._next()
        if isinstance(event, WeightsEnd):
            return None
        if not isinstance(event, WeightHeader):
            raise LocalProtocolError(f"expected a weight from the protocol, found {event}")
        return event

    async def _expect(self, kind: type[Filled] | type[WeightReceived]) -> None:
        event = await self._next()
        if not isinstance(event, kind):
            raise LocalProtocolError(f"expected {kind.__name__} from the protocol, found {event}")


def _check_complete(missing: list[str]) -> None:
    if missing:
        raise RemoteProtocolError(f"the root ended the weights; missing {len(missing)}, the first {missing[0]}")
