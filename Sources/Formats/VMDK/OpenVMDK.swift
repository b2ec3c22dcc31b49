// From a file to the disk that a VMDK is: its descriptor, the files of its extents, and its parents, checked by their
// content ids.
import Block

/// One disk of a chain, opened but not yet a device.
private struct OpenedLink {
    var source: VMDKDescriptorPlace
    var extents: [VMDKExtent]

    var name: String { source.device.info.name }
    var descriptor: VMDKDescriptor { source.descriptor }
}

/// What the links of a chain must not have twice, or too much of.
private struct ChainLimits {
    /// What the sparse files of the chain are so far: the same one twice would be nonsense.
    var sparseFiles: Set<String> = []
    var memory: VMDKMemory
}

/// Opens a VMDK with its extents and its parents.
///
/// - Parameters:
///   - top: the descriptor's file, or a sparse file with a descriptor in it.
///   - mayOpenSiblings: whether it may name other files.
/// - Throws: `.invalid` when it is no VMDK, `.unsupported`, `.denied` for siblings that may not be opened,
///   `.corrupt` also when a parent is not what it was, `.tooLarge` for a chain that is too long or whose metadata take
///   too much memory, what opening throws.
func openVMDK(_ top: ResolvedFile, mayOpenSiblings: Bool, _ options: VMDKOptions) throws(BlockError) -> VMDKDevice {
    var links: [OpenedLink] = []
    var seen: Set<String> = []
    var limits = ChainLimits(memory: VMDKMemory(for: top.device.info.name, options))
    var file = top
    while true {
        let name = file.device.info.name
        guard seen.insert(file.identity).inserted else {
            throw VMDK.corrupt(top.device.info.name, "its chain of parents comes back to \(name)")
        }
        if links.count == VMDKDevice.chainLengthMax {
            throw BlockError(
                .tooLarge,
                "opening \(top.device.info.name): its chain of parents is longer than \(VMDKDevice.chainLengthMax) "
                    + "disks; consolidate the snapshots")
        }
        let opener = VMDKLinkOpener(file: file, mayOpenSiblings: mayOpenSiblings, options: options)
        let link = try opener.open(&limits)
        if let child = links.last { try checkParent(of: child, link) }
        links.append(link)
        guard link.descriptor.parentContentID != nil, let parent = link.descriptor.parentName else { break }
        file = try opener.sibling(parent, "parent")
    }
    var device: VMDKDevice?
    for link in links.reversed() {
        device = VMDKDevice(link.source, link.extents, parent: device)
    }
    guard let device else { throw VMDK.corrupt(top.device.info.name, "there is nothing in it") }
    return device
}

/// Refuses a parent that has been changed since its child was made: together they are no state that the disk ever had.
private func checkParent(of child: OpenedLink, _ parent: OpenedLink) throws(BlockError) {
    let names = (child: child.name, parent: parent.name)
    let wanted = child.descriptor.parentContentID ?? VMDKDescriptor.noParent
    if !parent.descriptor.contentIDs.contains(wanted) {
        throw BlockError(
            .corrupt,
            "opening \(names.child): its parent \(names.parent) has the content id "
                + "\(hexadecimal(parent.descriptor.contentID, 8)), but had \(hexadecimal(wanted, 8)) when "
                + "\(names.child) was made: the parent was changed since, or is another disk, and what both say "
                + "together was never on any disk")
    }
    let sectors = (child: child.descriptor.sectors, parent: parent.descriptor.sectors)
    if sectors.child != sectors.parent {
        throw BlockError(
            .corrupt,
            "opening \(names.child): it has \(sectors.child) sectors, but its parent \(names.parent) has "
                + "\(sectors.parent): one of them was resized since")
    }
}

/// Opens one disk of a chain.
private struct VMDKLinkOpener {
    let file: ResolvedFile
    let mayOpenSiblings: Bool
    let options: VMDKOptions

    private var name: String { file.device.info.name }

    /// Opens it.
    func open(_ limits: inout ChainLimits) throws(BlockError) -> OpenedLink {
        switch try VMDKFileKind.of(file.device) {
        case .descriptor:
            return try openExtents(try VMDKDescriptorPlace(file), &limits)
        case .hostedSparse:
            let layout = try HostedSparseHeader.read(from: file.device)
            guard let range = layout.descriptorRange, try !isEmpty(range) else { throw noDescriptor("one extent") }
            return try openMonolith(try VMDKDescriptorPlace(file, range), layout, &limits)
        case .cow, .seSparse: throw noDescriptor("the changes since a snapshot")
        }
    }

    /// Whether there is room for a descriptor, and none in it: qemu leaves some in every part of a disk.
    private func isEmpty(_ range: Range<UInt64>) throws(BlockError) -> Bool {
        if range.isEmpty { return true }
        let first = Buffer(count: 1)
        try file.device.read(into: first.bytes, at: range.lowerBound)
        return first.readable[0] == 0
    }

    private func noDescriptor(_ what: String) -> BlockError {
        BlockError(
            .invalid,
            "opening \(name) as VMDK: it holds \(what) of a disk, not a disk; open the disk's descriptor, the small "
                + "text file beside it with a similar name")
    }

    /// A sparse file with its descriptor in it. It need not be called as the descriptor has it: files are renamed.
    private func openMonolith(
        _ source: VMDKDescriptorPlace, _ layout: SparseLayout, _ limits: inout ChainLimits
    ) throws(BlockError) -> OpenedLink {
        let descriptor = source.descriptor
        guard descriptor.extents.count == 1, let extent = descriptor.extents.first, extent.kind == .sparse else {
            throw VMDK.unsupported(
                name,
                "its descriptor has \(descriptor.extents.count) extents, where one that is the file itself is known")
        }
        let content = try sparse(file.device, layout, extent, &limits.memory)
        let whole = 0..<(extent.sectors * VMDK.sectorBytes)
        try checkAlone(descriptor)
        return OpenedLink(source: source, extents: [VMDKExtent(whole, content, descriptorFile: file.device)])
    }

    /// Refuses to open other files on the word of bytes that a guest may have written.
    private func checkAlone(_ descriptor: VMDKDescriptor) throws(BlockError) {
        if mayOpenSiblings { return }
        if let parent = descriptor.parentName, descriptor.parentContentID != nil { throw untrusted(parent) }
    }

    private func untrusted(_ other: String) -> BlockError {
        BlockError(
            .denied,
            "opening \(name): it looks like a VMDK that refers to \"\(other)\", but its name does not say so, and a "
                + "guest may have written what it looks like; add format=vmdk if it is one, format=raw if not")
    }

    private func openExtents(_ source: VMDKDescriptorPlace, _ limits: inout ChainLimits) throws(BlockError)
        -> OpenedLink
    {
        let descriptor = source.descriptor
        try checkAlone(descriptor)
        var extents: [VMDKExtent] = []
        var position: UInt64 = 0
        for extent in descriptor.extents {
            let end = position + extent.sectors * VMDK.sectorBytes
            let content = try content(of: extent, descriptor, &limits)
            extents.append(VMDKExtent(position..<end, content, descriptorFile: file.device))
            position = end
        }
        return OpenedLink(source: source, extents: extents)
    }

    private func content(
        of extent: VMDKDescriptor.Extent, _ descriptor: VMDKDescriptor, _ limits: inout ChainLimits
    ) throws(BlockError) -> VMDKExtent.Content {
        if extent.access == .none { return .noAccess }
        if extent.kind == .zero { return .zeros }
        if !mayOpenSiblings { throw untrusted(extent.fileName) }
        switch extent.kind {
        case .zero: return .zeros
        case .flat, .vmfs, .vmfsRaw: return try flat(try sibling(extent.fileName, "extent").device, extent)
        case .vmfsMapping:
            if descriptor.mayBePhysicalMapping && !options.allowsPhysicalMapping {
                throw BlockError(
                    .denied,
                    "opening \(name): it is a raw device mapping in physical mode, or does not say which, and no "
                        + "snapshot of the machine covers its LUN then; where the machine is off or the content may "
                        + "be torn, add physical=yes")
            }
            return try flat(try sibling(extent.fileName, "mapping file", isMapping: true).device, extent)
        case .sparse, .vmfsSparse, .seSparse:
            let sparseFile = try sibling(extent.fileName, "extent")
            guard limits.sparseFiles.insert(sparseFile.identity).inserted else {
                throw VMDK.corrupt(name, "its extent \"\(extent.fileName)\" is one already")
            }
            let device = sparseFile.device
            let layout = try SparseLayout.read(from: device)
            let isSESparse = layout.geometry.entries == .seSparse
            guard isSESparse == (extent.kind == .seSparse) else {
                throw VMDK.corrupt(name, "its extent \"\(extent.fileName)\" is not of the kind \(extent.kind.rawValue)")
            }
            return try sparse(device, layout, extent, &limits.memory)
        }
    }

    private func flat(_ device: any BlockDevice, _ extent: VMDKDescriptor.Extent) throws(BlockError)
        -> VMDKExtent.Content
    {
        let size = device.info.size
        guard VMDK.contains(size, sector: extent.offset, bytes: extent.sectors * VMDK.sectorBytes) else {
            throw VMDK.corrupt(
                name,
                "its extent \"\(extent.fileName)\" has only \(size) bytes, not \(extent.sectors) sectors from sector "
                    + "\(extent.offset) on")
        }
        return .flat(device, offset: extent.offset * VMDK.sectorBytes)
    }

    private func sparse(
        _ device: any BlockDevice, _ layout: SparseLayout, _ extent: VMDKDescriptor.Extent, _ memory: inout VMDKMemory
    ) throws(BlockError) -> VMDKExtent.Content {
        // Headers may round up to whole grains.
        let grain = (layout.geometry.grainMask + 1) / VMDK.sectorBytes
        guard layout.capacity >= extent.sectors, layout.capacity - extent.sectors < grain else {
            throw VMDK.corrupt(
                name,
                "its descriptor has \(extent.sectors) sectors for the extent \"\(extent.fileName)\", whose own header "
                    + "has \(layout.capacity)")
        }
        let size = extent.sectors * VMDK.sectorBytes
        return .sparse(try GrainTables(device, layout, size: size, &memory))
    }

    /// Opens a file that the disk names.
    func sibling(_ other: String, _ role: String, isMapping: Bool = false) throws(BlockError) -> ResolvedFile {
        if other.prefix(while: { $0 != "/" }).contains(":") {
            throw VMDK.unsupported(
                name,
                "its \(role) \"\(other)\" is named by protocol or by a drive of Windows, and images are not allowed to "
                    + "make diskgate connect anywhere; write a file's name into the descriptor")
        }
        guard let resolver = file.resolver else {
            throw VMDK.unsupported(name, "it needs its \(role) \"\(other)\", and files beside it cannot be opened here")
        }
        do throws(BlockError) {
            return isMapping ? try resolver.openMappedDevice(other) : try resolver.open(other)
        } catch { throw error.during("opening the \(role) \"\(other)\" of \(name)") }
    }
}
