"""Builds what a lab VM boots: the cloud kernel's modules, busybox and programs of this machine, as an initramfs.

Not a command; see labvm.py for the machine that boots it.  Python's standard library only, and no root.

Environment:
  LAB_SYSROOT   where boot/ and lib/modules/ of the guest's kernel are (default: where `install` puts them,
                and where there is none, /)
  LAB_KERNEL    the kernel release to use (default: the newest *-cloud-amd64 there)
"""
import glob
import hashlib
import json
import os
import re
import stat
import subprocess

AGENT_PORT = 7000

# Loaded at boot in this order, with what they depend on.
BOOT_MODULES = ["virtio_pci", "virtio_net", "virtio_blk", "sd_mod", "sg", "virtio_scsi", "vmw_pvscsi", "virtio_rng"]
# Carried, and loaded with `modprobe NAME` in the guest.
MORE_MODULES = ["nbd", "vsock_loopback", "iscsi_tcp", "tls", "aesni_intel", "loop", "fuse", "scsi_debug", "xfs", "btrfs",
                "dm_mod", "dm_snapshot", "dm_multipath", "dm_round_robin", "vfat", "nls_ascii", "nls_iso8859_1",
                "nls_cp437", "crc32c_intel"]
# Initramfs images that stay in the cache beside the one in use.
CACHED_IMAGES = 3

INIT = r"""#!/bin/sh
export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/bin HOME=/root LANG=C
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /run /tmp /root /mnt /var/run /var/lock
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ln -sf /proc/self/fd /dev/fd
for word in $(cat /proc/cmdline); do
  case $word in lab.token=*) echo "${word#lab.token=}" >/lab/token; chmod 600 /lab/token;; esac
done
hostname labvm
while read -r m; do modprobe "$m" || echo "lab: cannot load $m"; done </lab/modules.boot
# Where udev is carried, it acts on disks as it does on Debian.
if [ -x /lib/systemd/systemd-udevd ]; then
  modprobe dm_mod
  /lib/systemd/systemd-udevd --daemon && udevadm trigger --action=add && udevadm settle
fi
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up && ip route add default via 10.0.2.2
# Not with "nc ... &": a shell would start it, and all that it starts, with SIGINT and SIGQUIT ignored.
start-stop-daemon -S -b -x /bin/nc -- -ll -p AGENT_PORT -e /lab/agent
i=0
while ! grep -q ':AGENT_HEX ' /proc/net/tcp /proc/net/tcp6 2>/dev/null && [ $i -lt 200 ]; do
  usleep 20000; i=$((i+1))
done
echo "LAB-READY $(cut -d' ' -f1 /proc/uptime)"
while :; do sleep 3600 & wait $!; done
""".replace("AGENT_PORT", str(AGENT_PORT)).replace("AGENT_HEX", "%04X" % AGENT_PORT)

# One connection is one command.  Request line: TOKEN NONCE TIMEOUT BASE64; what follows it is the command's
# standard input.  Answer: standard output, then "\n--lab-NONCE STATUS ERRORBYTES\n", then standard error.
AGENT = r"""#!/bin/sh
export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/bin HOME=/root LANG=C
IFS=' ' read -r token nonce limit body
[ "$token" = "$(cat /lab/token)" ] || exit 1
f=/tmp/.lab.$$
echo "$body" | base64 -d >$f.cmd
if [ "$limit" = 0 ]; then sh $f.cmd 2>$f.err; else timeout -s KILL "$limit" sh $f.cmd 2>$f.err; fi
rc=$?
printf '\n--lab-%s %d %d\n' "$nonce" $rc "$(stat -c %s $f.err)"
cat $f.err
rm -f $f.cmd $f.err
"""


class LabError(Exception):
    """What was being done, on what, what went wrong and, where it helps, what to do."""


class Cpio:
    """Writes a newc archive, device nodes included, without root and without a staging directory."""

    def __init__(self, path):
        self.out, self.inode, self.seen = open(path, "wb"), 1, set()

    def directory(self, name, mode=0o755):
        self._add(name, stat.S_IFDIR | mode)

    def link(self, name, target):
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def node(self, name, major, minor, mode=0o600):
        self._add(name, stat.S_IFCHR | mode, device=(major, minor))

    def data(self, name, data, mode=0o644):
        self._add(name, stat.S_IFREG | mode, data)

    def file(self, source, name):
        with open(source, "rb") as f:
            self.data(name, f.read(), stat.S_IMODE(os.fstat(f.fileno()).st_mode) | 0o400)

    def close(self):
        self._put("TRAILER!!!", 0)
        self.out.write(b"\0" * (-self.out.tell() % 512))
        self.out.close()

    def _add(self, name, mode, data=b"", device=(0, 0)):
        """Adds a name, after the directories above it, unless it is there."""
        name = name.strip("/")
        if name in self.seen:
            return
        if os.path.dirname(name):
            self.directory(os.path.dirname(name))
        self.seen.add(name)
        self._put(name, mode, data, device)

    def _put(self, name, mode, data=b"", device=(0, 0)):
        self.inode += 1
        fields = [self.inode, mode, 0, 0, 1, 0, len(data), 0, 0, device[0], device[1], len(name) + 1, 0]
        head = b"070701" + b"".join(b"%08X" % f for f in fields) + name.encode() + b"\0"
        self.out.write(head + b"\0" * (-len(head) % 4))
        self.out.write(data)
        self.out.write(b"\0" * (-len(data) % 4))


def sysroots():
    """Where the lab's kernel and unpacked packages may be."""
    named = os.environ.get("LAB_SYSROOT")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [named] if named else [os.path.join(cache, "diskgate-lab"), "/"]


def udev_tree():
    """Where udev, LVM, mdadm and multipath are unpacked."""
    for root in sysroots():
        if os.path.exists(os.path.join(root, "guest/packages")):
            return os.path.join(root, "guest")
    raise LabError("no guest/packages in %s: run %s" % (
        " or ".join(sysroots()), os.path.join(os.path.dirname(os.path.realpath(__file__)), "install")))


class Kernel:
    """The guest's kernel: its image, its release and the directory of its modules."""

    def __init__(self, root, release):
        self.release = release
        self.image = os.path.join(root, "boot/vmlinuz-" + release)
        self.modules = os.path.join(root, "lib/modules", release)

    @classmethod
    def find(cls):
        roots = sysroots()
        release = os.environ.get("LAB_KERNEL")
        for root in roots:
            images = glob.glob(os.path.join(root, "boot/vmlinuz-" + (release or "*-cloud-amd64")))
            if images:
                newest = max(images, key=lambda p: [int(n) for n in re.findall(r"\d+", os.path.basename(p))])
                return cls(root, os.path.basename(newest)[len("vmlinuz-"):])
        raise LabError("no kernel for the guest: no boot/vmlinuz-%s in %s; run %s, or name a directory that has one "
                       "with LAB_SYSROOT" % (release or "*-cloud-amd64", " or ".join(roots),
                                             os.path.join(os.path.dirname(os.path.realpath(__file__)), "install")))

    def module_files(self, wanted):
        """({module: (path, [paths it needs, deepest last])} for the wanted and all they need, {built-in modules})."""
        try:
            with open(os.path.join(self.modules, "modules.dep")) as f:
                lines = [line.strip().partition(":") for line in f]
            with open(os.path.join(self.modules, "modules.builtin")) as f:
                builtin = {module_name(line.strip()) for line in f}
        except FileNotFoundError as e:
            raise LabError("kernel %s has no %s: depmod -b ROOT %s makes it" % (self.release, e.filename, self.release))
        known = {module_name(path): (path, needs.split()) for path, _, needs in lines}
        found, todo = {}, [module_name(w) for w in wanted]
        while todo:
            name = todo.pop()
            if name in found or name in builtin:
                continue
            if name not in known:
                raise LabError("kernel %s has no module %s" % (self.release, name))
            found[name] = known[name]
            todo += [module_name(p) for p in known[name][1]]
        return found, builtin


def module_name(path):
    return os.path.basename(path).split(".ko")[0].replace("-", "_")


def guest_name(path):
    """A path in the guest, whose /lib and /lib64 are links into /usr, as on Debian, and whose /sbin is one to /bin."""
    if path.startswith(("/lib/", "/lib64/")):
        return "/usr" + path
    return "/bin/" + path[6:] if path.startswith("/sbin/") else path


def shared_libraries(binary, environment=None):
    """The libraries that a program loads when it starts, as ldd names them; none for what is static or a script."""
    run = subprocess.run(["ldd", binary], capture_output=True, text=True, env=environment)
    if run.returncode:
        return []
    libraries = []
    for line in run.stdout.splitlines():
        if "not found" in line:
            raise LabError("%s cannot be carried into the guest: %s" % (binary, line.strip()))
        match = re.search(r"(/\S+) \(0x", line)
        if match:
            libraries.append(match.group(1))
    return libraries


class Contents:
    """What of this machine goes into the guest: {name there: file here} and {link there: target there}."""

    def __init__(self):
        self.files, self.links = {}, {}

    def add_binary(self, path):
        """A program with its libraries, at its own path and in the guest's PATH."""
        real = os.path.realpath(path)
        if not os.path.isfile(real):
            raise LabError("cannot carry %s into the guest: no such file" % path)
        self.files[real] = real
        self.links["/usr/local/bin/" + os.path.basename(path)] = real
        for library in shared_libraries(real):
            self.add_library(library)

    def add_library(self, library):
        target = os.path.realpath(library)
        self.files[target] = target
        if guest_name(library) != target:
            self.links[guest_name(library)] = target

    def add(self, spec):
        """SOURCE[:DESTINATION], a file or a directory with all below it."""
        source, _, destination = spec.partition(":")
        destination = destination or os.path.abspath(source)
        if os.path.isdir(source):
            for base, _, names in os.walk(source):
                for name in names:
                    path = os.path.join(base, name)
                    self.files[os.path.join(destination, os.path.relpath(path, source))] = path
        elif os.path.exists(source):
            self.files[destination] = source
        else:
            raise LabError("cannot carry %s into the guest: no such file" % source)

    def add_tree(self, root):
        """A directory with unpacked packages, at the same places in the guest, and the libraries of its programs."""
        paths = [os.path.join(root, part) for part in ("lib", "usr/lib", "lib/x86_64-linux-gnu",
                                                       "usr/lib/x86_64-linux-gnu")]
        environment = dict(os.environ, LD_LIBRARY_PATH=":".join(paths))
        for base, directories, names in os.walk(root):
            for name in names + [d for d in directories if os.path.islink(os.path.join(base, d))]:
                path = os.path.join(base, name)
                there = guest_name(os.path.join("/", os.path.relpath(path, root)))
                if os.path.islink(path):
                    self.links[there] = os.readlink(path)
                    continue
                self.files[there] = path
                if os.access(path, os.X_OK) or ".so" in name:
                    for library in shared_libraries(path, environment):
                        if not library.startswith(root + "/"):
                            self.add_library(library)

    def fingerprint(self):
        stamps = []
        for name, source in sorted(self.files.items()):
            s = os.stat(source)
            stamps.append([name, source, s.st_size, s.st_mtime_ns, s.st_mode])
        return stamps + sorted(self.links.items())


def build(cache, binaries=(), files=(), modules=(), with_udev=False):
    """Finds in the directory `cache`, or builds there, the initramfs; returns the paths (kernel, initramfs)."""
    kernel = Kernel.find()
    busybox = next((p for p in ("/bin/busybox", "/usr/bin/busybox") if os.path.exists(p)), None)
    if not busybox or shared_libraries(busybox):
        raise LabError("no static /bin/busybox for the guest: apt-get install busybox-static")
    contents = Contents()
    for path in binaries:
        contents.add_binary(path)
    for spec in files:
        contents.add(spec)
    if with_udev:
        contents.add_tree(udev_tree())
    contents.files["/bin/busybox"] = busybox
    wanted, builtin = kernel.module_files(BOOT_MODULES + MORE_MODULES + list(modules))

    stamp = json.dumps([kernel.release, INIT, AGENT, sorted(wanted), contents.fingerprint()])
    path = os.path.join(cache, "initramfs-%s.cpio" % hashlib.sha256(stamp.encode()).hexdigest()[:16])
    os.makedirs(cache, exist_ok=True)
    if os.path.exists(path):
        os.utime(path)
        return kernel.image, path
    for old in sorted(glob.glob(os.path.join(cache, "initramfs-*.cpio")), key=os.path.getmtime)[:-CACHED_IMAGES]:
        os.unlink(old)
    part = "%s.%d" % (path, os.getpid())
    write(Cpio(part), kernel, contents, wanted, builtin)
    os.replace(part, path)
    return kernel.image, path


def write(archive, kernel, contents, wanted, builtin):
    # The links first: what is added below them must not make directories of them.
    archive.link("lib", "usr/lib")
    archive.link("lib64", "usr/lib64")
    for name in ("bin", "dev", "proc", "sys", "run", "mnt", "root", "etc", "var/lib", "usr/bin", "usr/sbin",
                 "usr/lib", "usr/lib64", "usr/local/bin", "lab"):
        archive.directory(name)
    archive.directory("tmp", 0o1777)
    archive.link("sbin", "bin")
    archive.node("dev/console", 5, 1)
    archive.node("dev/null", 1, 3, 0o666)
    archive.data("init", INIT.encode(), 0o755)
    archive.data("lab/agent", AGENT.encode(), 0o755)
    archive.data("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    archive.data("etc/group", b"root:x:0:\n")
    archive.data("etc/hosts", b"127.0.0.1 localhost\n10.0.2.2 host\n10.0.2.15 labvm\n")
    write_modules(archive, kernel, wanted, builtin)
    for name, source in sorted(contents.files.items()):
        archive.file(source, name)
    for name, target in sorted(contents.links.items()):
        archive.link(name, target)
    # After the programs that were asked for, which win over the applets of the same name.
    applets = subprocess.run([contents.files["/bin/busybox"], "--list"], capture_output=True, text=True, check=True)
    for applet in applets.stdout.split():
        archive.link("bin/" + applet, "busybox")
    archive.close()


def write_modules(archive, kernel, wanted, builtin):
    """The modules, and of the kernel's tables the lines about them that busybox's modprobe reads."""
    base = "usr/lib/modules/%s/" % kernel.release
    archive.data("lab/modules.boot", "".join(m + "\n" for m in BOOT_MODULES if m not in builtin).encode())
    archive.data(base + "modules.dep", "".join("%s: %s\n" % (path, " ".join(needs))
                                               for path, needs in sorted(wanted.values())).encode())
    with open(os.path.join(kernel.modules, "modules.alias")) as f:
        aliases = [line for line in f if module_name(line.split()[-1]) in wanted]
    archive.data(base + "modules.alias", "".join(aliases).encode())
    for path, _ in wanted.values():
        archive.file(os.path.join(kernel.modules, path), base + path)
