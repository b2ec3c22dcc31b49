// A guest agent that freezes nothing and writes down when it should have.
import Block
import Glibc
import LinuxIO
import Support

@testable import Hypervisors

/// A running Scripts/lab/fake-agent.
final class FakeAgent {
    let socket: String
    private let log: String
    private let pid: pid_t

    /// Starts one with a guard program that can be had here: the tests are not diskgate.
    init(_ directory: TemporaryDirectory, _ options: [String] = []) throws {
        socket = directory.file("qga.sock")
        log = directory.file("qga.log")
        let repository = #filePath.split(separator: "/").dropLast(4).reduce("") { "\($0)/\($1)" }
        pid = try ChildProgram.start(
            ["\(repository)/Scripts/lab/fake-agent", socket, log] + options, input: nil, output: nil, errors: nil)
        let program = try Self.diskgate()
        FreezeGuard.program.withLock { $0 = [program, "freeze-guard"] }
        let deadline = monotonicSeconds() + 20
        while (try? connect(to: .unix(path: socket), deadline: deadline)) == nil {
            try require(monotonicSeconds() < deadline, "the fake agent does not start")
            usleep(5000)
        }
    }

    deinit {
        kill(pid, SIGKILL)
        ChildProgram.reap(pid)
    }

    /// The command beside the test bundle.
    static func diskgate() throws -> String {
        var buffer = [CChar](repeating: 0, count: 4096)
        let count = max(0, readlink("/proc/self/exe", &buffer, buffer.count))
        let own = String(decoding: buffer[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self)
        return directoryName(own) + "/diskgate"
    }

    /// What it was told: frozen, thawed, frozen, ...
    var states: [String] {
        guard let bytes = try? readSmallFile(log) else { return [] }
        return String(decoding: bytes, as: UTF8.self).split(separator: "\n").map { String($0.split(separator: " ")[1]) }
    }

    /// Waits until it has been told these states.
    func waitFor(_ wanted: [String]) throws {
        let deadline = monotonicSeconds() + 30
        while states != wanted {
            try require(monotonicSeconds() < deadline, "the agent was told \(states), not \(wanted)")
            usleep(10_000)
        }
    }
}
