// Which LUNs belong together, in which order, and which of them are not there.
public import Block

/// The LUNs of one volume, as far as they were found.
public struct VMFSMemberSet: Sendable {
    /// The LUNs in the order of the volume.
    public let members: [VMFSMember]
    /// The LUNs that are not there, by the names that ESXi has for them, or else by their place.
    public let missing: [String]
    /// Why the volume cannot be opened; nil when it can.
    public let problem: BlockError?

    /// Sorts LUNs by the volumes they are part of. Copies of a volume with another signature are volumes of their own.
    ///
    /// - Parameter members: the LUNs in any order.
    public static func grouped(_ members: [VMFSMember]) -> [VMFSMemberSet] {
        var sets: [VMFSMemberSet] = []
        var grouped: [String: [VMFSMember]] = [:]
        var order: [String] = []
        for member in members {
            if member.lvmVersion == 0 {
                sets.append(VMFSMemberSet([member]))
                continue
            }
            let key = "\(member.volumeUUID)/\(member.snapshotID)"
            if grouped[key] == nil { order.append(key) }
            grouped[key, default: []].append(member)
        }
        return sets + order.compactMap { grouped[$0].map { VMFSMemberSet($0) } }
    }

    private init(_ unsorted: [VMFSMember]) {
        let members = unsorted.sorted { $0.firstExtent < $1.firstExtent }
        self.members = members
        let count = members.map(\.deviceCount).max() ?? 1
        let name = "the volume \(members.first?.volumeUUID.description ?? "")"
        for (left, right) in zip(members, members.dropFirst()) where right.firstExtent <= left.lastExtent {
            let what =
                left.deviceUUID == right.deviceUUID
                ? "two ways to one LUN, or one is a copy of the other" : "they contradict each other"
            missing = []
            problem = BlockError(
                .invalid,
                "opening \(name): \(left.device.info.name) and \(right.device.info.name) are the same part of it "
                    + "(\(what)); name only one of them")
            return
        }
        missing = Self.missing(members, count)
        if members.contains(where: { $0.deviceCount != count }) {
            problem = BlockError(.corrupt, "opening \(name): its LUNs do not agree on how many they are")
        } else if members.count > count {
            problem = BlockError(
                .corrupt, "opening \(name): it has \(count) LUNs, but \(members.count) claim to be one")
        } else if !missing.isEmpty {
            problem = BlockError(
                .notFound,
                "opening \(name): \(count - members.count) of its \(count) LUNs are missing: "
                    + "\(missing.joined(separator: ", ")); name all of its LUNs")
        } else {
            problem = nil
        }
    }

    /// The names of the LUNs that are not there.
    private static func missing(_ members: [VMFSMember], _ count: Int) -> [String] {
        guard members.count < count else { return [] }
        let names = members.first?.deviceNames ?? []
        func name(_ index: Int) -> String {
            names.indices.contains(index) && !names[index].isEmpty ? names[index] : "LUN \(index + 1) of \(count)"
        }
        // A gap is one LUN, unless more are missing than there are gaps: then nobody can tell where the others were.
        var absent: [Int] = []
        var present = 0
        var next: UInt64 = 0
        for member in members {
            if member.firstExtent > next { absent.append(absent.count + present) }
            present += 1
            next = member.lastExtent == .max ? .max : member.lastExtent + 1
        }
        while absent.count < count - members.count { absent.append(absent.count + present) }
        return absent.map(name)
    }

    /// Opens the volume.
    ///
    /// - Throws: `problem`, or what `VMFSVolume.init` throws.
    public func open(_ options: VMFSOptions = VMFSOptions()) throws(BlockError) -> VMFSVolume {
        if let problem { throw problem }
        return try VMFSVolume(self, options)
    }
}
