// The exports of a server: where the control plane puts disks and the data plane finds them.
public import Block
public import NBD

/// The exports of a server by name. Changes while clients are served.
public final class ExportRegistry: ExportDirectory {
    private let exports = Locked<[Export]>([])

    /// Who may list the exports that it may use; nil for everybody.
    private let listRules: [AllowRule]?

    /// No exports.
    ///
    /// - Parameter listRules: who may list the exports that it may use; nil for everybody.
    public init(listRules: [AllowRule]? = nil) { self.listRules = listRules }

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

    /// Takes all exports out, so that their disks are closed once nobody uses them any more.
    public func removeAll() {
        let removed = exports.withLock { exports in
            defer { exports = [] }
            return exports
        }
        withExtendedLifetime(removed) {}
    }

    /// All exports in the order they were added.
    public var all: [Export] { exports.withLock { $0 } }

    public func serves(_ export: Export) -> Bool { exports.withLock { $0.contains { $0 === export } } }

    public func exports(for client: Credentials) -> [Export] { all.filter { $0.admission(of: client) != .refused } }

    public func mayList(_ client: Credentials) -> Bool { listRules?.contains { $0.admits(client, to: "") } ?? true }

    public func export(named name: String, for client: Credentials) -> Export? {
        let all = exports.withLock { $0 }
        // The empty name means the default export: the one that has it, or the first.
        let found = all.first { $0.name == name } ?? (name.isEmpty ? all.first : nil)
        guard let found, found.admission(of: client) != .refused else { return nil }
        return found
    }
}
