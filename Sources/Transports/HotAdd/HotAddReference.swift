// hotadd: sources taken apart: a disk that is there, or what has to be added first.
public import Block
public import LinuxIO

/// What `hotadd:` names.
public enum HotAddReference: Sendable, Equatable {
    /// A disk that somebody has added: `serial=S`, `wwn=W` or `hctl=H:C:T:L`.
    case present(DiskSelector)
    /// What is to be added for as long as it is used: `image=PATH?controller=URI&format=raw`.
    case image(HotAddImage)
}

/// The content of a disk that is to be added to this proxy.
public struct HotAddImage: Sendable, Equatable {
    /// What the hypervisor calls it: for QEMU a path on its machine.
    public var path: String
    /// Its format there.
    public var format: String
    /// The URI of the controller that adds disks to this proxy.
    public var controller: String
    /// Whether to add it although this machine's own programs may act on it.
    public var isUnprotected = false
    /// Whether it is read around the page cache.
    public var isDirect = false

    /// An image.
    public init(path: String, format: String, controller: String) {
        self.path = path
        self.format = format
        self.controller = controller
    }
}

extension SourceReference {
    /// Refuses parameters that mean nothing for an image that is to be added, and formats that were forgotten.
    ///
    /// - Throws: `.invalid`.
    public func checkImage(_ image: HotAddImage) throws(BlockError) {
        try allow(["controller", "direct", "format", "unprotected"])
        let containers = [".qcow2", ".vmdk", ".vdi", ".vhdx", ".qed"]
        if parameter("format") == nil, containers.contains(where: { image.path.hasSuffix($0) }) {
            throw BlockError(
                .invalid,
                "opening \(self): its name says that it is no raw disk; add &format=qcow2, or &format=raw if it is one")
        }
    }

    /// Takes what stands behind `hotadd:` apart.
    ///
    /// - Parameter value: the part behind the equals sign, decoded.
    static func hotAdd(
        _ key: Substring, _ value: String?, _ parameters: [(key: String, value: String)], of text: String
    ) throws(BlockError) -> HotAddReference {
        if let selector = try diskSelector(key, value, of: text) { return .present(selector) }
        if key.lowercased() == "image", let value, !value.isEmpty {
            func parameter(_ key: String) -> String? { parameters.last { $0.key == key }?.value }
            guard let controller = parameter("controller") else {
                throw BlockError(
                    .invalid,
                    "opening \(text): say who adds disks to this machine: ?controller=qmp+tcp:HOST:PORT, the monitor "
                        + "of its own QEMU")
            }
            var image = HotAddImage(path: value, format: parameter("format") ?? "raw", controller: controller)
            image.isUnprotected = try flag("unprotected", parameter("unprotected"), of: text)
            image.isDirect = try flag("direct", parameter("direct"), of: text)
            return .image(image)
        }
        throw BlockError(
            .invalid,
            "opening \(text): write serial=SERIAL, wwn=NAME or hctl=HOST:CHANNEL:TARGET:UNIT behind the colon "
                + "(diskgate disks shows them), or image=PATH?controller=URI")
    }

    /// Opens a hot-added disk, or adds it first.
    ///
    /// - Parameter isDirect: whether it is read and written around the page cache whatever direct= says.
    func openHotAdded(_ reference: HotAddReference, writable: Bool, isDirect: Bool = false) throws(BlockError)
        -> any BlockDevice
    {
        switch reference {
        case .present(let selector):
            try allow(["direct", "timeout", "unprotected"])
            guard let seconds = Double(parameter("timeout") ?? "\(HotAddedDisk.patience)"), (0...3600).contains(seconds)
            else { throw BlockError(.invalid, "opening \(self): give timeout=SECONDS, 0 to 3600") }
            let says = try flag("direct")
            let disk = HotAddedDisk(
                selector: selector, isWritable: writable, isDirect: isDirect || says,
                isUnprotected: try flag("unprotected"))
            return try disk.open(seconds: seconds)
        case .image(let image):
            try checkImage(image)
            let devices = try HotAddedDisk.open([image], isWritable: writable, isDirect: isDirect)
            return devices[0]
        }
    }

    /// Opens a hot-added disk for a copy or restore onto it, which goes around the page cache: the disk leaves again.
    ///
    /// - Throws: `BlockError` of the reason.
    public func openHotAddedTarget() throws(BlockError) -> any BlockDevice {
        guard case .hotAdd(let reference) = kind else {
            throw BlockError(.invalid, "writing to \(self): it is no hot-added disk")
        }
        return try openHotAdded(reference, writable: true, isDirect: true)
    }

    /// Opens several disks. Those that have to be added to this proxy come in one request for each controller, so that
    /// they are there together or not at all.
    ///
    /// - Parameter asTargets: whether for a restore onto them, as `openHotAddedTarget` does.
    /// - Returns: the disks, in the order of their sources.
    /// - Throws: `BlockError` of the first that cannot be opened; nothing stays open then.
    public static func openTogether(_ sources: [SourceReference], asTargets: Bool = false) throws(BlockError)
        -> [any BlockDevice]
    {
        var images: [String: [(index: Int, image: HotAddImage)]] = [:]
        for (index, source) in sources.enumerated() {
            guard case .hotAdd(.image(let image)) = source.kind else { continue }
            try source.checkImage(image)
            images[image.controller, default: []].append((index, image))
        }
        var added: [Int: any BlockDevice] = [:]
        for wanted in images.values {
            let opened = try HotAddedDisk.open(wanted.map(\.image), isWritable: asTargets, isDirect: asTargets)
            for (place, device) in zip(wanted, opened) { added[place.index] = device }
        }
        var devices: [any BlockDevice] = []
        for (index, source) in sources.enumerated() {
            if let device = added[index] {
                devices.append(device)
            } else {
                devices.append(asTargets ? try source.openHotAddedTarget() : try source.open())
            }
        }
        return devices
    }
}
