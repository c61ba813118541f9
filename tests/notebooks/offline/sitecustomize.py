"""On PYTHONPATH, this refuses every connection of a Python process that leaves the machine."""

import socket

_connect, _connect_ex, _lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo
LOCAL = ("127.0.0.1", "::1", "localhost")


def _refuse_outside(family: int, address: object) -> None:
    if family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL:
        raise OSError(f"networking is refused here: {address}")


def connect(self: socket.socket, address: object) -> None:
    _refuse_outside(self.family, address)
    _connect(self, address)


def connect_ex(self: socket.socket, address: object) -> int:
    _refuse_outside(self.family, address)
    return _connect_ex(self, address)


def getaddrinfo(host: object, *arguments: object, **options: object) -> list:
    if host not in (None, "", *LOCAL):
        raise socket.gaierror(f"networking is refused here: {host}")
    return _lookup(host, *arguments, **options)


socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = connect, connect_ex, getaddrinfo
