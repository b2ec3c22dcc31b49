// An inventory read from its JSON document, checked for what would make its names mean two things.
public import Block
import FoundationEssentials
import LinuxIO

extension Inventory {
    /// The largest document, in bytes: some ten thousand machines.
    private static let sizeMax = 64 << 20

    /// Reads the inventory in a file.
    ///
    /// - Throws: `.corrupt` for what is no inventory, with the place in it; or what reading the file throws.
    public static func read(_ path: String) throws(BlockError) -> Inventory {
        try Inventory(json: try readSmallFile(path, limit: sizeMax), from: path)
    }

    /// Takes an inventory apart. Fields that are not known are passed over.
    ///
    /// - Parameter name: where it comes from.
    /// - Throws: `.corrupt` for what is no inventory, with the place in it.
    public init(json: [UInt8], from name: String) throws(BlockError) {
        do { self = try JSONDecoder().decode(Inventory.self, from: Data(json)) } catch let error as DecodingError {
            throw BlockError(.corrupt, "reading the inventory \(name): \(explained(error))")
        } catch { throw BlockError(.corrupt, "reading the inventory \(name): \(error)") }
        for (kind, names) in [
            ("hosts", hosts.map(\.name)), ("datastores", datastores.map(\.name)), ("machines", machines.map(\.id)),
        ] {
            var seen: Set<String> = []
            if let twice = names.first(where: { !seen.insert($0).inserted }) {
                throw BlockError(.corrupt, "reading the inventory \(name): there are two \(kind) called \(twice)")
            }
        }
        var owners: [String: String] = [:]
        for host in hosts {
            for address in host.places {
                if let other = owners.updateValue(host.name, forKey: address), other != host.name {
                    throw BlockError(
                        .corrupt,
                        "reading the inventory \(name): the hosts \(other) and \(host.name) are both at \(address)")
                }
            }
        }
    }

    /// The machine of an id or name.
    ///
    /// - Throws: `.notFound`, or `.invalid` when several have the name.
    public func machine(named name: String) throws(BlockError) -> Machine {
        if let machine = machines.first(where: { $0.id == name }) { return machine }
        let named = machines.filter { $0.name == name }
        guard let machine = named.first else {
            throw BlockError(.notFound, "looking for the machine \(name): the inventory has none of this id or name")
        }
        if named.count > 1 {
            let ids = named.map(\.id).joined(separator: ", ")
            throw BlockError(
                .invalid, "looking for the machine \(name): \(named.count) are called so; name its id: \(ids)")
        }
        return machine
    }

    /// Fills in what this machine itself can tell, where the inventory asks for that and says nothing itself.
    public mutating func discover(_ facts: MachineFacts) {
        guard var proxy, proxy.discover == true else { return }
        proxy.luns = proxy.luns ?? facts.luns.flatMap(\.names)
        // A warning says that it could not be found out.
        let isProtected = facts.protection.flatMap { $0.verdict == .warning ? nil : $0.verdict == .ok }
        proxy.isProtected = proxy.isProtected ?? isProtected
        proxy.libraries = proxy.libraries ?? facts.libraries
        self.proxy = proxy
    }
}

/// What is wrong with a JSON document, and where.
public func explained(_ error: DecodingError) -> String {
    func place(_ context: DecodingError.Context) -> String {
        let path = context.codingPath.map { $0.intValue.map { "[\($0)]" } ?? $0.stringValue }.joined(separator: ".")
        return path.isEmpty ? "" : " at \(path)"
    }
    switch error {
    case .keyNotFound(let key, let context): return "\(key.stringValue) is missing\(place(context))"
    case .typeMismatch(_, let context), .valueNotFound(_, let context), .dataCorrupted(let context):
        // The decoder says the same of text that is no JSON and of figures that do not fit, and not where.
        let isVague = context.codingPath.isEmpty && context.debugDescription.contains("not valid JSON")
        let doubt = isVague ? " Or one of its figures is negative, too large, or no whole number." : ""
        return "\(context.debugDescription)\(place(context))\(doubt)"
    @unknown default: return "\(error)"
    }
}
