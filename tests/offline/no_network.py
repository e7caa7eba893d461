"""No connection but to this machine: an audit hook, which nothing in the process can take away again."""

import ipaddress
import sys

_FORBIDDEN = {"socket.connect": 1, "socket.sendto": 1, "socket.getaddrinfo": 0, "socket.gethostbyname": 0}
"""Event of the interpreter → where its arguments hold the address or the name."""


class NetworkUsed(RuntimeError):  # noqa: N818 -- no OSError: a client that shrugs at a lost connection must not pass
    """A test reached for the network."""


def forbid() -> None:
    """Refuse every connection and look-up that leaves this machine, from here to the end of the process."""
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event in _FORBIDDEN:
        address = arguments[_FORBIDDEN[event]]
        host = address[0] if isinstance(address, tuple) else address
        if (isinstance(address, tuple) or event.startswith("socket.get")) and not is_here(host):
            raise NetworkUsed(f"{event} to {host}: the tests run without a network")


def is_here(host: object) -> bool:
    """Whether a host as sockets take it is this machine."""
    name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(name).partition("%")[0]).is_loopback
    except ValueError:
        return False
