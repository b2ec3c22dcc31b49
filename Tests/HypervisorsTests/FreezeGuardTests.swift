// The freeze guard: whatever happens to whom, the guest is thawed.
import Block
import Glibc
import LinuxIO
import Support
import Testing
import Transports

@testable import Hypervisors

@Suite(.enabled(if: Tool.exists("python3")), .serialized)
struct FreezeGuardTests {
    private func with(_ options: [String] = [], _ body: (FakeAgent, TemporaryDirectory) throws -> Void) throws {
        try withTemporaryDirectory { try body(try FakeAgent($0, options), $0) }
    }

    @Test func guestIsFrozenAndThawed() throws {
        try with { agent, _ in
            let held = try FreezeGuard(.agent(path: agent.socket), seconds: 20)
            #expect(agent.states.isEmpty)
            try held.freeze(seconds: 20)
            #expect(agent.states == ["frozen"])
            #expect(try held.thaw())
            #expect(agent.states == ["frozen", "thawed"])
        }
    }

    @Test func guestIsThawedWhenTheTimeIsOver() throws {
        try with { agent, _ in
            let held = try FreezeGuard(.agent(path: agent.socket), seconds: 1)
            try held.freeze(seconds: 1)
            try agent.waitFor(["frozen", "thawed"])
            #expect(try held.thaw() == false)
        }
    }

    @Test func guestIsThawedWhenTheRunIsGone() throws {
        try with { agent, _ in
            var held: FreezeGuard? = try FreezeGuard(.agent(path: agent.socket), seconds: 60)
            try held?.freeze(seconds: 60)
            held = nil
            try agent.waitFor(["frozen", "thawed"])
        }
    }

    @Test func guestIsThawedWhenTheGuardIsKilled() throws {
        try with { agent, _ in
            let held = try FreezeGuard(.agent(path: agent.socket), seconds: 60)
            try held.freeze(seconds: 60)
            kill(held.process, SIGKILL)
            #expect(try held.thaw() == false)
            #expect(agent.states == ["frozen", "thawed"])
        }
    }

    @Test func guestThatFreezesTooSlowlyIsThawed() throws {
        try with(["--slow", "2"]) { agent, _ in
            let held = try FreezeGuard(.agent(path: agent.socket), seconds: 1)
            #expect(throws: BlockError.self) { try held.freeze(seconds: 1) }
            try agent.waitFor(["frozen", "thawed"])
        }
    }

    @Test func thawingIsTriedAgain() throws {
        try with(["--thaw-fails", "3"]) { agent, _ in
            let held = try FreezeGuard(.agent(path: agent.socket), seconds: 20)
            try held.freeze(seconds: 20)
            #expect(try held.thaw())
            #expect(agent.states == ["frozen", "thawed"])
        }
    }

    @Test func agentThatRefusesIsAnError() throws {
        try with(["--refuse"]) { agent, _ in
            let held = try FreezeGuard(.agent(path: agent.socket), seconds: 1)
            #expect(throws: BlockError.self) { try held.freeze(seconds: 1) }
        }
    }

    @Test(.enabled(if: QEMUProcess.isAvailable)) func runFreezesAroundTheTransaction() throws {
        try withQEMU { process in
            let agent = try FakeAgent(process.directory)
            // A guest that does not run cannot answer: here, its processor runs without a system.
            try process.own { try $0.execute("cont") }
            let uri = "\(process.uri)&agent=\(agent.socket)"
            let provider = try Hypervisors.open(uri)
            #expect(try provider.inspect().hasGuestAgent)
            var wanted = request(["vda"], checkpoint: "r-1")
            wanted.quiescing = .required
            let ledger = try begin(process)
            let session = try provider.begin(wanted, ledger: ledger)
            #expect(session.consistency == .quiesced)
            #expect(session.freezeSeconds.map { $0 < 20 } == true)
            #expect(agent.states == ["frozen", "thawed"])
            #expect(!ledger.obligations.contains { $0.kind == "guest.freeze" })
            try session.finish(adopting: true)
            // Without an agent: refused, or said.
            let plain = try Hypervisors.open(process.uri)
            wanted.checkpoint = "r-2"
            #expect(throws: BlockError.self) { try plain.begin(wanted, ledger: ledger) }
            #expect(ledger.obligations.isEmpty)
            wanted.quiescing = .ifPossible
            let crash = try plain.begin(wanted, ledger: ledger)
            #expect(crash.consistency == .crashConsistent && crash.freezeSeconds == nil)
            #expect(crash.warnings.contains { $0.contains("no guest agent") })
            try crash.finish(adopting: false)
            #expect(try process.leftovers().isEmpty)
        }
    }

    @Test func guestThatThawsByItselfWasNotFrozen() throws {
        try with { agent, _ in
            let held = try FreezeGuard(.agent(path: agent.socket), seconds: 20)
            try held.freeze(seconds: 20)
            let deadline = monotonicSeconds() + 10
            #expect(try GuestAgent(agent.socket, deadline: deadline).thaw(deadline: deadline))
            #expect(try held.thaw() == false)
        }
    }

    @Test func freezingNothingIsNotFreezing() throws {
        try with(["--count", "0"]) { agent, directory in
            let held = try FreezeGuard(.agent(path: agent.socket), seconds: 20)
            try requireError(.unsupported, "freezing no file system") { try held.freeze(seconds: 20) }
            #expect(agent.states == ["frozen", "thawed"])
            let alone = try FreezeGuard(.agent(path: directory.file("nobody.sock")), seconds: 20)
            try requireError(.unsupported, "freezing without an agent") { try alone.freeze(seconds: 20) }
        }
    }

    /// Passes the moment of a snapshot that makes nothing.
    private func pass(_ agent: FakeAgent, _ ledger: RunLedger, _ quiescing: Quiescing) throws
        -> SnapshotMoment.Outcome
    {
        var wanted = request(["vda"], checkpoint: "r-1")
        wanted.quiescing = quiescing
        let moment = try SnapshotMoment(freezer: .agent(path: agent.socket), wanted, ledger, obstacle: nil)
        return try moment.pass {}
    }

    @Test func guestIsThawedWhenTheGuardIsKilledBeforeItSaysThatItFroze() throws {
        try with { agent, directory in
            let words = FreezeGuard.program.withLock { $0 }
            FreezeGuard.program.withLock { $0 = ["env", "DISKGATE_STEP_KILL=guard.frozen"] + words }
            let ledger = try RunLedger.begin(
                stateDirectory: directory.file("state"), machine: "m", repository: nil)
            let outcome = try pass(agent, ledger, .ifPossible)
            #expect(outcome.consistency == .crashConsistent && outcome.warnings.count == 1)
            #expect(agent.states == ["frozen", "thawed"])
            #expect(ledger.obligations.isEmpty)
            #expect(throws: BlockError.self) { try pass(agent, ledger, .required) }
            #expect(agent.states == ["frozen", "thawed", "frozen", "thawed"])
            #expect(ledger.obligations.isEmpty)
        }
    }

    @Test(.enabled(if: QEMUProcess.isAvailable)) func obligationOfAFrozenGuestThaws() throws {
        try withQEMU { process in
            let agent = try FakeAgent(process.directory)
            let deadline = monotonicSeconds() + 10
            _ = try GuestAgent(agent.socket, deadline: deadline).freeze(deadline: deadline)
            let obligation = try begin(process).intend("guest.freeze", ["agent": agent.socket])
            try Hypervisors.open(process.uri).settle(obligation, adopted: false)
            #expect(agent.states == ["frozen", "thawed"])
        }
    }
}
