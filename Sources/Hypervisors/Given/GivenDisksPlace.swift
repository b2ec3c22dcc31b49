// disks: machines taken apart: a name, what the user states about the moment of the disks, and where each of them is.
public import Block
import Transports

/// A machine whose disks the user names, since no hypervisor is asked: `disks:NAME?snapshot=TEXT&disk=ID=SOURCE&...`,
/// with `or=ID=SOURCE` for another way to a disk. Without any `disk=` the disks are those of the machine NAME of an
/// inventory.
struct GivenDisksPlace: Sendable {
    /// What the disks are, by the user's word.
    enum Moment: Sendable, Equatable {
        /// Of a snapshot, for which the guest's file systems were frozen or not.
        case snapshot(String, isQuiesced: Bool)
        /// Of a machine that is off.
        case offline
        /// Written while they are read.
        case inconsistent
    }

    /// The machine's name.
    let name: String
    let moment: Moment
    /// The disks by their ids, in the user's order; none where an inventory has them.
    let disks: [Disk]
    /// The inventory's path; nil for the site's.
    let inventory: String?
    /// Other sources of disks that an inventory has, by the disks' ids.
    let additions: [(id: String, source: SourceReference)]
    /// The transports that may be used, in the order in which they are wanted; nil where nobody has said.
    let transports: TransportOrder?

    /// A disk.
    struct Disk: Sendable {
        let id: String
        /// What it is to people, where it cannot be opened.
        let name: String
        /// Where it is, or what is wrong with what is said of that.
        let specification: Result<DiskSpecification, BlockError>
        /// Bytes, where an inventory says so.
        var capacity: UInt64?
    }

    /// Takes a URI apart.
    ///
    /// - Throws: `.invalid`, which says what is wrong or not stated.
    init(_ uri: MachineURI) throws(BlockError) {
        try uri.allow([
            "snapshot", "quiesced", "offline", "inconsistent", "disk", "or", "inventory", "transports",
        ])
        if uri.body.isEmpty || uri.body.utf8.count > 200 || uri.body.contains("/") {
            throw uri.bad("give the machine a name of 1 to 200 bytes, without slashes")
        }
        name = uri.body
        moment = try Self.moment(uri)
        inventory = uri.parameter("inventory")
        transports = try uri.parameter("transports").map { (text) throws(BlockError) in try TransportOrder(text) }
        let hasDisks = uri.parameters.contains { $0.key == "disk" }
        if hasDisks && inventory != nil {
            throw uri.bad(
                "its disks are those of the inventory: leave out inventory=, or --source; --or adds a source to a disk "
                    + "of the inventory")
        }
        disks = hasDisks ? try Self.disks(uri, transports) : []
        additions = hasDisks ? [] : try Self.pairs(uri).map { ($0.id, $0.source) }
    }

    private static func moment(_ uri: MachineURI) throws(BlockError) -> Moment {
        func isYes(_ key: String) throws(BlockError) -> Bool {
            guard let value = uri.parameter(key) else { return false }
            if value != "yes" { throw uri.bad("\(key)=\(value): give \(key)=yes, or leave it out") }
            return true
        }
        let (isOffline, isInconsistent) = (try isYes("offline"), try isYes("inconsistent"))
        let (snapshot, isQuiesced) = (uri.parameter("snapshot"), try isYes("quiesced"))
        if [isOffline, isInconsistent, snapshot != nil].filter({ $0 }).count != 1 {
            throw uri.bad(
                "say what the disks are: snapshot=NAME of the snapshot that they show, offline=yes for a machine that "
                    + "is off, or inconsistent=yes for disks that are written meanwhile")
        }
        if isQuiesced && snapshot == nil { throw uri.bad("quiesced=yes says how the snapshot was made: name it") }
        if let snapshot { return .snapshot(snapshot, isQuiesced: isQuiesced) }
        return isOffline ? .offline : .inconsistent
    }

    /// What is said of disks, in order.
    private static func pairs(_ uri: MachineURI) throws(BlockError) -> [(
        key: String, id: String, source: SourceReference
    )] {
        var pairs: [(key: String, id: String, source: SourceReference)] = []
        for (key, value) in uri.parameters.filter({ $0.key == "disk" || $0.key == "or" }) {
            let sides = value.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            guard sides.count == 2, !sides[0].isEmpty, !sides[1].isEmpty else {
                throw uri.bad("the disk \(value) is no ID=SOURCE")
            }
            pairs.append((key, String(sides[0]), try SourceReference(String(sides[1]))))
        }
        return pairs
    }

    private static func disks(_ uri: MachineURI, _ transports: TransportOrder?) throws(BlockError) -> [Disk] {
        var disks: [(id: String, specification: DiskSpecification)] = []
        for (key, id, source) in try pairs(uri) {
            let index = disks.firstIndex { $0.id == id }
            if key == "or" {
                guard let index else {
                    throw uri.bad("another source of the disk \(id) comes before its first, or it has none")
                }
                disks[index].specification.alternatives.append(source)
                continue
            }
            if index != nil { throw uri.bad("there are two disks \(id)") }
            var specification = DiskSpecification(source)
            specification.transports = transports
            disks.append((id, specification))
        }
        return disks.map { id, specification in
            Disk(id: id, name: specification.source.description, specification: .success(specification))
        }
    }
}

extension Hypervisors {
    /// The URI of a machine of given disks with more of them.
    ///
    /// - Parameters:
    ///   - sources: ID=SOURCE each.
    ///   - others: ID=SOURCE for other sources of these disks, or of those of an inventory.
    ///   - transports: the transports that may be used, in the order in which they are wanted.
    /// - Throws: `.invalid` where the machine is one that a hypervisor knows.
    public static func machine(
        _ text: String, withDisks sources: [String], or others: [String] = [], transports: String? = nil
    ) throws(BlockError) -> String {
        if sources.isEmpty && others.isEmpty && transports == nil { return text }
        if !text.lowercased().hasPrefix("\(GivenDisks.scheme):") {
            throw BlockError(
                .invalid,
                "opening the machine \(text): its hypervisor knows its disks; --source, --or and --transports are for "
                    + "machines disks:NAME")
        }
        var result = text
        let order = transports.map { [("transports", $0)] } ?? []
        for (key, source) in sources.map({ ("disk", $0) }) + others.map({ ("or", $0) }) + order {
            let escaped = source.utf8.map { byte -> String in
                let isPlain = byte > 32 && byte < 127 && !Array("%&?#".utf8).contains(byte)
                let digits = String(byte, radix: 16)
                return isPlain ? String(UnicodeScalar(byte)) : "%\(digits.count == 1 ? "0" : "")\(digits)"
            }
            result += "\(result.contains("?") ? "&" : "?")\(key)=\(escaped.joined())"
        }
        return result
    }
}
