"""Where workers listen, as settings say it."""

import ipaddress
from dataclasses import dataclass

__all__ = ["DEFAULT_PORT", "WorkerAddress", "worker_addresses"]

DEFAULT_PORT = 9990


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where a worker listens."""

    host: str
    port: int = DEFAULT_PORT

    @classmethod
    def parse(cls, text: str) -> "WorkerAddress":
        """Of ``"10.0.0.2:9990"``, ``"kitchen"`` (the default port), ``"[fe80::1%eth0]:9990"``; ValueError otherwise."""
        text = text.strip()
        if "://" in text:
            raise ValueError(f"expected a worker's host:port without a scheme, such as 10.0.0.2:{DEFAULT_PORT}, found {text!r}")
        host, separator, port = text.rpartition(":")
        if not separator or text.endswith("]"):
            host, port = text, str(DEFAULT_PORT)
        bracketed = host.startswith("[") and host.endswith("]")
        if ":" in host and not bracketed:
            raise ValueError(f"expected an IPv6 address in brackets, such as [::1]:{DEFAULT_PORT}, found {text!r}")
        host = host[1:-1] if bracketed else host
        if not host or any(c.isspace() or c in "[]/," for c in host):
            raise ValueError(f"expected a worker's host:port, such as 10.0.0.2:{DEFAULT_PORT}, found {text!r}")
        if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= 65535):
            raise ValueError(f"expected a port from 1 to 65535 after {host}:, found {port!r}")
        if bracketed:
            try:
                host = str(ipaddress.IPv6Address(host))
            except ValueError:
                raise ValueError(f"expected an IPv6 address in brackets, found {text!r}") from None
        return cls(host if bracketed else host.lower(), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def worker_addresses(value: object) -> tuple[WorkerAddress, ...]:
    """Of one comma-separated text (environment), a list of such (flags), or a list of addresses (file)."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(item, str | WorkerAddress) for item in given):
        raise ValueError(f"expected a list of host:port, or one text with commas between them, found {value!r}")
    found: list[WorkerAddress] = []
    for item in given:
        for address in [WorkerAddress.parse(word) for word in item.split(",")] if isinstance(item, str) else [item]:
            if address in found:
                raise ValueError(f"{address} is named twice; a worker is one node")
            found.append(address)
    return tuple(found)
