// What udev has noted of block nodes: its database in /run, read as it lies there, without its library.
import Glibc

/// udev's notes of block nodes.
public struct UdevDatabase: Sendable {
    /// What udev has noted of a node when it looked at it last.
    public struct Entry: Sendable, Equatable {
        /// Properties: ID_FS_TYPE, SYSTEMD_READY.
        public var properties: [String: String] = [:]
        /// Names of links to the node, beneath /dev: disk/by-id/wwn-0x6000c29012345678.
        public var links: [String] = []

        /// An entry with some properties and links.
        public init(properties: [String: String] = [:], links: [String] = []) {
            (self.properties, self.links) = (properties, links)
        }
    }

    private let root: String

    /// - Parameter root: what lies before /run; empty for this machine.
    public init(root: String = "") { self.root = root }

    /// Whether a udev acts on this machine's devices: its control socket is there.
    public var isActive: Bool { access("\(root)/run/udev/control", F_OK) == 0 }

    /// What is noted of a node; nil where udev has not looked at it yet.
    public func entry(major: UInt32, minor: UInt32) -> Entry? {
        guard let text = readText("\(root)/run/udev/data/b\(major):\(minor)") else { return nil }
        var entry = Entry()
        for line in text.split(separator: "\n") {
            if let property = line.after("E:") {
                let parts = property.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
                if parts.count == 2 { entry.properties[String(parts[0])] = String(parts[1]) }
            } else if let link = line.after("S:") {
                entry.links.append(String(link))
            }
        }
        return entry
    }
}
