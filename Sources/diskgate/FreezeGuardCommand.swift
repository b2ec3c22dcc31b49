// diskgate freeze-guard: the child that diskgate starts before it freezes a guest; not for people.
import ArgumentParser
import Block
import Glibc
import Hypervisors

struct FreezeGuardCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "freeze-guard",
        abstract: "Guard one freeze of a guest's file systems (started by diskgate itself).",
        shouldDisplay: false)

    @Option(help: "The longest time that file systems stay frozen, in seconds.")
    var seconds: Int

    @Option(help: "The guest agent's socket.")
    var agent: String?

    @Option(help: "A connection URI of libvirt.")
    var libvirt: String?

    @Option(help: "A domain of libvirt.")
    var domain: String?

    func validate() throws {
        if !(1...3600).contains(seconds) { throw ValidationError("--seconds is from 1 to 3600") }
    }

    func run() throws {
        let details = ["agent": agent, "libvirt": libvirt, "domain": domain].compactMapValues { $0 }
        let status = try FreezeGuardProcess.run(details, seconds: seconds)
        if status != 0 { throw ExitCode(status) }
    }
}
