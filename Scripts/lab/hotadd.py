"""What the tests of hot-adding share: diskgate in a VM that adds disks to itself, over the monitor of its own QEMU.

Not a command; hotadd-test and keep-out-test are.
"""
import contextlib
import json
import random
import shlex

import labtest
from labtest import COMMAND_S, HOST, MIB, PORT, digest, expect, tool
from labvm import LabError


def make_image(path, mib, seed):
    """A disk with noise and a hole, which begins with no signature of anything."""
    source = random.Random(seed)
    with open(path, "wb") as f:
        f.truncate(mib * MIB)
        f.write(source.randbytes(mib * MIB // 2))
        f.seek(mib * MIB - 4096)
        f.write(source.randbytes(4096))
    return path


class HotAddLab(labtest.Lab):
    """The VM, and diskgate in it with a way to the monitor of its own QEMU."""

    programs = ("nbdcopy",)
    files_carried = labtest.OPENSSL

    def prepare(self):
        super().prepare()
        self.image = make_image(self.path("vm.raw"), 24, 1)
        self.digest = digest(self.image)

    @property
    def controller(self):
        return "qmp+tcp:%s:%d" % (HOST, self.monitor_port)

    def source(self, image, form="raw"):
        return shlex.quote("hotadd:image=%s?controller=%s&format=%s" % (image, self.controller, form))

    def diskgate(self, arguments):
        return self.guest("%s %s" % (self.in_guest, arguments))

    def checksum(self, source):
        """The SHA-256 of a disk's content, read in the guest."""
        return self.guest("set -o pipefail; %s cat %s | sha256sum" % (self.in_guest, source)).split()[0]

    def refused(self, arguments):
        """What a command says that has to fail."""
        status, output, errors = self.vm.run("%s %s" % (self.in_guest, arguments), timeout=COMMAND_S)
        expect(status == 1, "`diskgate %s` ends with status %d" % (arguments, status))
        return (output + errors).decode(errors="replace")

    @contextlib.contextmanager
    def attached_by_hand(self, *sources, options=""):
        disks = json.loads(self.diskgate("attach --json %s %s" % (options, " ".join(sources))))
        try:
            yield disks
        except BaseException:
            with contextlib.suppress(LabError, OSError):
                self.diskgate("detach --all --force")
            raise
        if disks:
            self.diskgate("detach " + " ".join(disk["serial"] for disk in disks))

    def copied(self, port=None):
        """The digest of what nbdcopy reads on this machine from the guest's server."""
        target = self.path("copy.raw")
        tool("nbdcopy", "nbd://127.0.0.1:%d" % (port or self.ports[str(PORT)]), target)
        return digest(target)

    def is_left(self):
        """What is left in the guest and on the hypervisor after everything was given back."""
        nodes = self.guest("ls /sys/block | grep '^sd' || true").split()
        ledgers = self.guest("ls /var/lib/diskgate/obligations 2>/dev/null || true").split()
        answer = self.proxy_vm("qmp", json.dumps({"execute": "query-named-block-nodes", "arguments": {"flat": True}}))
        devices = [node["node-name"] for node in answer["return"] if node["node-name"].startswith("dg-")]
        return nodes + ledgers + devices

    def expect_nothing_left(self):
        left = self.is_left()
        expect(not left, "%s are left" % " ".join(left))
