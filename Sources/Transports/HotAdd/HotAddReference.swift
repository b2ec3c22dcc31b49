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
        try allow(["controller", "format", "unprotected"])
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
            return .image(image)
        }
        throw BlockError(
            .invalid,
            "opening \(text): write serial=SERIAL, wwn=NAME or hctl=HOST:CHANNEL:TARGET:UNIT behind the colon "
                + "(diskgate disks shows them), or image=PATH?controller=URI")
    }
}
