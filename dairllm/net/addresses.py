"""Addresses: of names, and to listen on."""

import ipaddress
import socket

from dairllm.errors import NetworkError
from dairllm.net.runner import in_thread

__all__ = ["Address", "address_of", "listening_socket", "resolve"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def address_of(text: str) -> Address:
    """An IP address; one of version 4 in the clothes of version 6 is taken for what it is."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address


async def resolve(host: str) -> tuple[Address, ...]:
    """All addresses of a name.

    Raises:
        NetworkError: it has none.
    """
    try:
        # In a thread that can be abandoned: a name server that does not answer must not hold up the end of the process.
        found = await in_thread("resolve", lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        raise NetworkError(f"the name {host!r} has no address: {getattr(error, 'strerror', None) or error}") from None
    return tuple(dict.fromkeys(address_of(str(item[4][0])) for item in found))


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket bound to a host's address, of IPv4 where it has one, since distributed-llama speaks nothing else; `::` takes both.

    Raises:
        NetworkError: the address is not ours, or taken.
    """
    sock = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = min(found, key=lambda item: item[0] != socket.AF_INET)
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(address)
    except (OSError, UnicodeError) as error:
        if sock is not None:
            sock.close()
        raise NetworkError(f"cannot listen on {host} port {port}: {getattr(error, 'strerror', None) or error}") from None
    return sock
