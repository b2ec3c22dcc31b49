// Addresses to listen on and peers: what is parsed, what is refused, and sockets that are really bound.
import Block
import CLinux
import Glibc
import LinuxIO
import Support
import Testing

@Suite struct AddressTests {
    @Test(
        arguments: [
            ("unix:/run/x.sock", .unix(path: "/run/x.sock"), true),
            ("unix:relative", .unix(path: "relative"), true),
            ("tcp://localhost:10", .tcp(host: "localhost", port: 10), true),
            ("tcp://127.0.0.1", .tcp(host: "127.0.0.1", port: 10809), true),
            ("tcp:127.9.9.9:1", .tcp(host: "127.9.9.9", port: 1), true),
            ("tcp://[::1]:0", .tcp(host: "::1", port: 0), true),
            ("tcp://[::1]", .tcp(host: "::1", port: 10809), true),
            ("tcp://[::]:65535", .tcp(host: "::", port: 65535), false),
            ("tcp://0.0.0.0:1", .tcp(host: "0.0.0.0", port: 1), false),
            ("tcp://:7", .tcp(host: "", port: 7), false),
            ("tcp://*:7", .tcp(host: "*", port: 7), false),
            ("tcp://example.org:7", .tcp(host: "example.org", port: 7), false),
            // A name that only looks like a loopback address.
            ("tcp://127.example.org:7", .tcp(host: "127.example.org", port: 7), false),
            ("tcp://127.0.0.1.example.org", .tcp(host: "127.0.0.1.example.org", port: 10809), false),
            ("vsock:5000", .vsock(port: 5000), false),
            ("vsock://5000", .vsock(port: 5000), false),
        ] as [(String, ListenAddress, Bool)])
    func parses(text: String, address: ListenAddress, isLocal: Bool) throws {
        let parsed = try ListenAddress(text, defaultPort: 10809)
        #expect(parsed == address)
        #expect(parsed.isLocal == isLocal)
        // What it prints is the same address again.
        #expect(try ListenAddress(parsed.description, defaultPort: 1) == address)
    }

    @Test(arguments: [
        "", "unix", "unix:", "unix:" + String(repeating: "x", count: 108), "unix:a\0b", "tcp", "tcp://h:",
        "tcp://h:65536",
        "tcp://h:-1", "tcp://h:+1", "tcp://h: 1", "tcp://h:1x", "tcp://::1", "tcp://::1:80", "tcp://[::1",
        "tcp://[::1]80",
        "tcp://[::1]:", "vsock:", "vsock:x", "vsock:4294967295", "vsock:4294967296", "vsock:-1", "vsock:+1",
        "http://h:1", "10809", "/run/x.sock", "tcp://h:１",
    ])
    func refuses(text: String) throws {
        try requireError(.invalid, "\(text)") { _ = try ListenAddress(text, defaultPort: 10809) }
    }

    @Test func longestUnixPath() throws {
        let path = String(repeating: "x", count: 107)
        #expect(try ListenAddress("unix:" + path, defaultPort: 1) == .unix(path: path))
    }

    @Test(
        arguments: [
            ("127.0.0.1", [127, 0, 0, 1], "127.0.0.1"), ("255.255.255.255", [255, 255, 255, 255], "255.255.255.255"),
            ("::1", [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], "::1"),
            ("2001:DB8:0:0::5", [0x20, 1, 0xD, 0xB8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5], "2001:db8::5"),
        ] as [(String, [UInt8], String)])
    func parsesIPAddresses(text: String, bytes: [UInt8], printed: String) throws {
        let address = try #require(IPAddress(text))
        #expect(address.bytes == bytes)
        #expect(address.description == printed)
    }

    @Test(arguments: [
        "", "1", "1.2.3", "1.2.3.4.5", "256.1.1.1", "1.2.3.4 ", " 1.2.3.4", "01.2.3.4", ":", ":::", "::1::2", "[::1]",
        "::1%lo",
        "12345::", "localhost", "0x7f.0.0.1", "1:2:3:4:5:6:7:8:9",
    ])
    func refusesIPAddresses(text: String) { #expect(IPAddress(text) == nil) }
}

@Suite struct SocketTests {
    @Test func freePortIsToldAndConnects() throws {
        let sockets = try ListeningSocket.listen(on: .tcp(host: "127.0.0.1", port: 0))
        #expect(sockets.count == 1)
        guard case .tcp("127.0.0.1", let port) = sockets[0].address else { throw CheckFailure("\(sockets[0].address)") }
        #expect(port > 0)
        // A second one cannot have it.
        do {
            _ = try ListeningSocket.listen(on: .tcp(host: "127.0.0.1", port: port))
            Issue.record("a port was bound twice")
        } catch { #expect(error.message.contains("tcp://127.0.0.1:\(port)"), "\(error)") }
    }

    @Test func staleUnixSocketIsReplacedAndALiveOneIsNot() throws {
        try withTemporaryDirectory { directory in
            let path = directory.file("s")
            do {
                let first = try ListeningSocket.listen(on: .unix(path: path))
                #expect(first[0].isOwn)
                #expect(throws: BlockError.self) { _ = try ListeningSocket.listen(on: .unix(path: path)) }
                withExtendedLifetime(first) {}
            }
            // The path is still there, nobody listens.
            try require(access(path, F_OK) == 0)
            let second = try ListeningSocket.listen(on: .unix(path: path))
            let client = try connect(to: .unix(path: path), deadline: monotonicSeconds() + 10)
            let server = Descriptor(owning: dg_accept(second[0].descriptor.number))
            #expect(Peer(socket: server.number) == .unix(pid: getpid(), uid: getuid(), gid: getgid()))
            withExtendedLifetime(client) {}
        }
    }

    /// A server that is looked for hears nothing of it.
    @Test func askingForAServerIsNoConnection() throws {
        try withTemporaryDirectory { directory in
            let path = directory.file("s")
            #expect(!isAbandonedSocket(path))
            do {
                let server = try ListeningSocket.listen(on: .unix(path: path))[0].descriptor
                #expect(!isAbandonedSocket(path))
                var ready = pollfd(fd: server.number, events: Int16(POLLIN), revents: 0)
                #expect(poll(&ready, 1, 0) == 0)
            }
            #expect(isAbandonedSocket(path))
        }
    }

    /// A file that is no socket is never removed.
    @Test func fileInTheWayStays() throws {
        try withTemporaryDirectory { directory in
            let path = try directory.makeFile("s", [1, 2, 3])
            #expect(throws: BlockError.self) { _ = try ListeningSocket.listen(on: .unix(path: path)) }
            #expect(try contentOfFile(path) == [1, 2, 3])
        }
    }

    @Test func connectingToNothingFails() throws {
        try withTemporaryDirectory { directory in
            try requireError(.notFound, "no socket") {
                _ = try connect(to: .unix(path: directory.file("nothing")), deadline: 0)
            }
            try requireError(.invalid, "a long path") {
                _ = try connect(to: .unix(path: String(repeating: "x", count: 108)), deadline: 0)
            }
        }
    }

    @Test func descriptorsThatAreNoConnectionAreInherited() throws {
        let file = try Descriptor.open("/dev/null", O_RDONLY)
        #expect(Peer(socket: file.number) == .inherited)
        #expect(Peer.ip(try #require(IPAddress("::1"))).description == "[::1]:0")
    }
}
