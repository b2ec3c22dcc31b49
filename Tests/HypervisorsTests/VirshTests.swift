// One virsh for many commands: their answers are told apart, a failed one is never taken for a good one, and a virsh
// that hangs or dies is replaced. Its test driver is asked, for which no daemon has to run.
import Block
import Glibc
import LinuxIO
import Support
import Testing

@testable import Hypervisors

@Suite(.enabled(if: Tool.exists("virsh")))
struct VirshTests {
    private static let uri = "test:///default"

    @Test func answersAreToldApart() throws {
        let virsh = Virsh(uri: Self.uri)
        for _ in 0..<3 {
            #expect(try virsh.run(["domstate", "test"]) == "running\n")
            let missing = try virsh.attempt(["domstate", "absent"])
            #expect(!missing.isGood && missing.output.isEmpty && missing.errors.contains("'absent'"))
            #expect(try virsh.run(["echo", "a", "b"]) == "a b\n")
            #expect(try virsh.run(["checkpoint-list", "test", "--name"]).isEmpty)
            #expect(try XMLElement(parsing: virsh.run(["dumpxml", "test"]))["name"]?.text == "test")
        }
        try requireError(.notFound, "domstate absent") { _ = try virsh.run(["domstate", "absent"]) }
    }

    /// What virsh does not understand ends the line, marks and all, without being run.
    @Test(arguments: [
        ["no-such-command", "test"], ["domstate", "--no-such-option"], ["domstate"], ["domstate", "a", "b"],
    ])
    func nonsenseIsAnError(words: [String]) throws {
        let virsh = Virsh(uri: Self.uri)
        let answer = try virsh.attempt(words)
        #expect(!answer.isGood && !answer.errors.isEmpty)
        #expect(try virsh.run(["domstate", "test"]) == "running\n")
    }

    @Test(arguments: [
        "a b", "it's", "'", "\"", "a;domstate test", "a\\", "$x `y` #z", "!!", "a\tb", "a\nb", "vm-\u{FC}", "--",
        "\u{7F}",
        String(repeating: "long ", count: 400),
    ])
    func wordsComeThroughAsTheyAre(word: String) throws {
        let virsh = Virsh(uri: Self.uri)
        #expect(try virsh.run(["echo", "--", "<", word, ">"]) == "< \(word) >\n")
        #expect(try virsh.run(["domstate", "test"]) == "running\n")
    }

    @Test func oneThatHangsIsReplaced() throws {
        let virsh = Virsh(uri: Self.uri)
        let begin = monotonicSeconds()
        try requireError(.inputOutput, "event") {
            _ = try virsh.run(["event", "--event", "lifecycle", "--loop"], seconds: 0.5)
        }
        #expect(monotonicSeconds() - begin < Virsh.commandSeconds)
        #expect(try virsh.run(["domstate", "test"]) == "running\n")
    }

    @Test func oneThatDiesIsNoticed() throws {
        let shell = try VirshShell(Self.uri)
        #expect(try shell.attempt(["domstate", "test"], seconds: 60).isGood && shell.isFit)
        kill(shell.process, SIGKILL)
        let deadline = monotonicSeconds() + 60
        while shell.isFit { try require(monotonicSeconds() < deadline, "its death is not seen") }
        #expect(throws: BlockError.self) { try shell.attempt(["domstate", "test"], seconds: 60) }
        // In the middle of a command, too.
        let other = try VirshShell(Self.uri)
        let process = other.process
        try startThread(name: "killer") {
            usleep(100_000)
            kill(process, SIGKILL)
        }
        #expect(throws: BlockError.self) {
            try other.attempt(["event", "--event", "lifecycle", "--loop"], seconds: 60)
        }
        #expect(!other.isFit)
    }

    @Test func aConnectionThatCannotBeMadeIsAnError() throws {
        let virsh = Virsh(uri: "test:///nowhere/at/all")
        for _ in 0..<2 {
            let answer = try virsh.attempt(["domstate", "test"])
            #expect(!answer.isGood && answer.errors.contains("failed to connect"), "\(answer)")
        }
    }
}
