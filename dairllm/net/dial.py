"""Connecting to another node."""

import asyncio

from dairllm.config import Keepalive
from dairllm.errors import NetworkError
from dairllm.net.addresses import Address
from dairllm.net.transport import Connection
from dairllm.units import format_duration

__all__ = ["dial"]


async def dial(address: Address, port: int, keepalive: Keepalive, within: float, source: Address | None = None) -> Connection:
    """Connect, from the address `source` where one is given.

    Raises:
        NetworkError: nobody answers within `within` seconds, or says no.
    """
    loop = asyncio.get_running_loop()
    local = (str(source), 0) if source is not None else None
    try:
        async with asyncio.timeout(within):
            _, connection = await loop.create_connection(lambda: Connection(keepalive), str(address), port, local_addr=local)
    except TimeoutError:
        raise NetworkError(f"{address} port {port} did not answer within {format_duration(within)}") from None
    except OSError as error:
        raise NetworkError(f"{address} port {port} cannot be reached: {error.strerror or error}") from None
    return connection
