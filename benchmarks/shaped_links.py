"""Hosts on this machine behind slow links: a network namespace each, a port of a given rate, a switch that delays.

Needs root, /dev/net/tun and tc. Nothing has a name on the machine: namespaces and ports belong to one process and are
gone when it ends, however it ends. The kernel limits the rate (tbf); the delay is the switch's, for not every kernel
has netem.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CLONE_NEWNET, TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x40000000, 0x400454CA, 0x0002, 0x1000
PORT = "eth0"
MTU = 9000  # as fast networks have it; frames of 1500 bytes would be six times the switch's work
BURST_BYTES = MTU + 100  # what a port sends at once; a larger one would lend a small message the rate it has not
AHEAD = 16  # frames read from one port before the others have their turn


@contextmanager
def hosts(num: int, mbit_per_s: float, delay_s: float) -> Iterator[list[Path]]:
    """The namespaces of `num` hosts, to be given to `enter`. Raises OSError where they cannot be made.

    mbit_per_s: of each port, outwards. delay_s: one way, besides what the kernel takes.
    """
    command = [sys.executable, __file__, str(num), str(mbit_per_s), str(delay_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        fds = process.stdout.readline().split()
        if not fds:
            raise OSError("no hosts can be made: root, /dev/net/tun and tc with tbf are needed")
        try:
            yield [Path(f"/proc/{process.pid}/fd/{fd}") for fd in fds]
        finally:
            process.stdin.close()  # by which it ends


def address(host: int) -> str:
    return f"10.99.0.{host + 1}"


def enter(namespace: Path | int) -> None:
    """Put this thread on a host."""
    fd = os.open(namespace, os.O_RDONLY) if isinstance(namespace, Path) else namespace
    _call("setns", fd, CLONE_NEWNET)


def _call(name: str, *args: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _host(number: int, mbit_per_s: float) -> tuple[int, int]:
    """A new host: its namespace, and the wire from its port, as file descriptors."""
    _call("unshare", CLONE_NEWNET)
    wire = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(wire, TUNSETIFF, struct.pack("16sH22x", PORT.encode(), IFF_TAP | IFF_NO_PI))
    for command in (
        "ip link set lo up",
        f"ip link set {PORT} address {_mac(number).hex(':')} mtu {MTU} txqueuelen 10000 up",
        f"ip addr add {address(number)}/24 dev {PORT}",
        f"tc qdisc add dev {PORT} root tbf rate {mbit_per_s}mbit burst {BURST_BYTES} latency 2s",
    ):
        subprocess.run(command.split(), check=True)
    return os.open("/proc/self/ns/net", os.O_RDONLY), wire


def _mac(number: int) -> bytes:
    return bytes([2, 0, 0, 0, 0, number + 1])


def _switch(wires: Sequence[int], delay_s: float) -> None:
    """Carry frames between the wires, each `delay_s` after it came, until stdin is closed."""
    of_mac = {_mac(number): wire for number, wire in enumerate(wires)}
    under_way: deque[tuple[float, int, bytes]] = deque()
    end = sys.stdin.fileno()
    while True:
        # select counts microseconds; epoll's milliseconds would be the delay itself.
        wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select([*wires, end], [], [], wait_s)
        if end in ready:
            return
        for wire in ready:
            with contextlib.suppress(BlockingIOError):
                for _ in range(AHEAD):
                    frame = os.read(wire, 1 << 16)
                    under_way.append((time.monotonic() + delay_s, wire, frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, source, frame = under_way.popleft()
            to = of_mac.get(frame[:6])
            for wire in wires if to is None else [to]:
                if wire != source:
                    with contextlib.suppress(BlockingIOError):  # a full port drops, as a switch does
                        os.write(wire, frame)


def main(num: int, mbit_per_s: float, delay_s: float) -> None:
    made = [_host(number, mbit_per_s) for number in range(num)]
    os.nice(-10)  # a switch has no other work
    print(*(namespace for namespace, _ in made), flush=True)
    _switch([wire for _, wire in made], delay_s)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num", type=int, help="hosts")
    parser.add_argument("mbit_per_s", type=float)
    parser.add_argument("delay_s", type=float)
    main(**vars(parser.parse_args()))
