// Disks of other NBD servers as sources: read, mapped, served again, with everything their servers may do to them.
import Glibc
import Testing

@Suite struct RemoteSourceTests {
    @Test(arguments: [
        [], ["--no-sr"], ["--filter=noextents"], ["--filter=multi-conn", "multi-conn-mode=disable"],
        ["--filter=delay", "rdelay=5ms"], ["--filter=blocksize-policy", "blocksize-minimum=4096"],
        [
            "--filter=blocksize-policy", "blocksize-minimum=512", "blocksize-preferred=4096",
            "blocksize-maximum=65536", "blocksize-error-policy=error",
        ],
    ])
    func `a remote disk reads as it is`(options: [String]) throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let filters = options.filter { $0.hasPrefix("-") }
        let parameters = options.filter { !$0.hasPrefix("-") }
        let socket = folder.file("nbdkit")
        let peer = try Peer(
            "nbdkit", ["-f", "-U", socket, "-r"] + filters + ["file", image] + parameters, socket: socket)
        #expect(try run("diskgate", "checksum", peer.uri()).text.hasPrefix(try checksum(image)))
        let part = try run("diskgate", "cat", peer.uri(), "--offset", "1234567", "--length", "3000001")
        let expected = try run("diskgate", "cat", image, "--offset", "1234567", "--length", "3000001")
        #expect(part.output == expected.output)
    }

    @Test func `a remote disk is mapped as its server maps it`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let peer = try Peer.nbdkit("-r", "file", image, in: folder)
        let theirs = try run("nbdinfo", "--map", peer.uri())
        func words(_ outcome: Outcome) -> [Substring] { outcome.text.split(whereSeparator: \.isWhitespace) }
        #expect(words(try run("diskgate", "map", peer.uri())) == words(theirs))
    }

    @Test func `what a server does not tell is data`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 4 << 20)
        let peer = try Peer.nbdkit("-r", "--no-sr", "file", image, in: folder)
        let words = try run("diskgate", "map", peer.uri()).text.split(whereSeparator: \.isWhitespace)
        #expect(words == ["0", "\(4 << 20)", "0", "data"])
    }

    @Test func `dirty bitmaps of qemu-nbd are contexts`() throws {
        let folder = try Folder()
        let image = folder.file("disk.qcow2")
        try run("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
        try run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 4M", image)
        try run("qemu-img", "bitmap", "--add", "-g", "64k", image, "monday")
        try run("qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 64k", "-c", "write -P 3 40M 128k", image)
        let socket = folder.file("qemu")
        let peer = try Peer(
            "qemu-nbd", ["-r", "-t", "-A", "-e", "8", "-B", "monday", "-f", "qcow2", "-k", socket, image],
            socket: socket)
        for context in ["base:allocation", "qemu:dirty-bitmap:monday", "qemu:allocation-depth"] {
            let ours = try run("diskgate", "map", "--context", context, peer.uri())
            let theirs = try run("nbdinfo", "--map=\(context)", peer.uri())
            // nbdinfo knows no words for bitmaps that were not there when it was written: numbers only.
            func numbers(_ outcome: Outcome) -> [[Substring]] {
                outcome.lines.map { Array($0.split(separator: " ").prefix(3)) }
            }
            #expect(numbers(ours) == numbers(theirs), "\(context)")
        }
        #expect(try run("diskgate", "info", peer.uri()).text.contains("monday"))
        // The bitmap is served on, too.
        try serving([peer.uri()], in: folder) { (gateway) throws in
            let again = try run("nbdinfo", "--map=qemu:dirty-bitmap:monday", gateway.uri())
            let direct = try run("nbdinfo", "--map=qemu:dirty-bitmap:monday", peer.uri())
            #expect(again.lines == direct.lines)
        }
    }

    @Test func `exports of nbd-server are found by name`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let socket = folder.file("nbd-server")
        let configuration = folder.file("configuration")
        let text = """
            [generic]
            unixsock = \(socket)
            port = \(20_000 + Int(getpid()) % 20_000)
            allowlist = true
            [first]
            exportname = \(image)
            readonly = true
            """
        try run("sh", "-c", "printf '%s\\n' \"$1\" > \"$2\"", "sh", text, configuration)
        let peer = try Peer("nbd-server", ["-d", "-C", configuration], socket: socket)
        #expect(try run("diskgate", "checksum", peer.uri("first")).text.hasPrefix(try checksum(image)))
        // Without a process of its own for each client, it ends with the first.
        peer.kill()
        try peer.start()
        let missing = try attempt("diskgate", "info", peer.uri("second"))
        #expect(missing.status == 1 && missing.errors.contains("second"), "\(missing.errors)")
    }

    @Test func `a server's exports are listed as their names are written in URIs`() throws {
        let folder = try Folder()
        let names = ["disk", "a b", "umläut/x"]
        let sources = names.indices.map { "memory:\($0 + 1)M" }
        let options = names.flatMap { ["--name", $0] } + ["--description", "the first"]
        try serving(options + sources, in: folder) { (gateway) throws in
            let list = try run("diskgate", "info", "--list", gateway.uri())
            #expect(list.text == "disk\tthe first\na%20b\numl%C3%A4ut/x\n")
            for (index, line) in list.lines.enumerated() {
                let name = line.split(separator: "\t")[0]
                let info = try run("diskgate", "info", gateway.uri(String(name)))
                #expect(info.text.contains("(\(index + 1) MiB)"), "\(info.text)")
            }
        }
        let failed = try attempt("diskgate", "info", "--list", "memory:1M")
        #expect(failed.status == 1 && failed.errors.contains("no NBD server"))
    }

    /// Another program of this name runs what it is told to run there, here.
    @Test func `a socket on another machine is reached through ssh`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let socket = folder.file("a; b&c socket")
        let peer = try Peer("nbdkit", ["-f", "-U", socket, "-r", "file", image], socket: socket)
        let scripts = """
            mkdir "$1/bin"
            cd "$1/bin"
            printf '#!/bin/sh\necho "$*" >> %s/calls\n' "$1" > ssh
            printf 'while [ "$1" != -- ]; do shift; done\nshift 2\nexec sh -c "$*"\n' >> ssh
            printf '#!/bin/sh\nshift 2\nexec socat - "UNIX-CONNECT:$1"\n' > nc
            chmod +x ssh nc
            """
        try run("sh", "-c", scripts, "sh", folder.path)
        let uri = "nbd+ssh://me@host/?socket=\(folder.path)/a%3b%20b%26c%20socket"
        let path = "PATH=\(folder.path)/bin:/usr/bin:/bin"
        #expect(try run("env", path, Tool.diskgate.path, "checksum", uri).text.hasPrefix(try checksum(image)))
        let calls = try run("cat", folder.file("calls")).text
        #expect(calls.hasPrefix("-T -o BatchMode=yes -l me -- host nc -U -- '"), "\(calls)")
        peer.kill()
        let failed = try attempt("env", path, Tool.diskgate.path, "info", uri)
        #expect(failed.status == 1 && failed.errors.contains("closed the connection"), "\(failed.errors)")
    }

    @Test func `an ssh that gets nowhere is ended when time is up`() throws {
        let folder = try Folder()
        let scripts = """
            mkdir "$1/bin"
            printf '#!/bin/sh\nsleep 600 &\necho "$!" > %s/sleeper\necho "$$" > %s/pid\nwait\n' "$1" "$1" > "$1/bin/ssh"
            chmod +x "$1/bin/ssh"
            """
        try run("sh", "-c", scripts, "sh", folder.path)
        let uri = "nbd+ssh://host/?socket=/s&timeout=1"
        let path = "PATH=\(folder.path)/bin:/usr/bin:/bin"
        let failed = try attempt("env", path, Tool.diskgate.path, "info", uri)
        #expect(failed.status == 1 && failed.errors.contains("waiting for the server"), "\(failed.errors)")
        for name in ["pid", "sleeper"] {
            let number = try #require(pid_t(try run("cat", folder.file(name)).lines[0]))
            #expect(eventually { kill(number, 0) < 0 }, "\(name)")
        }
    }

    @Test func `a remote disk served on is copied as it is`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let peer = try Peer.nbdkit("-r", "file", image, in: folder)
        let copy = try folder.filled("copy")
        try serving([peer.uri()], in: folder) { (gateway) throws in
            try run("nbdcopy", gateway.uri(), copy)
        }
        #expect(try isSame(image, copy))
    }

    @Test func `a remote disk served on is written as it is`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let target = try folder.filled("target")
        let peer = try Peer.nbdkit("file", target, in: folder)
        try serving(["--writable", peer.uri()], in: folder) { (gateway) throws in
            try run("nbdcopy", "--flush", image, gateway.uri())
        }
        #expect(try isSame(image, target))
    }

    @Test func `an overlay leaves a remote disk alone`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let before = try checksum(image)
        let peer = try Peer.nbdkit("file", image, in: folder)
        try serving(["--overlay", peer.uri()], in: folder) { (gateway) throws in
            try run("qemu-io", "-f", "raw", "-c", "write -P 7 5M 1M", "-c", "read -P 7 5M 1M", gateway.uri())
        }
        #expect(try checksum(image) == before)
    }

    @Test func `an image inside of a remote disk is opened only when asked to`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let packed = folder.file("disk.qcow2")
        try run("qemu-img", "convert", "-O", "qcow2", image, packed)
        let peer = try Peer.nbdkit("-r", "file", packed, in: folder)
        #expect(try run("diskgate", "checksum", peer.uri("disk.qcow2")).text.hasPrefix(try checksum(packed)))
        #expect(try run("diskgate", "checksum", peer.uri("", "format=qcow2")).text.hasPrefix(try checksum(image)))
    }

    @Test func `a server's errors arrive with their place, and end nothing`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let peer = try Peer.nbdkit(
            "-r", "--filter=error", "file", image, "error-pread=EIO", "error-pread-rate=100%",
            "error-file=\(folder.file("on"))", in: folder)
        let sums = try run("diskgate", "checksum", peer.uri())
        #expect(sums.text.hasPrefix(try checksum(image)))
        try run("touch", folder.file("on"))
        let failed = try attempt("diskgate", "checksum", peer.uri())
        #expect(failed.status == 1 && failed.errors.contains("EIO") && failed.errors.contains("reading"))
    }

    @Test func `a read-only server is not opened for writing`() throws {
        let folder = try Folder()
        let image = try folder.image("disk", size: 1 << 20)
        let peer = try Peer.nbdkit("-r", "file", image, in: folder)
        let failed = try attempt("diskgate", "serve", "--writable", "--listen", "unix:\(folder.file("s"))", peer.uri())
        #expect(failed.status == 1 && failed.errors.contains("reading only"), "\(failed.errors)")
    }

    @Test(arguments: [
        "nbd://localhost:1/", "nbd+unix:///?socket=/nonexistent", "nbd+unix:///x", "nbd://host/?frob=1",
        "nbd://host/?tls-psk-file=x", "nbd://host/%00", "nbd://-oProxyCommand=x/", "nbd://h/?timeout=0",
    ])
    func `what cannot be opened says why`(uri: String) throws {
        let failed = try attempt("diskgate", "info", uri)
        #expect(failed.status == 1 && failed.errors.hasPrefix("diskgate: "), "\(failed.status): \(failed.errors)")
        #expect(failed.errors.split(separator: "\n").count == 1, "\(failed.errors)")
    }

    @Test func `a command that serves on its standard input and output is a source`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let sum = try checksum(image)
        for command in ["nbdkit -s file \(image)", "exec \(Tool.diskgate.path) serve --quiet --stdio '\(image)'"] {
            #expect(try run("diskgate", "checksum", "nbd+command:\(command)").text.hasPrefix(sum))
        }
        let copy = folder.file("copy")
        try serving(["nbd+command:nbdkit -s file \(image)"], in: folder) { (gateway) throws in
            try run("nbdcopy", gateway.uri(), copy)
        }
        #expect(try isSame(image, copy))
    }

    @Test(arguments: ["false", "echo hello", "exit 3", "kill -9 $$", "exec sleep 0"])
    func `a command that serves nothing is an error`(_ command: String) throws {
        let outcome = try attempt("diskgate", "info", "nbd+command:\(command)")
        #expect(outcome.status == 1 && outcome.errors.contains("nbd+command:"))
    }

    @Test func `a command may not be missing`() throws {
        for text in ["nbd+command:", "nbd+command:  "] {
            let outcome = try attempt("diskgate", "info", text)
            #expect(outcome.status == 1 && outcome.errors.contains("give a shell command"))
        }
    }
}
