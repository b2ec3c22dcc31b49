// disks: machines taken apart: a name, what the user states about the moment of the disks, and where each of them is.
public import Block
import Transports

/// A machine whose disks the user names, since no hypervisor is asked: `disks:NAME?snapshot=TEXT&disk=ID=SOURCE&...`,
/// with `or=ID=SOURCE` for another way to a disk.
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
    /// The disks by their ids, in the user's order.
    let disks: [Disk]

    /// A disk, with its sources in the order in which they are to be tried.
    struct Disk: Sendable {
        let id: String
        let source: SourceReference
        var others: [SourceReference] = []
    }

    /// Takes a URI apart.
    ///
    /// - Throws: `.invalid`, which says what is wrong or not stated.
    init(_ uri: MachineURI) throws(BlockError) {
        try uri.allow(["snapshot", "quiesced", "offline", "inconsistent", "disk", "or"])
        if uri.body.isEmpty || uri.body.utf8.count > 200 || uri.body.contains("/") {
            throw uri.bad("give the machine a name of 1 to 200 bytes, without slashes")
        }
        name = uri.body
        moment = try Self.moment(uri)
        disks = try Self.disks(uri)
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

    private static func disks(_ uri: MachineURI) throws(BlockError) -> [Disk] {
        var disks: [Disk] = []
        for (key, value) in uri.parameters.filter({ $0.key == "disk" || $0.key == "or" }) {
            let sides = value.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            guard sides.count == 2, !sides[0].isEmpty, !sides[1].isEmpty else {
                throw uri.bad("the disk \(value) is no ID=SOURCE")
            }
            let id = String(sides[0])
            let source = try SourceReference(String(sides[1]))
            if key == "or" {
                guard let index = disks.firstIndex(where: { $0.id == id }) else {
                    throw uri.bad("another source of the disk \(id) comes before its first, or it has none")
                }
                disks[index].others.append(source)
                continue
            }
            if disks.contains(where: { $0.id == id }) { throw uri.bad("there are two disks \(id)") }
            disks.append(Disk(id: id, source: source))
        }
        if disks.isEmpty { throw uri.bad("it has no disks: give --source ID=SOURCE for each") }
        return disks
    }
}

extension Hypervisors {
    /// The URI of a machine of given disks with more of them.
    ///
    /// - Parameters:
    ///   - sources: ID=SOURCE each.
    ///   - others: ID=SOURCE for other sources of these disks.
    /// - Throws: `.invalid` where the machine is one that a hypervisor knows.
    public static func machine(_ text: String, withDisks sources: [String], or others: [String] = [])
        throws(BlockError) -> String
    {
        if sources.isEmpty && others.isEmpty { return text }
        if !text.lowercased().hasPrefix("\(GivenDisks.scheme):") {
            throw BlockError(
                .invalid,
                "opening the machine \(text): its hypervisor knows its disks; --source is for machines disks:NAME")
        }
        var result = text
        for (key, source) in sources.map({ ("disk", $0) }) + others.map({ ("or", $0) }) {
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
