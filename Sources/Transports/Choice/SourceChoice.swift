// Several sources of one disk: opened one after the other, in the order of preference, until one can be read.
public import Block
import LinuxIO
import NBD

extension DiskSpecification {
    /// All sources of the disk, in the order in which they were given.
    public var sources: [SourceReference] { [source] + alternatives }

    /// A disk that was opened, and which of its sources it came from.
    public struct Chosen<Opened> {
        /// What was opened.
        public let opened: Opened
        /// The disk with the one source that was taken.
        public let disk: DiskSpecification
        /// Which one it is, and why not those before it.
        public let choice: TransportChoice
    }

    /// Opens the first source that can be opened and read from.
    ///
    /// Where there is but one source, whatever is wrong with it is thrown as it is, and it is not read from.
    ///
    /// - Parameters:
    ///   - open: opens the disk with one of its sources.
    ///   - device: the disk in what was opened.
    /// - Throws: `.notFound` with the reasons of all of them.
    public func openFirst<Opened>(
        _ open: (DiskSpecification) throws(BlockError) -> Opened, device: (Opened) -> any BlockDevice
    ) throws(BlockError) -> Chosen<Opened> {
        var (candidates, sources) = try orderedSources()
        if candidates.count == 1, let source = sources[0] {
            return Chosen(
                opened: try open(try inSession(source)), disk: with(source),
                choice: TransportChoice(
                    disk: title, position: 1, candidates: candidates))
        }
        var (unproven, failed): (String?, String?)
        var size: (bytes: UInt64, name: String)?
        for (index, source) in sources.enumerated() {
            guard let source else { continue }
            let name = candidates[index].name
            if let unproven, source.transport == .nbd {
                candidates[index].findings.append(
                    Finding(
                        "nbd.clear-text", .excluded,
                        "not tried: \(unproven) could not prove who it is, and whoever is between would be read in "
                            + "clear text"))
                continue
            }
            // Whoever is between can make TLS fail in any way he likes.
            if let failed, source.crossesNetworkInClear, transports == nil {
                candidates[index].findings.append(
                    Finding(
                        "nbd.clear-text", .excluded,
                        "not tried: \(failed) could not be reached with TLS, and whoever is between may have seen to "
                            + "that; --transports with nbd in its order takes clear text all the same"))
                continue
            }
            var hasSession = false
            do throws(BlockError) {
                let disk = try inSession(source)
                hasSession = true
                let opened = try open(disk)
                let found = device(opened)
                if let size, size.bytes != found.info.size {
                    throw BlockError(
                        .invalid,
                        "opening \(source): it has \(found.info.size) bytes, and \(size.name) has \(size.bytes): they "
                            + "are not the same disk")
                }
                size = size ?? (found.info.size, name)
                try found.readEnds()
                candidates[index].findings.append(Finding("\(name).tried", .ok, "it was opened and read from"))
                return Chosen(
                    opened: opened, disk: with(source),
                    choice: TransportChoice(disk: title, position: index + 1, candidates: candidates))
            } catch {
                // Whoever stops the process does not want the next source.
                try SiteSessions.checkEnding("opening \(title)")
                // That others have all sessions says nothing about the server.
                if source.transport == .nbdssl && hasSession {
                    failed = failed ?? source.description
                    if error.kind == .denied { unproven = unproven ?? source.description }
                }
                candidates[index].findings.append(Finding("\(name).tried", .excluded, error.message))
            }
        }
        throw TransportChoice(disk: title, position: nil, candidates: candidates).failure
    }

    /// The sources that the orders and rules have left, in the order in which they are tried.
    ///
    /// - Throws: `.notFound` with the reasons where none is left.
    public func sourcesLeft() throws(BlockError) -> [SourceReference] {
        try orderedSources().1.compactMap(\.self)
    }

    /// How people call the disk.
    private var title: String { site?.title ?? source.description }

    /// All sources in the order in which they are to be tried; those that are not to be tried have none, and come last.
    private func orderedSources() throws(BlockError) -> ([TransportCandidate], [SourceReference?]) {
        var wanted: [(rank: Int, place: Int, source: SourceReference)] = []
        var left: [TransportCandidate] = []
        for (place, source) in sources.enumerated() {
            let candidate = TransportCandidate(source.transport, source: source.description)
            if let transports, let kind = source.transport, !transports.kinds.contains(kind) {
                left.append(candidate.refused("order", "it is not among the transports asked for (\(transports))"))
                continue
            }
            if !alternatives.isEmpty && !fingerprints.isEmpty && source.transport == .nbd {
                left.append(
                    candidate.refused("clear-text", "a certificate was asked for, and there is none without TLS"))
                continue
            }
            let rank = source.transport.flatMap { transports?.kinds.firstIndex(of: $0) } ?? (transports == nil ? 0 : 99)
            wanted.append((rank, place, source))
        }
        wanted.sort { ($0.rank, $0.place) < ($1.rank, $1.place) }
        let ordered = wanted.map { candidate($0.source) }
        let tried = zip(ordered, wanted).map { $0.verdict == .excluded ? nil : $1.source }
        if tried.allSatisfy({ $0 == nil }) {
            throw TransportChoice(disk: title, position: nil, candidates: ordered + left).failure
        }
        return (ordered + left, tried + left.map { _ in nil })
    }

    /// A source, with what the rules say of its transport.
    private func candidate(_ source: SourceReference) -> TransportCandidate {
        let known = source.transport.flatMap { site?.findings[$0] } ?? []
        // Rules of a transport that say nothing of this way to it.
        let findings = known.filter { finding in
            switch finding.rule {
            case "nbd.clear-text": source.crossesNetworkInClear
            case "san.luns": !source.isOverISCSI
            default: true
            }
        }
        return TransportCandidate(source.transport, source: source.description, findings: findings)
    }

    /// The disk with one source only, in a session where that takes one.
    private func inSession(_ source: SourceReference) throws(BlockError) -> DiskSpecification {
        var disk = with(source)
        disk.session = try disk.takeSession()
        return disk
    }

    /// The disk with one source only. Certificates are for those that have some.
    private func with(_ source: SourceReference) -> DiskSpecification {
        var disk = self
        disk.source = source
        disk.alternatives = []
        disk.transports = nil
        disk.site?.findings = [:]
        if !alternatives.isEmpty && source.transport != .nbdssl { disk.fingerprints = [] }
        return disk
    }
}

extension TransportCandidate {
    /// The candidate with why it is not to be tried.
    fileprivate func refused(_ rule: String, _ reason: String) -> TransportCandidate {
        var refused = self
        refused.findings.append(Finding("\(name).\(rule)", .excluded, reason))
        return refused
    }
}

extension SourceReference {
    /// Whether its LUNs are reached by libiscsi, and not by the kernel.
    fileprivate var isOverISCSI: Bool {
        switch kind {
        case .iscsi: true
        case .san: parameters.contains { $0.key == "lun" && $0.value.hasPrefix("iscsi:") }
        default: false
        }
    }

    /// Whether its bytes come over a network without TLS.
    var crossesNetworkInClear: Bool {
        guard case .nbd(let uri) = kind, uri.tls == nil else { return false }
        if case .tcp = uri.address { return true }
        return false
    }
}

extension BlockDevice {
    /// Reads the first and the last 4 KiB: a disk that can be opened may still be one that cannot be read.
    ///
    /// - Throws: what reading throws.
    public func readEnds() throws(BlockError) {
        if info.size == 0 { return }
        let buffer = Buffer(count: Int(min(info.size, 4096)))
        try read(into: buffer.bytes, at: 0)
        if info.size > 4096 { try read(into: buffer.bytes, at: info.size - 4096) }
    }
}
