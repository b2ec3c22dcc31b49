// The exports that fuzzed servers have: a list that never changes.
public import LinuxIO
public import NBD

/// A directory of exports that never changes.
public final class FixedExports: ExportDirectory {
    /// Every export, whoever asks.
    public let all: [Export]

    /// A directory of these exports.
    public init(_ all: [Export]) { self.all = all }

    public func exports(for client: Credentials) -> [Export] { all.filter { $0.admission(of: client) != .refused } }

    public func export(named name: String, for client: Credentials) -> Export? {
        let found = all.first { $0.name == name } ?? (name.isEmpty ? all.first : nil)
        return found.flatMap { $0.admission(of: client) == .refused ? nil : $0 }
    }
}
