"""Who is who among connections that do not say so: by address, among equal addresses by order of arrival."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable

import pytest

from dairllm.cluster.mesh import SPARES, Mesh
from dairllm.config import Keepalive
from dairllm.errors import NetworkError
from dairllm.net.addresses import Address
from dairllm.net.dial import dial
from dairllm.net.transport import Connection
from dairllm.protocol.dllama.codec import Greeting, Peer

Accepted = tuple[int, "asyncio.Queue[Connection]"]
Come = Callable[[str], "asyncio.Future[Connection]"]


def ip(*texts: str) -> tuple[Address, ...]:
    return tuple(ipaddress.ip_address(text) for text in texts)


class Refused(list[tuple[str, str]]):
    """What was refused: the address, and why."""

    def __call__(self, connection: Connection, kind: str, reason: str) -> None:
        assert kind == "no_peer"
        self.append((str(connection.peer_address), reason))
        connection.abort()


@pytest.fixture
def refused() -> Refused:
    return Refused()


def mesh(refused: Refused, index: int, *addresses: tuple[Address, ...], ports: int = 1, patience: float = 0.2) -> Mesh:
    """Of a worker with this index, whose list of the others has these addresses."""
    peers = tuple(Peer(str(some[0]), ports) for some in addresses)
    return Mesh(Greeting(len(peers) + 1, index, peers), addresses, Keepalive(), patience, refused)


@pytest.fixture
async def come(accepted: Accepted) -> AsyncIterator[Callable[[str], object]]:
    """Somebody comes from an address; gives the connection as it was accepted."""
    port, queue = accepted
    dialled: list[Connection] = []

    async def come(source: str) -> Connection:
        dialled.append(await dial(ipaddress.ip_address("127.0.0.1"), port, Keepalive(), 5, ipaddress.ip_address(source)))
        return await queue.get()

    yield come
    for connection in dialled:
        connection.abort()
        await connection.closed()


async def test_peers_are_known_by_their_addresses_whatever_the_order(come: Come, refused: Refused) -> None:
    one = mesh(refused, 2, ip("127.0.0.5"), ip("127.0.0.6"))
    second, first = await come("127.0.0.6"), await come("127.0.0.5")
    assert one.offer(second) is None
    assert one.offer(first) is None
    assert await one.settle() == {1: first, 2: second}
    assert refused == []


async def test_among_equal_addresses_the_first_to_come_is_the_first_of_the_list(come: Come, refused: Refused) -> None:
    one = mesh(refused, 3, ip("127.0.0.5"), ip("127.0.0.5"), ip("127.0.0.5"))
    arrived = [await come("127.0.0.5") for _ in range(3)]
    for connection in arrived:
        one.offer(connection)
    assert await one.settle() == dict(zip((1, 2, 3), arrived, strict=True))


async def test_a_peer_of_one_address_comes_before_a_peer_that_could_also_be_another(come: Come, refused: Refused) -> None:
    one = mesh(refused, 2, ip("127.0.0.5", "127.0.0.6"), ip("127.0.0.5"))
    both = [await come("127.0.0.5"), await come("127.0.0.6")]
    for connection in both:
        one.offer(connection)
    assert await one.settle() == {1: both[1], 2: both[0]}


async def test_who_comes_from_nowhere_in_the_list_is_told_so(come: Come, refused: Refused) -> None:
    one = mesh(refused, 1, ip("127.0.0.5"))
    assert "no worker of its list has this address" in str(one.offer(await come("127.0.0.7")))


async def test_a_worker_that_is_first_expects_nobody(come: Come, refused: Refused) -> None:
    one = mesh(refused, 0, ip("127.0.0.5"))
    assert "no worker is expected to connect" in str(one.offer(await come("127.0.0.5")))


async def test_who_speaks_early_gives_the_place_to_the_next(come: Come, refused: Refused) -> None:
    one = mesh(refused, 1, ip("127.0.0.5"))
    noisy, quiet = await come("127.0.0.5"), await come("127.0.0.5")
    one.offer(noisy)
    one.offer(quiet)
    assert noisy.on_early is not None
    noisy.bytes_received = 3
    noisy.on_early(noisy)
    assert await one.settle() == {1: quiet}
    assert refused == [("127.0.0.5", "it spoke before its time: no worker")]


async def test_who_leaves_early_reopens_the_place_until_the_deadline(come: Come, refused: Refused) -> None:
    one = mesh(refused, 1, ip("127.0.0.5"))
    fickle = await come("127.0.0.5")
    one.offer(fickle)
    await one.connect(None)
    assert fickle.on_early is not None
    fickle.on_early(fickle)
    with pytest.raises(NetworkError, match=r"node 1 \(127\.0\.0\.5:1\) did not connect within 200ms"):
        await one.settle()
    steady = await come("127.0.0.5")
    settling = asyncio.create_task(one.settle())
    await asyncio.sleep(0)  # it waits already
    one.offer(steady)
    assert await settling == {1: steady}
    assert refused == [("127.0.0.5", "it left before its time: no worker")]


async def test_spares_are_kept_to_a_bound_and_refused_in_the_end(come: Come, refused: Refused) -> None:
    one = mesh(refused, 1, ip("127.0.0.5"))
    arrived = [await come("127.0.0.5") for _ in range(SPARES + 2)]
    answers = [one.offer(connection) for connection in arrived]
    assert answers == [None] * (SPARES + 1) + ["all workers have connected"]
    assert await one.settle() == {1: arrived[0]}
    assert len(refused) == SPARES
    assert "another root" in str(one.offer(arrived[1]))


async def test_the_workers_after_this_one_are_dialled_from_the_address_that_the_root_knows(accepted: Accepted, refused: Refused) -> None:
    port, queue = accepted
    one = mesh(refused, 0, ip("127.0.0.1"), ip("127.0.0.1"), ports=port)
    await one.connect(ipaddress.ip_address("127.0.0.8"))
    places = await one.settle()
    assert sorted(places) == [2, 3]
    for _ in places:
        assert str((await queue.get()).peer_address) == "127.0.0.8"
    one.abort()
    for connection in places.values():
        await connection.closed()


async def test_a_dialled_worker_that_speaks_or_leaves_early_ends_it(accepted: Accepted, refused: Refused) -> None:
    port, queue = accepted
    one = mesh(refused, 0, ip("127.0.0.1"), ports=port)
    await one.connect(ipaddress.ip_address("127.0.0.1"))
    (await queue.get()).send([b"x"])
    await asyncio.sleep(0.02)
    with pytest.raises(NetworkError, match=r"node 2 \(127\.0\.0\.1:\d+\) spoke or left before its time"):
        await one.settle()
    one.abort()


async def test_another_address_is_tried_when_one_does_not_answer(accepted: Accepted, refused: Refused) -> None:
    port, queue = accepted
    one = mesh(refused, 0, ip("127.0.0.77", "127.0.0.1"), ports=port)
    await one.connect(ipaddress.ip_address("127.0.0.1"))
    await queue.get()
    one.abort()


async def test_names_are_resolved_and_their_lack_is_told(refused: Refused) -> None:
    found = await Mesh.of(Greeting(2, 0, (Peer("localhost", 1),)), Keepalive(), 5, refused)
    assert isinstance(found, Mesh)
    with pytest.raises(NetworkError, match=r"'nowhere\.invalid' has no address"):
        await Mesh.of(Greeting(2, 0, (Peer("nowhere.invalid", 1),)), Keepalive(), 5, refused)
