// From an open file to a disk: decides on the format, then opens the image with all the files that belong to it.
public import Block

/// What is known about a file's format before it is looked at.
public enum FormatHint: Sendable {
    /// The user says so (format=).
    case explicit(ImageFormat)
    /// Nobody says: the name and, where a guest cannot have a say in it, the first bytes decide.
    ///
    /// - name: the file's name or path.
    /// - isNodeOrRemote: whether it is a block node or a remote disk, which are always raw.
    case guess(name: String, isNodeOrRemote: Bool)
}

/// A format that was decided on, and whether the decision can be trusted so far as to open other files.
struct FormatDecision {
    var format: ImageFormat
    var mayOpenSiblings: Bool
}

/// Decides on the format of a device.
///
/// - Throws: `.unsupported` when the format is known but cannot be opened, `.invalid` when name and bytes do not agree,
///   or what reading the first bytes throws.
func decideFormat(_ device: any BlockDevice, _ hint: FormatHint) throws(BlockError) -> FormatDecision {
    let file = device.info.name
    let decided: FormatDecision
    switch hint {
    case .explicit(let format): decided = FormatDecision(format: format, mayOpenSiblings: true)
    case .guess(_, isNodeOrRemote: true): return FormatDecision(format: .raw, mayOpenSiblings: false)
    case .guess(let name, isNodeOrRemote: false):
        let promised = ImageFormat.promised(byName: name)
        if promised == .raw { return FormatDecision(format: .raw, mayOpenSiblings: false) }
        let found = try ImageFormat.recognised(in: device)
        if let promised, found != promised {
            let what = found.map { "it begins like \($0.rawValue)" } ?? "it does not begin like one"
            throw BlockError(
                .invalid,
                "opening \(file): its name says \(promised.rawValue), but \(what); add format=raw to serve its bytes "
                    + "as they are, or name the right format")
        }
        decided = FormatDecision(format: found ?? .raw, mayOpenSiblings: promised != nil)
    }
    if !decided.format.isSupported {
        throw BlockError(
            .unsupported,
            "opening \(file): the format \(decided.format.rawValue) is not supported yet; convert a copy with "
                + "qemu-img, or add format=raw to serve its bytes as they are")
    }
    return decided
}

/// Opens a disk: the file itself when it is raw, else the image in it with its backing chain and data files.
///
/// - Parameters:
///   - file: the file, its identity, and what opens the files it names.
///   - hint: what is known about its format.
///   - options: how qcow2 images are opened.
///   - vmdk: how VMDKs are opened.
/// - Throws: `BlockError` when the format is unknown, unsupported or contradicts the file's name, when the image is
///   corrupt, when it names files and its format was recognised by its first bytes alone, or when one of these files
///   cannot be opened.
public func openDisk(
    _ file: ResolvedFile, _ hint: FormatHint, _ options: Qcow2Options = Qcow2Options(),
    vmdk: VMDKOptions = VMDKOptions()
) throws(BlockError) -> any BlockDevice {
    let decision = try decideFormat(file.device, hint)
    if decision.format == .raw { return file.device }
    if decision.format == .vmdk { return try openVMDK(file, mayOpenSiblings: decision.mayOpenSiblings, vmdk) }
    let chain = try openChain(file, mayOpenSiblings: decision.mayOpenSiblings, options)
    var device = chain.base
    for layer in chain.layers.reversed() {
        device = try Qcow2Device(
            lower: layer.file.device, header: layer.header, backing: device, dataFile: layer.dataFile, options)
    }
    guard let device else { throw BlockError(.invalid, "opening \(file.device.info.name): there is nothing in it") }
    return device
}

/// One image of a backing chain, opened but not yet a device.
private struct OpenedImage {
    var file: ResolvedFile
    var header: Qcow2Header
    var dataFile: (any BlockDevice)?
}

/// Follows the names of backing files from the top down to an image without one, or to a raw disk.
private func openChain(_ top: ResolvedFile, mayOpenSiblings: Bool, _ options: Qcow2Options) throws(BlockError)
    -> (layers: [OpenedImage], base: (any BlockDevice)?)
{
    var layers: [OpenedImage] = []
    var seen: Set<String> = []
    var file = top
    while true {
        let name = file.device.info.name
        guard seen.insert(file.identity).inserted else {
            throw BlockError(.corrupt, "opening \(top.device.info.name): its backing chain comes back to \(name)")
        }
        if layers.count == Qcow2Device.chainLengthMax {
            throw BlockError(
                .tooLarge,
                "opening \(top.device.info.name): its backing chain is longer than \(Qcow2Device.chainLengthMax) "
                    + "images; shorten it with qemu-img commit or rebase")
        }
        let header = try Qcow2Header.read(from: file.device, allowCorrupt: options.allowCorrupt)
        if !mayOpenSiblings, let other = header.hasDataFile ? header.dataFileName : header.backingName {
            throw BlockError(
                .denied,
                "opening \(name): it looks like a qcow2 image that refers to \"\(other)\", but its name does not say "
                    + "so, and a guest may have written what it looks like; add format=qcow2 if it is one, "
                    + "format=raw if not")
        }
        let dataFile: (any BlockDevice)? =
            if header.hasDataFile { try sibling(header.dataFileName ?? "", "data file", of: file).device } else { nil }
        layers.append(OpenedImage(file: file, header: header, dataFile: dataFile))
        guard let backing = header.backingName else { return (layers, nil) }
        let next = try sibling(backing, "backing file", of: file)
        switch try backingFormat(header, next, of: name) {
        case .raw: return (layers, next.device)
        case .vmdk: return (layers, try openVMDK(next, mayOpenSiblings: true, VMDKOptions()))
        default: file = next
        }
    }
}

private func sibling(_ name: String, _ role: String, of file: ResolvedFile) throws(BlockError) -> ResolvedFile {
    let image = file.device.info.name
    try checkSiblingName(name, role, of: image)
    guard let resolver = file.resolver else {
        throw BlockError(
            .unsupported,
            "opening \(image): it needs its \(role) \"\(name)\", and files beside it cannot be opened here")
    }
    do throws(BlockError) {
        return try resolver.open(name)
    } catch { throw error.during("opening the \(role) \"\(name)\" of \(image)") }
}

/// The format of a backing file: what the image records, or raw where nothing is recorded and nothing else is possible.
private func backingFormat(_ header: Qcow2Header, _ file: ResolvedFile, of image: String) throws(BlockError)
    -> ImageFormat
{
    if let name = header.backingFormat, !name.isEmpty {
        guard let format = ImageFormat.named(inImage: name), format.isSupported else {
            throw BlockError(
                .unsupported, "opening \(image): its backing file is recorded to be \(name), which is not supported yet"
            )
        }
        return format
    }
    guard let found = try ImageFormat.recognised(in: file.device) else { return .raw }
    throw BlockError(
        .denied,
        "opening \(image): it does not record the format of its backing file, which looks like \(found.rawValue), but "
            + "a guest may have written what it looks like; record it with qemu-img rebase -u -b "
            + "\(header.backingName ?? "FILE") -F FORMAT")
}
