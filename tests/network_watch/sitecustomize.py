"""Make every Python process record each address beyond this machine that it contacts.

This takes effect if this folder is on PYTHONPATH. Each process adds lines to two files in the folder $NETWORK_WATCH:
`processes` and `addresses`. Connections from C or Rust code that bypasses Python's socket module are not recorded.
"""

import ipaddress
import os
import socket
import sys

FOLDER = os.environ["NETWORK_WATCH"]
WITH_SOCKET = {"socket.connect", "socket.sendto", "socket.sendmsg"}
WITH_NAME = {"socket.getaddrinfo", "socket.gethostbyname"}
HERE = {None, "", "localhost", socket.gethostname()}


def append(name: str, line: str) -> None:
    with open(f"{FOLDER}/{name}", "a", encoding="utf-8") as file:  # noqa: PTH123
        file.write(line.replace("\n", " ") + "\n")


def is_here(host: str | None) -> bool:
    if host in HERE:
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def watch(event: str, arguments: tuple) -> None:
    host = None
    if event in WITH_SOCKET:
        family, address = arguments[0].family, arguments[1]
        if family in (socket.AF_INET, socket.AF_INET6) and address:
            host = address[0]
    elif event in WITH_NAME:
        host = arguments[0]
    if isinstance(host, bytes | bytearray):
        host = host.decode(errors="replace")
    if not is_here(host):
        append("addresses", f"{event} {host} by {' '.join(sys.orig_argv)}")


append("processes", " ".join(sys.orig_argv))
sys.addaudithook(watch)
