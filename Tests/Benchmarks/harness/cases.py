"""The cases by name, and which servers and disks each of them compares."""

import fnmatch
from dataclasses import dataclass

from . import backups
from .process import GIB, BenchError
from .servers import Server
from .workloads import COPIERS, FLOOR, Copy, CopyIn, CopyOut, Fio, Incremental, Load, Row, Start, Stretch

Workload = Copy | CopyIn | CopyOut | Fio | Incremental | Load | Start | Stretch

EVERY_SERVER = ("diskgate", "nbdkit", "qemu-nbd", "qemu-nbd-uring", "nbd-server")
TLS_SERVERS = ("diskgate", "nbdkit", "qemu-nbd")


@dataclass(frozen=True)
class Case:
    name: str
    summary: str
    workload: Workload
    servers: tuple[str, ...] = EVERY_SERVER
    disk: str = "raw"
    # Rows beside each server with `disk`: (label, server, disk).
    extra_rows: tuple[tuple[str, str, str], ...] = ()
    rounds_per_repetition: int = 1

    @property
    def programs(self) -> dict[str, str]:
        """The client programs that the case needs, and their Debian packages."""
        match self.workload:
            case CopyOut():
                needed = {"nbdcopy": "libnbd-bin", "qemu-img": "qemu-utils"}
            case Copy() | CopyIn():
                needed = {"nbdcopy": "libnbd-bin"}
            case Incremental():
                needed = backups.programs_needed()
            case Stretch():
                needed = {"nbdkit": "nbdkit"}
            case Fio():
                needed = {"fio": "fio"}
            case _:
                needed = {}
        if self.tls:
            needed |= {"openssl": "openssl", "nbdinfo": "libnbd-bin"}
        return needed | ({"qemu-img": "qemu-utils"} if self.disk == "qcow2" else {})

    @property
    def tls(self) -> str | None:
        """How the case speaks TLS: "x509", "psk" or not at all."""
        return getattr(self.workload, "tls", None)

    @property
    def disks(self) -> set[str]:
        return {self.disk} | {disk for _, _, disk in self.extra_rows}

    def rows(self, servers: dict[str, Server], selected: set[str]) -> list[Row]:
        if isinstance(self.workload, CopyOut):
            # The same server for all: it is the clients that are compared.
            return [Row(name, servers["nbdkit"], self.disk, client=name) for name, (program, *_) in COPIERS.items()
                    if "nbdkit" in selected and (program != "diskgate" or "diskgate" in selected)]
        if isinstance(self.workload, Incremental):
            # A copy of everything takes as long whatever has changed: once is enough.
            names = backups.BACKERS if self.workload.percent == 1 else backups.BACKERS[:2]
            return [Row(name, None, self.disk, client=name) for name in names if "diskgate" in selected]
        if isinstance(self.workload, Stretch):
            return [Row("diskgate", None, self.disk)] if "diskgate" in selected else []
        wanted = [(name, name, self.disk) for name in self.servers] + list(self.extra_rows)
        return [Row(label, servers.get(name), disk) for label, name, disk in wanted if name in selected]


def _load(connections: int, depth: int) -> str:
    return f"{connections} connection{'s' * (connections > 1)}, {depth} in flight on each"


def _hot(connections: int, depth: int, suffix: str = "", **options) -> Case:
    return Case(f"rand-read-hot-{connections}x{depth}{suffix}",
                f"4 KiB random reads from the page cache, {_load(connections, depth)}"
                + (", TCP loopback" if suffix else ""), Load(connections, depth, **options))


def _cold(connections: int, depth: int) -> Case:
    return Case(f"rand-read-cold-{connections}x{depth}",
                f"4 KiB random reads of a large evicted file, {_load(connections, depth)}",
                Load(connections, depth, cold=True), disk="cold")


def _tls(kind: str, tcp: bool, connections: int | None) -> Case:
    how = {"x509": "certificates", "psk": "a pre-shared key"}[kind]
    where = "TCP loopback" if tcp else "unix socket"
    number = "1 connection" if connections == 1 else "4 connections"
    return Case(f"tls-{kind}-{'tcp' if tcp else 'unix'}-{connections or 4}",
                f"nbdcopy to null: over TLS with {how}, page cache, {where}, {number}",
                Copy(tcp=tcp, tls=kind, connections=connections), servers=TLS_SERVERS)


_FLOOR_ROW = ((FLOOR, FLOOR, "raw"),)

CASES = [
    Case("seq-read-unix", "nbdcopy to null:, page cache, unix socket", Copy(), extra_rows=_FLOOR_ROW),
    Case("seq-read-tcp", "nbdcopy to null:, page cache, TCP loopback", Copy(tcp=True)),
    Case("seq-read-cold", "nbdcopy to null:, evicted file, unix socket", Copy(cold=True), extra_rows=_FLOOR_ROW),
    Case("seq-read-sparse", "nbdcopy to null: of a disk allocated to 30 %, page cache, unix socket; GiB of disk",
         Copy(), disk="sparse"),
    Case("seq-write-unix", "nbdcopy from a file to a writable export over existing data, unix socket",
         CopyIn(), disk="target"),
    Case("copy-sparse", "nbdkit to a new sparse file, a disk allocated to 30 %, page cache, unix socket; GiB of data. "
         "None flushes", CopyOut(), servers=("diskgate", "nbdkit"), disk="sparse"),
    Case("copy-sparse-flushed", "the same, all flush", CopyOut(flushed=True), servers=("diskgate", "nbdkit"),
         disk="sparse"),
    *(Case(f"backup-changed-{percent}", f"incremental backup of a libvirt domain, {percent} % of its 10 GiB changed in "
           "random 64 KiB pieces; per GiB of these", Incremental(percent), servers=("diskgate",), disk="domain")
      for percent in (1, 10)),
    Case("backup-memory", "a copy of a fully allocated 1 TiB pattern to compressed qcow2, stopped after 16 GiB",
         Stretch("1T", 16 * GIB), servers=("diskgate",), disk="pattern"),
    _hot(1, 1), _hot(1, 32), _hot(4, 32), _hot(32, 4), _hot(1, 32, "-tcp", tcp=True),
    _cold(1, 32), _cold(4, 16),
    Case("rand-write-1x32", "4 KiB random writes over existing data, 1 connection, 32 in flight",
         Load(1, 32, write=True), disk="target"),
    Case("fio-read-8", "fio, 4 KiB random reads from the page cache, depth 8", Fio(8)),
    Case("fio-read-32", "fio, 4 KiB random reads from the page cache, depth 32", Fio(32)),
    Case("qcow2-seq", "nbdcopy to null: of a qcow2 image with 64 KiB clusters, page cache, unix socket",
         Copy(), servers=("diskgate", "qemu-nbd", "qemu-nbd-uring"), disk="qcow2",
         extra_rows=(("diskgate, the same data raw", "diskgate", "raw"),)),
    Case("rss-32-4k", "memory under 32 busy connections: 4 KiB random reads, 4 in flight on each",
         Load(32, 4, memory=True)),
    Case("rss-32-256k", "memory under 32 busy connections: 256 KiB random reads, 4 in flight on each",
         Load(32, 4, block=256 * 1024, memory=True)),
    *(_tls(kind, tcp, connections) for kind in ("x509", "psk") for tcp in (False, True) for connections in (None, 1)),
    Case("tls-fair-64", "64 TLS clients at once, 256 KiB random reads, 2 in flight on each",
         Load(64, 2, block=256 * 1024, fairness=True, tls="x509"), servers=TLS_SERVERS),
    Case("tls-rss-32-4k", "memory under 32 busy TLS connections: 4 KiB random reads, 4 in flight on each",
         Load(32, 4, memory=True, tls="x509"), servers=TLS_SERVERS),
    Case("tls-rss-32-256k", "memory under 32 busy TLS connections: 256 KiB random reads, 4 in flight on each",
         Load(32, 4, block=256 * 1024, memory=True, tls="x509"), servers=TLS_SERVERS),
    # Starts take milliseconds and vary: more of them cost next to nothing.
    # nbd-server goes to the background, so nobody can say when it has started.
    Case("start", "from exec of the server to the first 4 KiB read", Start(),
         servers=("diskgate", "nbdkit", "qemu-nbd"), rounds_per_repetition=4),
]


def select_cases(patterns: list[str]) -> list[Case]:
    """The cases that match any of the names, families (`fio-read`) or globs; all without any."""
    chosen = []
    for pattern in patterns:
        found = [case for case in CASES if case.name == pattern] or [
            case for case in CASES if case.name.startswith(pattern + "-") or fnmatch.fnmatchcase(case.name, pattern)]
        if not found:
            raise BenchError(f"no case is called {pattern}: see --list")
        chosen += found
    return [case for case in CASES if case in chosen or not patterns]
