"""What is asked of the kernel for every connection."""

import math
import socket

from dairllm.config import Keepalive

__all__ = ["set_options"]


def set_options(sock: socket.socket, keepalive: Keepalive) -> None:
    """Small packets leave at once, and a peer whose machine has gone is noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", math.ceil(keepalive.idle)),
        ("TCP_KEEPINTVL", math.ceil(keepalive.interval)),
        ("TCP_KEEPCNT", keepalive.count),
        ("TCP_USER_TIMEOUT", math.ceil(keepalive.user_timeout * 1000)),
    ):
        if hasattr(socket, option):  # Linux has them all, others some
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
