"""Test disks, made when first asked for, and their place in the page cache."""

import os
import pathlib
import random
import shutil
import subprocess

from . import backups
from .process import GIB, MIB, BenchError

BLOCK = MIB
SPOILT = 4096  # bytes at the start of every MiB that spoil() overwrites
MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs"}


def file_system(directory: pathlib.Path) -> str:
    return subprocess.check_output(["stat", "--file-system", "--format=%T", str(directory)], text=True).strip()


class Disks:
    """The work directory's disks by name; see `_makers`."""

    def __init__(self, directory: pathlib.Path, size: int, cold_size: int):
        self.directory, self.size, self.cold_size = directory, size, cold_size
        self._makers = {
            "raw": ("raw.img", lambda path: self._write_random(path, self.size)),
            "sparse": ("sparse.img", self._write_sparse),
            "qcow2": ("disk.qcow2", self._convert),
            "target": ("target.img", self._copy_raw),
            "cold": ("cold.img", lambda path: self._write_random(path, self.cold_size)),
        }

    def path(self, name: str) -> pathlib.Path:
        file_name, make = self._makers[name]
        path = self.directory / file_name
        if not path.exists():
            make(path)
            write_back(path)
        return path

    def reference(self, name: str) -> pathlib.Path:
        """The raw file that a client of this disk must see the contents of."""
        return self.path("raw" if name == "qcow2" else name)

    def bytes_needed(self, names: set[str]) -> int:
        sizes = {"raw": self.size, "sparse": self.size, "qcow2": self.size, "target": self.size, "cold": self.cold_size,
                 "domain": backups.room_needed(), "pattern": backups.DISK_SIZE}
        return sum(sizes[name] for name in names | {"raw"})

    @staticmethod
    def _write_random(path: pathlib.Path, size: int):
        with open(path, "wb", buffering=0) as disk:
            for _ in range(size // BLOCK):
                disk.write(os.urandom(BLOCK))

    def _write_sparse(self, path: pathlib.Path):
        """30 % allocated, in runs of whole MiB at random places; the same places every time."""
        blocks = self.size // BLOCK
        with open(path, "wb", buffering=0) as disk:
            disk.truncate(self.size)
            for block in sorted(random.Random(1).sample(range(blocks), blocks * 3 // 10)):
                os.pwrite(disk.fileno(), os.urandom(BLOCK), block * BLOCK)

    def _convert(self, path: pathlib.Path):
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=64k",
                        str(self.path("raw")), str(path)], check=True)

    def _copy_raw(self, path: pathlib.Path):
        # Written, not only reserved: the first write to reserved blocks costs more than any later one.
        shutil.copyfile(self.path("raw"), path)


def write_back(path: pathlib.Path):
    """Waits until the file is on disk: before a run, so that the run does not pay for what came before."""
    with open(path, "rb") as disk:
        os.fsync(disk.fileno())


def resident_fraction(path: pathlib.Path) -> float:
    output = subprocess.check_output(["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)], text=True)
    return int(output) / (path.stat().st_blocks * 512)


def warm(path: pathlib.Path):
    """Brings the whole file into the page cache."""
    if resident_fraction(path) > 0.999:
        return
    buffer = bytearray(BLOCK)
    with open(path, "rb", buffering=0) as disk:
        while disk.readinto(buffer):
            pass
    if resident_fraction(path) < 0.99:
        raise BenchError(f"{path} does not stay in the page cache: free some memory or give a smaller --size")


def evict(path: pathlib.Path):
    """Takes the whole file out of the page cache, and makes sure."""
    with open(path, "rb") as disk:
        os.fsync(disk.fileno())
        os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if (left := resident_fraction(path)) > 0.01:
        raise BenchError(f"{left:.0%} of {path} stays in the page cache: something else has it mapped or locked")


def spoil(path: pathlib.Path):
    """Overwrites the start of every MiB, so that a write that did not happen shows."""
    with open(path, "r+b", buffering=0) as disk:
        for offset in range(0, path.stat().st_size, MIB):
            os.pwrite(disk.fileno(), b"\x5a" * SPOILT, offset)
    write_back(path)


def check_written(source: pathlib.Path, target: pathlib.Path):
    """Compares what spoil() had overwritten."""
    with open(source, "rb") as a, open(target, "rb") as b:
        for offset in range(0, source.stat().st_size, MIB):
            if os.pread(a.fileno(), SPOILT, offset) != os.pread(b.fileno(), SPOILT, offset):
                raise BenchError(f"the data at offset {offset} of {target.name} was not written")


def check_room(directory: pathlib.Path, needed: int):
    """Refuses places where the figures would mean nothing or the disks would not fit."""
    kind = file_system(directory)
    if kind in MEMORY_FILE_SYSTEMS:
        raise BenchError(f"{directory} is on {kind}: give a --work-dir on a real file system")
    if (free := shutil.disk_usage(directory).free) < needed:
        raise BenchError(f"{directory} has {free / GIB:.1f} GiB free, {needed / GIB:.1f} are needed: "
                         "give another --work-dir, or a smaller --size or --cold-size")
