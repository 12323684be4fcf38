import socket
import sys
import time

import pytest

from dairllm.bench.processes import ProgramError, listening, output

LISTEN = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[-1]))); time.sleep(60)"


def test_output() -> None:
    assert output([sys.executable, "-c", "print(1 + 1)"]) == "2\n"


def test_a_program_that_fails_or_is_not_there() -> None:
    with pytest.raises(ProgramError, match="ended with 3: no such thing"):
        output([sys.executable, "-c", "import sys; sys.stderr.write('oh\\nno such thing\\n'); sys.exit(3)"])
    with pytest.raises(ProgramError, match="cannot be started: No such file"):
        output(["/nonesuch"])


def test_a_program_that_listens_until_the_end() -> None:
    with listening([sys.executable, "-c", LISTEN]) as address:
        host, _, port = address.partition(":")
        socket.create_connection((host, int(port))).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


def test_a_program_that_ends_before_it_listens() -> None:
    begun = time.monotonic()
    with pytest.raises(ProgramError, match="does not listen: not today"), listening([sys.executable, "-c", "print('not today')"]):
        pass
    assert time.monotonic() - begun < 30
