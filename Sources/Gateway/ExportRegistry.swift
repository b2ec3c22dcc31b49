// The exports of a server: where the control plane puts disks and the data plane finds them.
public import Block
public import LinuxIO
public import NBD

/// The exports of a server by name. Changes while clients are served.
public final class ExportRegistry: ExportDirectory {
    private let exports = Locked<[Export]>([])

    /// No exports.
    public init() {}

    /// Adds an export.
    ///
    /// - Throws: `.invalid` when the name is taken.
    public func add(_ export: Export) throws(BlockError) {
        try exports.withLock { (exports) throws(BlockError) in
            if exports.contains(where: { $0.name == export.name }) {
                throw BlockError(
                    .invalid, "exporting \(export.info.name): the export name \"\(export.name)\" is taken; give another"
                )
            }
            exports.append(export)
        }
    }

    /// Takes an export out; nil when there is none of this name. Clients that use it keep it until they go.
    public func remove(_ name: String) -> Export? {
        exports.withLock { exports in
            guard let index = exports.firstIndex(where: { $0.name == name }) else { return nil }
            return exports.remove(at: index)
        }
    }

    /// All exports in the order they were added.
    public var all: [Export] { exports.withLock { $0 } }

    public func serves(_ export: Export) -> Bool { exports.withLock { $0.contains { $0 === export } } }

    public func exports(for peer: Peer) -> [Export] { all.filter { $0.options.admits(peer) } }

    public func export(named name: String, for peer: Peer) -> Export? {
        let all = exports.withLock { $0 }
        // The empty name means the default export: the one that has it, or the first.
        let found = all.first { $0.name == name } ?? (name.isEmpty ? all.first : nil)
        guard let found, found.options.admits(peer) else { return nil }
        return found
    }
}
