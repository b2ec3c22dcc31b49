// Remote disks against the device conformance suite: over every framing, with every limit a server can have.
import Block
import Glibc
import LinuxIO
import NBD
import Support
import Testing

/// Not a multiple of any block size, but of 512.
private let size = 1_200_128

@Suite struct NBDDeviceConformanceTests {
    @Test(arguments: [false, true])
    func `an export of our own server conforms`(isWritable: Bool) throws {
        try withTemporaryDirectory { directory in
            let content = patternBytes(size, seed: 11)
            var servers: [TestServer] = []
            defer { for server in servers { server.server.stop(graceSeconds: 1) } }
            try DeviceConformance {
                let path = try directory.makeFile("disk", content)
                var options = RawOptions()
                options.isWritable = isWritable
                let server = try TestServer(try RawFileDevice.open(path, options))
                servers.append(server)
                let device = try NBDDevice.open(server.listen(in: directory), isWritable: isWritable)
                return ConformanceSubject(device, content: content)
            }.run()
        }
    }

    /// What cannot be read or written byte by byte is on the wire all the same.
    @Test(arguments: [512, 4096])
    func `an export of large blocks conforms`(block: UInt32) throws {
        try withTemporaryDirectory { directory in
            // The last block is whole: the server refuses parts of blocks.
            let content = patternBytes(1_200_128 / 4096 * 4096, seed: 12)
            let servers = Locked<[TestServer]>([])
            defer { for server in servers.withLock({ $0 }) { server.server.stop(graceSeconds: 1) } }
            try DeviceConformance {
                let isAligned: ScriptedDevice.Hook = { (range) throws(BlockError) in
                    if (range.lowerBound | range.upperBound) & UInt64(block - 1) != 0 {
                        throw BlockError(.invalid, "\(range) is not aligned to \(block)")
                    }
                }
                let below = ScriptedDevice(
                    content, configure: { $0.minimumBlock = block }, beforeRead: isAligned, beforeWrite: isAligned)
                let server = try TestServer(below)
                servers.withLock { $0.append(server) }
                return ConformanceSubject(
                    try NBDDevice.open(server.listen(in: directory), isWritable: true), content: content)
            }.run()
        }
    }

    @Test(arguments: [
        [], ["--no-sr"], ["--filter=nozero"], ["--filter=fua", "fuamode=emulate"], ["--filter=fua", "fuamode=force"],
        ["--filter=noextents"], ["--filter=multi-conn", "multi-conn-mode=disable"],
        ["--filter=blocksize-policy", "blocksize-minimum=512", "blocksize-error-policy=error"],
        [
            "--filter=blocksize-policy", "--filter=nozero", "blocksize-minimum=512", "blocksize-preferred=4096",
            "blocksize-maximum=8192", "blocksize-error-policy=error",
        ],
    ])
    func `a writable export of nbdkit conforms`(arguments: [String]) throws {
        try withTemporaryDirectory { directory in
            let content = patternBytes(size, seed: 13)
            var servers: [PeerServer] = []
            try DeviceConformance {
                for server in servers { server.kill() }
                let path = try directory.makeFile("disk", content)
                let words = arguments.filter { $0.hasPrefix("-") } + ["file", path]
                let server = try PeerServer.nbdkit(
                    words + arguments.filter { !$0.hasPrefix("-") }, in: directory)
                servers.append(server)
                return ConformanceSubject(try NBDDevice.open(server.uri, isWritable: true), content: content)
            }.run()
        }
    }

    @Test func `an export of qemu-nbd conforms`() throws {
        try withTemporaryDirectory { directory in
            let content = patternBytes(size, seed: 14)
            var servers: [PeerServer] = []
            try DeviceConformance {
                for server in servers { server.kill() }
                let path = try directory.makeFile("disk", content)
                let socket = directory.file("qemu-\(servers.count)")
                let server = try PeerServer(
                    "qemu-nbd", ["-f", "raw", "-t", "-A", "--shared=8", "-k", socket, path], path: socket)
                servers.append(server)
                return ConformanceSubject(try NBDDevice.open(server.uri, isWritable: true), content: content)
            }.run()
        }
    }
}
