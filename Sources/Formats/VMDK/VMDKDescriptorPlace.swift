// Where the descriptor of an open disk is, and what it said then: it is looked at again when all has been read.
import Block

/// A descriptor that was read, and can be read once more.
struct VMDKDescriptorPlace: Sendable {
    /// What it is in: a file of its own, or a sparse file.
    let device: any BlockDevice
    /// What it said when the disk was opened.
    let descriptor: VMDKDescriptor
    /// Where it is; nil where it is all of the file, however long that is.
    private let range: Range<UInt64>?
    private let reopen: ResolvedFile.Reopening?

    /// Reads a descriptor.
    ///
    /// - Parameter range: where it is in a sparse file; nil where it is all of the file.
    /// - Throws: as `VMDKDescriptorParser.read`.
    init(_ file: ResolvedFile, _ range: Range<UInt64>? = nil) throws(BlockError) {
        device = file.device
        reopen = file.reopen
        self.range = range
        descriptor = try VMDKDescriptorParser.read(from: device, range ?? 0..<device.info.size)
    }

    /// Compares the descriptor with what it was. A snapshot that is removed goes into the disk below in place: then
    /// nothing but the descriptor tells that this disk was written to. Hosts write descriptors in place, or as new
    /// files that take their names: both are looked at.
    ///
    /// - Throws: `.changed` when it says something else, or nothing that is understood; what reading it throws.
    func confirm() throws(BlockError) {
        try device.confirm()
        try compare(device)
        guard let reopen else { return }
        let named: any BlockDevice
        do throws(BlockError) { named = try reopen() } catch {
            switch error.kind {
            case .notFound: throw changed("there is no file of this name any more")
            case .invalid: throw changed("its name leads to something else now: \(error.message)")
            default: throw error.during("looking at the descriptor of \(device.info.name) again")
            }
        }
        try compare(named)
    }

    private func compare(_ file: any BlockDevice) throws(BlockError) {
        let now: VMDKDescriptor
        do throws(BlockError) {
            now = try VMDKDescriptorParser.read(from: file, range ?? 0..<file.info.size)
        } catch {
            switch error.kind {
            case .corrupt, .invalid, .unsupported, .outOfRange: throw changed("it is none any more: \(error)")
            default: throw error.during("looking at the descriptor of \(device.info.name) again")
            }
        }
        if let difference = descriptor.difference(from: now) { throw changed(difference) }
    }

    private func changed(_ what: String) -> BlockError {
        BlockError(
            .changed,
            "looking whether the descriptor of \(device.info.name) is what was opened: \(what); the disk was written "
                + "to, or a snapshot was removed, and what was read may be of no one moment: read it again, below a "
                + "snapshot that stays until the end")
    }
}

extension VMDKDescriptor {
    /// How a later look at the same descriptor differs in what counts: nil where the disk has the same content in the
    /// same places. Hosts may write to the disk database meanwhile.
    fileprivate func difference(from now: VMDKDescriptor) -> String? {
        func text(_ ids: [UInt32]) -> String { ids.map { hexadecimal($0, 8) }.joined(separator: " ") }
        if contentIDs != now.contentIDs {
            return "its content id was \(text(contentIDs)) and is \(text(now.contentIDs)) now"
        }
        if parentContentID != now.parentContentID {
            let ids = [parentContentID, now.parentContentID].map { hexadecimal($0 ?? Self.noParent, 8) }
            return "the content id of its parent was \(ids[0]) and is \(ids[1]) now"
        }
        if parentName != now.parentName {
            return "its parent was \"\(parentName ?? "")\" and is \"\(now.parentName ?? "")\" now"
        }
        return extents == now.extents ? nil : "its extents are others now"
    }
}
