// Which of a machine's disks take part in a run.
public import Block
public import Hypervisors

/// The disks of a machine that a user wants, by name patterns.
public struct DiskSelection: Sendable {
    /// Only disks that match one of these; all where there are none.
    public var included: [String]
    /// None of these.
    public var excluded: [String]

    /// A selection by patterns: a disk's id or name, with `*` for any characters.
    public init(included: [String] = [], excluded: [String] = []) {
        self.included = included
        self.excluded = excluded
    }

    /// The disks that take part, and for all others why they do not.
    ///
    /// - Throws: `.notFound` when a pattern matches no disk, `.invalid` when no disk is left, `.unsupported` when a
    ///   disk that was asked for by name cannot be backed up.
    public func choose(from machine: VirtualMachine) throws(BlockError) -> (
        disks: [VirtualDisk], leftOut: [(disk: VirtualDisk, reason: String)]
    ) {
        for pattern in included + excluded where !machine.disks.contains(where: { matches(pattern, $0) }) {
            let known = machine.disks.map(\.id).joined(separator: ", ")
            throw BlockError(
                .notFound, "choosing disks of \(machine.name): none is called \(pattern) (it has \(known))")
        }
        var disks: [VirtualDisk] = []
        var leftOut: [(disk: VirtualDisk, reason: String)] = []
        for disk in machine.disks {
            let isAskedFor = included.contains { matches($0, disk) }
            if !wants(disk) {
                let isExcluded = excluded.contains { matches($0, disk) }
                leftOut.append((disk, isExcluded ? "excluded" : "not included"))
            } else if let obstacle = disk.obstacle {
                if isAskedFor {
                    throw BlockError(
                        .unsupported, "backing up the disk \(disk.id) of \(machine.name): \(obstacle); leave it out")
                }
                leftOut.append((disk, obstacle))
            } else {
                disks.append(disk)
            }
        }
        if disks.isEmpty {
            let reasons = leftOut.map { "\($0.disk.id): \($0.reason)" }.joined(separator: "; ")
            throw BlockError(
                .invalid, "choosing disks of \(machine.name): none is left\(reasons.isEmpty ? "" : " (\(reasons))")")
        }
        return (disks, leftOut)
    }

    /// Whether a disk takes part, if it can be backed up.
    func wants(_ disk: VirtualDisk) -> Bool {
        if excluded.contains(where: { matches($0, disk) }) { return false }
        return included.isEmpty || included.contains { matches($0, disk) }
    }

    private func matches(_ pattern: String, _ disk: VirtualDisk) -> Bool {
        Self.matches(Array(pattern.utf8)[...], Array(disk.id.utf8)[...])
            || Self.matches(Array(pattern.utf8)[...], Array(disk.name.utf8)[...])
    }

    /// Whether a text matches a pattern in which `*` stands for any bytes.
    static func matches(_ pattern: ArraySlice<UInt8>, _ text: ArraySlice<UInt8>) -> Bool {
        // Where to go on after the last star when the text does not match as far as tried.
        var (pattern, text) = (pattern, text)
        var retry: (pattern: ArraySlice<UInt8>, text: ArraySlice<UInt8>)?
        while true {
            if pattern.first == UInt8(ascii: "*") {
                pattern = pattern.dropFirst()
                retry = (pattern, text)
            } else if let byte = text.first, pattern.first == byte {
                pattern = pattern.dropFirst()
                text = text.dropFirst()
            } else if text.isEmpty && pattern.isEmpty {
                return true
            } else if let last = retry, !last.text.isEmpty {
                retry = (last.pattern, last.text.dropFirst())
                (pattern, text) = (last.pattern, last.text.dropFirst())
            } else {
                return false
            }
        }
    }
}
