// Who freezes and thaws a guest's file systems: the agent on its own socket, or libvirt.
import Block
import LinuxIO

/// A way to the guest's file systems.
enum Freezer: Sendable, Equatable {
    /// The socket of the guest agent.
    case agent(path: String)
    /// A domain of libvirt.
    case libvirt(uri: String, domain: String)

    /// Freezes.
    func freeze(deadline: Double) throws(BlockError) {
        switch self {
        case .agent(let path): _ = try GuestAgent(path, deadline: deadline).freeze(deadline: deadline)
        case .libvirt(let uri, let domain):
            _ = try Virsh(uri: uri).run(["domfsfreeze", domain], seconds: deadline - monotonicSeconds())
        }
    }

    /// Thaws. What is not frozen may be thawed, too.
    func thaw(deadline: Double) throws(BlockError) {
        switch self {
        case .agent(let path): try GuestAgent(path, deadline: deadline).thaw(deadline: deadline)
        case .libvirt(let uri, let domain):
            _ = try Virsh(uri: uri).run(["domfsthaw", domain], seconds: deadline - monotonicSeconds())
        }
    }

    /// Thaws, and tries again until it works.
    ///
    /// - Throws: the last try's error, after some time.
    func thawSurely(seconds: Double) throws(BlockError) {
        let deadline = monotonicSeconds() + seconds
        while true {
            let limit = min(monotonicSeconds() + 10, deadline)
            do throws(BlockError) { return try thaw(deadline: limit) } catch {
                if monotonicSeconds() >= deadline { throw error }
            }
            pause(seconds: 0.2)
        }
    }

    /// The words that tell a guard process of it, and an obligation.
    var details: [String: String] {
        switch self {
        case .agent(let path): ["agent": path]
        case .libvirt(let uri, let domain): ["libvirt": uri, "domain": domain]
        }
    }

    /// Reads `details`; nil where they name nobody.
    init?(_ details: [String: String]) {
        if let path = details["agent"] {
            self = .agent(path: path)
        } else if let uri = details["libvirt"], let domain = details["domain"] {
            self = .libvirt(uri: uri, domain: domain)
        } else {
            return nil
        }
    }
}
