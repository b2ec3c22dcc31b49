// An iSCSI target of one test: tgtd with files as logical units, ended by its control socket.
import Block
import Glibc
import LinuxIO
import Support
import Transports

/// The repository's top directory.
let repository = #filePath.split(separator: "/").dropLast(4).reduce("") { "\($0)/\($1)" }

/// A target on 127.0.0.1.
final class ISCSITarget: @unchecked Sendable {
    // Sendable because tests start and stop it from one thread at a time.

    private let directory: TemporaryDirectory
    private let starting: [String]
    private(set) var port: UInt16 = 0

    static let name = "iqn.2026-01.lab.example:san"

    /// Starts a target.
    ///
    /// - Parameter chap: USER:PASSWORD that it demands.
    init(_ directory: TemporaryDirectory, chap: String? = nil) throws {
        self.directory = directory
        starting = chap.map { ["--chap", $0] } ?? []
        try start()
    }

    deinit { _ = try? script(["stop"]) }

    @discardableResult
    private func script(_ words: [String]) throws -> String {
        try Tool.output("bash", ["\(repository)/Scripts/lab/iscsi-target", "-w", directory.path] + words)
    }

    /// Starts it, again at the same port after `kill`.
    func start() throws {
        let said = try script(["start"] + starting + (port == 0 ? [] : ["--ports", "\(port)"]))
        let digits = said.split(separator: "127.0.0.1:").last?.prefix { $0.isNumber } ?? ""
        guard let number = UInt16(digits) else { throw CheckFailure("the target says \(said)") }
        port = number
    }

    private func pid() throws -> Int32 {
        let text = try Tool.output("cat", [directory.file("iscsi/pid")])
        guard let number = Int32(text), number > 1 else { throw CheckFailure("no target runs: \(text)") }
        return number
    }

    /// Lets it say nothing, and take nothing, while a body runs.
    func beingSilent(_ body: () throws -> Void) throws {
        let number = try pid()
        Glibc.kill(number, SIGSTOP)
        defer { Glibc.kill(number, SIGCONT) }
        try body()
    }

    /// Ends it as a crash does.
    func kill() throws {
        let number = try pid()
        Glibc.kill(number, SIGKILL)
        // As a zombie it has no command line any more.
        let isGone = waitUntil {
            let line = (try? readSmallFile("/proc/\(number)/cmdline")) ?? []
            return line.isEmpty
        }
        try require(isGone, "the target does not end")
    }

    /// Adds a file as a unit; the first is unit 1.
    func add(_ file: String, serial: String = "TESTLUN0000", _ options: String...) throws {
        try script(["add", file, "--serial", serial] + options)
    }

    /// The URI of a unit.
    func uri(_ unit: Int = 1, user: String? = nil, _ query: String = "") -> String {
        let who = user.map { "\($0)@" } ?? ""
        return "iscsi://\(who)127.0.0.1:\(port)/\(Self.name)/\(unit)\(query.isEmpty ? "" : "?\(query)")"
    }

    /// Opens a unit.
    func open(_ unit: Int = 1, writable: Bool = false, _ query: String = "") throws -> any BlockDevice {
        try SourceReference(uri(unit, query)).open(writable: writable)
    }
}

/// Waits until something is true, at most 20 s.
func waitUntil(_ isTrue: () throws -> Bool) rethrows -> Bool {
    for _ in 0..<1000 {
        if try isTrue() { return true }
        usleep(20_000)
    }
    return try isTrue()
}
