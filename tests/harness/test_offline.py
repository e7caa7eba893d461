"""The tests run without a network: a connection to another machine fails, also in subprocesses."""

import socket
import subprocess
import sys

import pytest
from huggingface_hub import constants

REACH = {
    "connect": "socket.socket().connect(('192.0.2.1', 9))",
    "connect_ex": "socket.socket().connect_ex(('192.0.2.1', 9))",
    "a datagram": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))",
    "a look-up": "socket.getaddrinfo('example.org', 443)",
    "the hub": "import huggingface_hub; huggingface_hub.HfApi().model_info('google/gemma-2-2b')",
}


@pytest.mark.parametrize("code", REACH.values(), ids=REACH)
def test_connections_to_other_machines_fail(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The hub's client would not connect with HF_HUB_OFFLINE=1, and to this machine alone with a proxy on it.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")
    with pytest.raises(RuntimeError, match="the tests run without a network"):
        exec(f"import socket; {code}", {})


def test_they_fail_in_subprocesses_and_those_to_this_machine_succeed() -> None:
    code = f"import socket; {REACH['connect']}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "the tests run without a network" in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
        socket.create_connection(("localhost", server.getsockname()[1])).close()
