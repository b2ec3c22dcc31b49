"""Statistics, the description of the machine, and the report as Markdown."""

import math
import os
import pathlib
import platform
import statistics
import subprocess
from dataclasses import dataclass, field

from .cases import Case
from .disks import file_system
from .process import GIB
from .servers import Server
from .workloads import FLOOR, Metric, Row, Sample

TRUSTED_REPETITIONS = 5
CROWDED_CORES = 0.2  # other load above this is worth a mark


@dataclass
class RowResult:
    row: Row
    samples: dict[int, Sample] = field(default_factory=dict)  # by round
    failures: list[str] = field(default_factory=list)
    cipher: str | None = None

    def values(self, metric: Metric) -> dict[int, float]:
        return {round: sample[metric.key] for round, sample in self.samples.items() if metric.key in sample}


@dataclass
class CaseResult:
    case: Case
    rows: list[RowResult]

    def as_json(self) -> dict:
        return {
            "name": self.case.name,
            "summary": self.case.summary,
            "rows": [{"label": result.row.label, "disk": result.row.disk,
                      "cipher": result.cipher,
                      "samples": [{"round": round, **sample} for round, sample in result.samples.items()],
                      "failures": result.failures} for result in self.rows],
        }


def first_line(command: list[str]) -> str:
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return lines[0] if lines else "unknown"


def machine(work_directory: pathlib.Path, servers: list[Server], programs: list[str]) -> dict[str, str]:
    """What the figures were measured on; nothing that names the machine or the day."""
    with open("/proc/cpuinfo") as cpuinfo:
        model = next((line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")),
                     platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    versions = {}
    for name, program in {server.program: (server.name, server.program) for server in reversed(servers)}.values():
        # nbd-server has no --version, but says its version before it complains.
        option = "-V" if program == "nbd-server" else "--version"
        versions[name] = first_line([program, option]).removeprefix("This is ")
    notes = {}
    reporting = pathlib.Path("/sys/module/page_reporting/parameters/page_reporting_order")
    if reporting.exists() and int(reporting.read_text()) <= 10:
        # Getting it again costs whoever uses memory next more than most of what is measured here.
        notes["free memory"] = "given back to the host at once (page_reporting_order = 11 stops that)"
    versions |= {program: first_line([program, "--version"]) for program in programs}
    return {
        "CPU": f"{model}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{memory:.0f} GiB",
        "kernel": platform.release(),
        "file system": file_system(work_directory),
        "load average at the start": f"{os.getloadavg()[0]:.2f}",
    } | notes | versions


def number(value: float) -> str:
    """Three significant figures, never an exponent; whole numbers as they are."""
    if value == int(value):
        return str(int(value))
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def spread(values: list[float]) -> str:
    """Median (minimum–maximum)."""
    if not values:
        return "–"
    middle, low, high = map(number, (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low}–{high})"


def advantage(metric: Metric, ours: float, theirs: float) -> float:
    """Above 1 where the baseline is better."""
    if 0 in (ours, theirs):
        return math.nan
    return ours / theirs if metric.better == "higher" else theirs / ours


def ratio(metric: Metric, ours: dict[int, float], theirs: dict[int, float]) -> str:
    """The medians' ratio, and its range over the rounds that both took part in."""
    rounds = ours.keys() & theirs.keys()
    if not rounds:
        return "–"
    middle = advantage(metric, statistics.median(ours.values()), statistics.median(theirs.values()))
    each = [advantage(metric, ours[round], theirs[round]) for round in rounds]
    span = f" ({min(each):.2f}–{max(each):.2f})" if len(each) > 1 else ""
    return f"**{middle:.2f}**{span}{few(len(rounds))}"


def few(count: int) -> str:
    return "" if count >= TRUSTED_REPETITIONS else f" [n={count}]"


def table(result: CaseResult, baseline: str) -> list[str]:
    metrics = result.case.workload.metrics
    compared = [metric for metric in metrics if metric.better]
    ours = next((r for r in result.rows if r.row.label == baseline and r.samples), None)
    header = ["server", *(metric.label for metric in metrics)]
    if ours is not None:
        header += [f"ratio: {metric.label.rsplit(' ', 1)[0]}" for metric in compared]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for line in result.rows:
        cells = [line.row.label + few(len(line.samples)) * bool(line.samples)]
        cells += [spread(list(line.values(metric).values())) for metric in metrics]
        if ours is not None:
            cells += ["" if line is ours else ratio(metric, ours.values(metric), line.values(metric))
                      for metric in compared]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def remarks(result: CaseResult) -> list[str]:
    lines = [f"- {line.row.label} failed: {failure}" for line in result.rows for failure in line.failures]
    lines += [f"- {line.row.label} and nbdcopy agree to {line.cipher}." for line in result.rows if line.cipher]
    crowded = [line.row.label for line in result.rows
               if (loads := [s["other_cores"] for s in line.samples.values() if "other_cores" in s])
               and statistics.median(loads) > CROWDED_CORES]
    if crowded:
        lines.append(f"- Something else used more than {CROWDED_CORES} cores during: {', '.join(crowded)}.")
    if warmed := [s["resident_after"] for line in result.rows for s in line.samples.values() if "resident_after" in s]:
        lines.append(f"- Of the file, at most {max(warmed):.0%} was in the page cache after a run.")
    return lines


def method(baseline: str, repetitions: int) -> str:
    return (f"Medians of {repetitions} repetition{'s' * (repetitions > 1)} (minimum–maximum), the servers taking turns. "
            "CPU is user and system time of the server's whole process tree, or of the client. "
            f"Ratios are above 1 where {baseline} is better (its rate / theirs, or their cost / its); "
            "in brackets, their range over the rounds. [n=…]: too few repetitions to rely on. "
            f"{FLOOR}: bare sendfile to a receiving process, without protocol or server. "
            "RSS adds up the peaks of all processes; PSS, which counts shared pages once, is sampled. "
            "Other load: what neither the server nor the client used, kernel threads included.")


def markdown(description: dict[str, str], results: list[CaseResult], notes: list[str], baseline: str,
             repetitions: int) -> str:
    lines = ["# Benchmark", "", *(f"- {key}: {value}" for key, value in description.items()), "",
             method(baseline, repetitions)]
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    for result in results:
        lines += ["", f"## {result.case.name}", "", f"{result.case.summary}.", "", *table(result, baseline)]
        if extra := remarks(result):
            lines += ["", *extra]
    return "\n".join(lines) + "\n"
