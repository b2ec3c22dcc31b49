"""What is measured: each workload runs one server once and returns its figures."""

import json
import os
import pathlib
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

from . import backups, disks
from .cipher import chosen_cipher
from .disks import Disks
from .process import GIB, BenchError, ClientRun, MemoryWatch, last_lines, machine_busy_seconds, run_client
from .servers import TLS, Export, RunningServer, Server, make_export

FLOOR = "floor"  # the row that no NBD server makes

# After the last reply servers still close files and end threads; that is
# part of what a client costs them.
SETTLE_SECONDS = 0.05

Sample = dict[str, float]


@dataclass(frozen=True)
class Metric:
    """One figure of a sample and its column in the report."""

    key: str
    label: str
    better: str | None = None  # "higher" or "lower": also gets a column of ratios


SERVER_CPU_GIB = Metric("server_cpu_per_gib", "server CPU s/GiB", "lower")
CLIENT_CPU_GIB = Metric("client_cpu_per_gib", "client CPU s/GiB")
CLIENT_CPU_COMPARED = Metric("client_cpu_per_gib", "client CPU s/GiB", "lower")
CLIENT_RSS = Metric("client_rss_mib", "client RSS MiB", "lower")
SERVER_CPU_OP = Metric("server_cpu_us", "server CPU µs/op", "lower")
CLIENT_CPU_OP = Metric("client_cpu_us", "client CPU µs/op")
GIB_RATE = Metric("gib_per_second", "GiB/s", "higher")
OP_RATE = Metric("kiops", "kIOPS", "higher")
RSS = Metric("rss_mib", "peak RSS MiB")
RSS_COMPARED = Metric("rss_mib", "peak RSS MiB", "lower")
FAIRNESS = Metric("slowest_to_median", "slowest / median client", "higher")
PSS = Metric("pss_mib", "sampled PSS MiB", "lower")
THREADS = Metric("threads", "threads")
OTHERS = Metric("other_cores", "other load, cores")


@dataclass
class Bench:
    """What every workload needs."""

    disks: Disks
    loadgen: pathlib.Path
    floor: pathlib.Path
    seconds: float
    passes: int
    credentials: pathlib.Path  # what make-certificates made
    diskgate: str = "diskgate"  # the program, where it is a client
    domains: backups.Domains | None = None

    def tls(self, kind: str | None) -> TLS | None:
        return TLS(kind, self.credentials) if kind else None


@dataclass(frozen=True)
class Row:
    """One line of a case's table: a server (or the floor) and the disk that it serves."""

    label: str
    server: Server | None
    disk: str
    client: str = ""  # where clients are compared, which one


@dataclass
class Measurement:
    runs: list[ClientRun]
    server_cpu_seconds: float
    common: Sample  # what every workload reports: memory, threads, other load

    @property
    def seconds(self) -> float:
        return sum(run.seconds for run in self.runs)

    @property
    def client_cpu_seconds(self) -> float:
        return sum(run.cpu_seconds for run in self.runs)

    def per_gib(self, size: int) -> Sample:
        gib = size / GIB
        return self.common | {
            "gib_per_second": gib / self.seconds,
            "server_cpu_per_gib": self.server_cpu_seconds / gib,
            "client_cpu_per_gib": self.client_cpu_seconds / gib,
        }

    def per_operation(self, operations: int, seconds: float, client_cpu_seconds: float) -> Sample:
        return self.common | {
            "kiops": operations / seconds / 1000,
            "server_cpu_us": self.server_cpu_seconds / operations * 1e6,
            "client_cpu_us": client_cpu_seconds / operations * 1e6,
        }


def measure(server: Server, export: Export, clients: Callable[[RunningServer], list[list[str]]],
            before: Callable[[], None], proportional: bool = False) -> Measurement:
    """Starts the server, prepares, runs the clients one after the other, stops the server."""
    with RunningServer(server, export) as running:
        before()
        with MemoryWatch(running.pid, server.forks, proportional) as memory:
            cpu, busy, started = running.cpu_seconds(), machine_busy_seconds(), time.monotonic()
            runs = [run_client(argv) for argv in clients(running)]
            running.wait_for_children()
            time.sleep(SETTLE_SECONDS)
            cpu, busy = running.cpu_seconds() - cpu, machine_busy_seconds() - busy
            seconds = time.monotonic() - started
    cpu += running.reaped_cpu_seconds
    others = busy - cpu - sum(run.cpu_seconds for run in runs)
    common = {"rss_mib": memory.peak_rss_mib, "threads": memory.peak_threads, "other_cores": max(0.0, others / seconds)}
    if proportional:
        common["pss_mib"] = memory.peak_pss_mib
    return Measurement(runs, cpu, common)


def figures_of(run: ClientRun) -> dict:
    """The JSON that a client printed; fio may put remarks before it."""
    try:
        return json.loads(run.output[run.output.index("{"):])
    except ValueError:
        raise BenchError(f"the client printed no figures but: {last_lines(run.output)}") from None


def loadgen(bench: Bench, running: RunningServer, *options: object) -> list[str]:
    return [str(bench.loadgen), *running.loadgen_address, *map(str, options)]


@dataclass(frozen=True)
class Copy:
    """nbdcopy of the whole disk to nowhere."""

    tcp: bool = False
    cold: bool = False
    tls: str | None = None
    connections: int | None = None  # None: nbdcopy's choice, 4 where the server allows several
    metrics = (GIB_RATE, SERVER_CPU_GIB, CLIENT_CPU_GIB, RSS, THREADS, OTHERS)

    def run(self, bench: Bench, row: Row, round: int) -> Sample:
        path = bench.disks.path(row.disk)
        # The second pass would not be cold. TLS is so slow that one pass is enough.
        passes = 1 if self.cold or self.tls else bench.passes
        prepare = disks.evict if self.cold else disks.warm
        if row.server is None:
            prepare(path)
            return self._floor(bench, path, passes)
        options = [f"--connections={self.connections}"] if self.connections else []
        measurement = measure(row.server, make_export(path, tcp=self.tcp, tls=bench.tls(self.tls)),
                              lambda running: [["nbdcopy", *options, running.uri, "null:"]] * passes,
                              before=lambda: prepare(path))
        return measurement.per_gib(bench.disks.size * passes)

    @staticmethod
    def _floor(bench: Bench, path: pathlib.Path, passes: int) -> Sample:
        figures = figures_of(run_client([str(bench.floor), str(path), str(passes)]))
        gib = figures["bytes"] / GIB
        return {
            "gib_per_second": figures["gib_per_second"],
            "server_cpu_per_gib": figures["sender_cpu_per_gib"],
            "client_cpu_per_gib": figures["receiver_cpu_seconds"] / gib,
        }


# Programs that copy a disk from a server to a new file: of what, and with what added where none flush, and where all do.
COPIERS = {
    "diskgate": ("diskgate", ["copy", "{uri}", "{target}", "--force"], ["--no-flush"], []),
    "nbdcopy": ("nbdcopy", ["{uri}", "{target}"], [], ["--flush"]),
    "qemu-img": ("qemu-img", ["convert", "-f", "raw", "-O", "raw", "{uri}", "{target}"], [], ["-t", "writeback"]),
    "qemu-img -W -m 8": ("qemu-img", ["convert", "-W", "-m", "8", "-f", "raw", "-O", "raw", "{uri}", "{target}"],
                         [], ["-t", "writeback"]),
}


@dataclass(frozen=True)
class CopyOut:
    """A copy of the whole disk to a new sparse file, by one client after the other; per GiB of data."""

    flushed: bool = False  # whether all flush, or none
    metrics = (GIB_RATE, CLIENT_CPU_COMPARED, CLIENT_RSS, SERVER_CPU_GIB, OTHERS)

    def run(self, bench: Bench, row: Row, round: int) -> Sample:
        path = bench.disks.path(row.disk)
        target = bench.disks.directory / "copy.raw"
        target.unlink(missing_ok=True)
        program, arguments, *options = COPIERS[row.client]
        program = bench.diskgate if program == "diskgate" else program

        def command(running: RunningServer) -> list[str]:
            filled = [argument.format(uri=running.uri, target=target) for argument in arguments]
            # Options come first, or behind the subcommand.
            return [program, *filled[:1], *options[self.flushed], *filled[1:]]

        measurement = measure(row.server, make_export(path), lambda running: [command(running)],
                              before=lambda: disks.warm(path))
        if round == 0 and subprocess.run(["cmp", path, target]).returncode != 0:
            raise BenchError(f"the copy by {row.label} differs from the disk")
        target.unlink()
        os.sync()  # what is still to be written is not the next one's business
        sample = measurement.per_gib(path.stat().st_blocks * 512)
        return sample | {"client_rss_mib": measurement.runs[0].peak_rss_mib}


@dataclass(frozen=True)
class Incremental:
    """An incremental backup of a domain, `percent` of which has changed in random pieces of 64 KiB; per GiB of them."""

    percent: int
    metrics = (Metric("seconds", "wall s", "lower"), CLIENT_CPU_COMPARED,
               Metric("server_cpu_per_gib", "QEMU CPU s/GiB"), Metric("stored_per_changed", "file / changed", "lower"),
               CLIENT_RSS, OTHERS)

    def run(self, bench: Bench, row: Row, round: int) -> Sample:
        pieces = backups.DISK_SIZE // backups.PIECE * self.percent // 100
        return backups.incremental(bench.domains, row.client, pieces, round, check=round == 0)


@dataclass(frozen=True)
class Stretch:
    """A copy of a fully allocated, compressible disk to qcow2 that is stopped after a stretch of it."""

    planned: str
    length: int
    metrics = (Metric("early_rss_mib", "RSS MiB at a quarter"), CLIENT_RSS, GIB_RATE, Metric("stored_gib", "file GiB"))

    def run(self, bench: Bench, row: Row, round: int) -> Sample:
        done = backups.copy_stretch(bench.diskgate, bench.disks.directory, self.planned, self.length)
        return {"early_rss_mib": done.early_rss_mib, "client_rss_mib": done.rss_mib,
                "gib_per_second": self.length / GIB / done.seconds, "stored_gib": done.stored / GIB}


@dataclass(frozen=True)
class CopyIn:
    """nbdcopy of a local file to a writable export."""

    metrics = (GIB_RATE, SERVER_CPU_GIB, CLIENT_CPU_GIB, RSS, THREADS, OTHERS)

    def run(self, bench: Bench, row: Row, round: int) -> Sample:
        source, target = bench.disks.path("raw"), bench.disks.path(row.disk)

        def prepare():
            disks.warm(source)
            disks.warm(target)

        disks.spoil(target)  # before the server starts: it is the only writer while it runs
        measurement = measure(row.server, make_export(target, writable=True),
                              lambda running: [["nbdcopy", str(source), running.uri]], before=prepare)
        disks.check_written(source, target)
        return measurement.per_gib(bench.disks.size)


@dataclass(frozen=True)
class Load:
    """loadgen: random reads or writes at a stated number of connections and depth."""

    connections: int
    depth: int
    block: int = 4096
    write: bool = False
    tcp: bool = False
    cold: bool = False
    memory: bool = False  # memory is the point of the case
    fairness: bool = False  # that no connection is starved is
    tls: str | None = None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        if self.fairness:
            return (FAIRNESS, OP_RATE, SERVER_CPU_OP, CLIENT_CPU_OP, RSS, THREADS, OTHERS)
        if self.memory:
            return (RSS_COMPARED, PSS, THREADS, OP_RATE, SERVER_CPU_OP, OTHERS)
        latency = (Metric("latency_p50_us", "p50 µs"), Metric("latency_p99_us", "p99 µs"))
        return (OP_RATE, SERVER_CPU_OP, CLIENT_CPU_OP, *latency, RSS, THREADS, OTHERS)

    def run(self, bench: Bench, row: Row, round: int) -> Sample:
        path = bench.disks.path(row.disk)
        if self.write:
            disks.write_back(path)  # what the previous server wrote
        # Every server meets the same offsets in the same round.
        options = ["--connections", self.connections, "--depth", self.depth, "--block", self.block,
                   "--seconds", bench.seconds, "--seed", round + 1, *["--write"] * self.write]
        measurement = measure(row.server, make_export(path, writable=self.write, tcp=self.tcp, tls=bench.tls(self.tls)),
                              lambda running: [loadgen(bench, running, *options)],
                              before=lambda: (disks.evict if self.cold else disks.warm)(path),
                              proportional=self.memory)
        figures = figures_of(measurement.runs[0])
        sample = measurement.per_operation(figures["operations"], figures["seconds"], figures["cpu_seconds"])
        sample |= {key: figures[key] for key in ("latency_p50_us", "latency_p99_us", "slowest_to_median")}
        if self.cold:
            sample["resident_after"] = disks.resident_fraction(path)
        return sample


@dataclass(frozen=True)
class Fio:
    """fio's nbd engine: a client that many know, and that sends its requests one by one."""

    depth: int
    metrics = (OP_RATE, SERVER_CPU_OP, CLIENT_CPU_OP, Metric("latency_p50_us", "p50 µs"),
               Metric("latency_p99_us", "p99 µs"), OTHERS)

    def run(self, bench: Bench, row: Row, round: int) -> Sample:
        path = bench.disks.path(row.disk)
        measurement = measure(row.server, make_export(path), lambda running: [self._command(bench, running, round)],
                              before=lambda: disks.warm(path))
        read = figures_of(measurement.runs[0])["jobs"][0]["read"]
        sample = measurement.per_operation(read["total_ios"], read["runtime"] / 1000, measurement.client_cpu_seconds)
        percentiles = read["clat_ns"]["percentile"]
        return sample | {"latency_p50_us": percentiles["50.000000"] / 1000,
                         "latency_p99_us": percentiles["99.000000"] / 1000}

    def _command(self, bench: Bench, running: RunningServer, round: int) -> list[str]:
        # Without a map of blocks already read: keeping it costs fio more than the reads.
        return ["fio", "--name=bench", "--ioengine=nbd", f"--uri={running.uri}", "--rw=randread", "--bs=4k",
                f"--iodepth={self.depth}", "--time_based", f"--runtime={bench.seconds * 1000:.0f}ms", "--norandommap",
                f"--randseed={round + 1}", "--thread", "--output-format=json"]


@dataclass(frozen=True)
class Start:
    """From the exec of the server to the first bytes that a client has read from it."""

    metrics = (Metric("start_ms", "start ms", "lower"),)

    def run(self, bench: Bench, row: Row, round: int) -> Sample:
        path = bench.disks.path(row.disk)
        disks.warm(path)
        export = make_export(path)
        command = row.server.command(row.server, export)
        address = export.loadgen_address(row.server.export_name)
        run = run_client([str(bench.loadgen), *address, "--exec", "--", *command])
        export.socket_path.unlink(missing_ok=True)
        return {"start_ms": figures_of(run)["start_seconds"] * 1000}


def verify(bench: Bench, row: Row, tls: str | None) -> str | None:
    """Reads the whole disk through the server and compares it: speed counts only for the right bytes.

    With TLS, the answer is the cipher that the server and libnbd agree to.
    """
    path, reference = bench.disks.path(row.disk), bench.disks.reference(row.disk)
    block = 256 * 1024
    in_order = ["--sequential", "--block", block, "--connections", 2, "--depth", 8,
                "--ops", reference.stat().st_size // block]
    at_random = ["--block", 4096, "--depth", 32, "--ops", 20000]
    with RunningServer(row.server, make_export(path, tls=bench.tls(tls))) as running:
        for client in (in_order, at_random):
            run_client(loadgen(bench, running, "--verify", reference, *client))
        return chosen_cipher(running) if tls else None
