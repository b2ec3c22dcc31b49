// Who freezes and thaws a guest's file systems: the agent on its own socket, or libvirt.
import Block
import LinuxIO

/// A way to the guest's file systems.
enum Freezer: Sendable, Equatable {
    /// The socket of the guest agent.
    case agent(path: String)
    /// A domain of libvirt. The virsh that has frozen it is there to thaw it: nothing has to be started meanwhile.
    case libvirt(Virsh, domain: String)

    /// Freezes.
    ///
    /// - Throws: `.unsupported` when nothing was frozen, nor will be; another `BlockError` when that is not certain.
    func freeze(deadline: Double) throws(BlockError) {
        let count: Int64?
        switch self {
        case .agent(let path):
            let agent: GuestAgent
            do throws(BlockError) { agent = try GuestAgent(path, deadline: deadline) } catch {
                // It was not asked to freeze yet.
                throw BlockError(.unsupported, error.message)
            }
            count = try agent.freeze(deadline: deadline)
        case .libvirt(let virsh, let domain):
            let seconds = deadline - monotonicSeconds()
            count = Self.count(try virsh.run(["domfsfreeze", domain], seconds: seconds))
        }
        if count == 0 {
            // Some agents take themselves for frozen now.
            _ = try thaw(deadline: deadline)
            throw BlockError(.unsupported, "the guest agent has found no file system to freeze")
        }
    }

    /// Thaws. What is not frozen may be thawed, too.
    ///
    /// - Returns: whether there were frozen file systems until now.
    func thaw(deadline: Double) throws(BlockError) -> Bool {
        switch self {
        case .agent(let path): return try GuestAgent(path, deadline: deadline).thaw(deadline: deadline)
        case .libvirt(let virsh, let domain):
            let seconds = deadline - monotonicSeconds()
            let said = try virsh.run(["domfsthaw", domain], seconds: seconds)
            return Self.count(said) != 0
        }
    }

    /// The number in virsh's "Froze 2 filesystem(s)"; nil where it has said something else.
    private static func count(_ said: String) -> Int64? {
        said.split { $0.isWhitespace }.lazy.compactMap { Int64($0) }.first
    }

    /// Thaws, and tries again until it works.
    ///
    /// - Returns: whether there were frozen file systems until now.
    /// - Throws: the last try's error, after some time.
    func thawSurely(seconds: Double) throws(BlockError) -> Bool {
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
        case .libvirt(let virsh, let domain): ["libvirt": virsh.uri, "domain": domain]
        }
    }

    /// Reads `details`; nil where they name nobody.
    init?(_ details: [String: String]) {
        if let path = details["agent"] {
            self = .agent(path: path)
        } else if let uri = details["libvirt"], let domain = details["domain"] {
            self = .libvirt(Virsh(uri: uri), domain: domain)
        } else {
            return nil
        }
    }
}
