"""The suite runs without a network: a connection that leaves this machine fails, here and in what a test starts."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

REACH = {
    "connect": "socket.socket().connect(('192.0.2.1', 9))",
    "connect by IPv6": "socket.socket(socket.AF_INET6).connect(('2001:db8::1', 9))",
    "connect_ex": "socket.socket().connect_ex(('192.0.2.1', 9))",
    "a datagram": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))",
    "a look-up": "socket.getaddrinfo('example.org', 443)",
    "an old look-up": "socket.gethostbyname('example.org')",
    "a client": "import urllib.request; urllib.request.urlopen('http://example.org')",
    "the hub": "import huggingface_hub; huggingface_hub.HfApi().model_info('google/gemma-2-2b')",
}


@pytest.mark.parametrize("code", REACH.values(), ids=REACH)
def test_what_leaves_this_machine_fails(code: str) -> None:
    with pytest.raises(RuntimeError, match="the tests run without a network"):
        exec(f"import socket; {code}", {})


def test_it_fails_in_what_a_test_starts() -> None:
    code = f"import socket; {REACH['connect']}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "the tests run without a network" in done.stderr
    unguarded = subprocess.run(
        [sys.executable, "-I", "-c", "import socket; socket.socket().connect_ex(('127.0.0.1', 9))"], check=False
    )
    assert unguarded.returncode == 0


def test_this_machine_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
        socket.create_connection(("localhost", server.getsockname()[1])).close()
