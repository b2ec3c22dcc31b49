// What setup tells of each program that might act on disks that come: whether it is kept away, and what to do.

import Block

/// One program that acts on disks, and whether it keeps away from those that are not the proxy's own.
public struct ProtectionFinding: Sendable, Codable, Equatable {
    /// The program.
    public enum Part: String, Sendable, Codable, CaseIterable {
        case udev
        case lvm = "LVM"
        case mdadm
        case multipath
    }

    /// How it is with it.
    public enum State: String, Sendable, Codable {
        /// It keeps away.
        case inForce = "in force"
        /// It does not, or nobody can tell.
        case missing
        /// It is not here.
        case notNeeded = "not needed"
    }

    public var part: Part
    public var state: State
    /// What was found.
    public var detail: String
    /// What to do where it is missing.
    public var remedy: String?

    init(_ part: Part, _ state: State, _ detail: String, remedy: String? = nil) {
        self.part = part
        self.state = state
        self.detail = detail
        self.remedy = remedy
    }
}

extension [ProtectionFinding] {
    /// Whether every program that is here keeps away.
    public var isInForce: Bool { allSatisfy { $0.state != .missing } }
}

extension HostProtection {
    /// The same as a rule for the choice of a transport.
    public func rule() -> Finding {
        let rule = "hotadd.protection"
        let findings: [ProtectionFinding]
        do throws(BlockError) { findings = try self.findings(asks: false) } catch {
            return Finding(rule, .warning, error.message, remedy: "run it as root")
        }
        let missing = findings.filter { $0.state == .missing }
        if missing.isEmpty {
            let kept = findings.filter { $0.state == .inForce }.map(\.part.rawValue)
            let what = kept.isEmpty ? "nothing here acts on" : "\(kept.joined(separator: ", ")) are kept away from"
            return Finding(rule, .ok, "\(what) disks that come")
        }
        let names = missing.map { "\($0.part.rawValue): \($0.detail)" }.joined(separator: "; ")
        return Finding(
            rule, .excluded, "this machine's own programs may act on what lies on disks that come (\(names))",
            remedy: missing.first?.remedy ?? "diskgate setup")
    }
}
