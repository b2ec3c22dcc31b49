// The exports that fuzzed servers have: a list that never changes.
public import LinuxIO
public import NBD

/// A directory of exports that never changes.
public final class FixedExports: ExportDirectory {
    /// Every export, whoever asks.
    public let all: [Export]

    /// A directory of these exports.
    public init(_ all: [Export]) { self.all = all }

    public func exports(for peer: Peer) -> [Export] { all.filter { $0.options.admits(peer) } }

    public func export(named name: String, for peer: Peer) -> Export? {
        let found = all.first { $0.name == name } ?? (name.isEmpty ? all.first : nil)
        return found.flatMap { $0.options.admits(peer) ? $0 : nil }
    }
}
