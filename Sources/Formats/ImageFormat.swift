// Which formats there are, and how one is recognised by the first bytes of a file or by its name.
import Block

/// A disk image format, as `format=` names it.
public enum ImageFormat: String, Sendable, CaseIterable {
    /// The disk's bytes as they are.
    case raw
    /// QEMU copy on write, versions 2 and 3 of the header.
    case qcow2
    /// VMware: hosted sparse, stream optimised, ESX sparse, or a text descriptor.
    case vmdk
    /// Microsoft Virtual Hard Disk, version 2.
    case vhdx
    /// Microsoft Virtual Hard Disk (qemu: vpc).
    case vhd
    /// VirtualBox.
    case vdi
    /// QEMU copy on write, version 1.
    case qcow
    /// QEMU enhanced disk.
    case qed
    /// Linux Unified Key Setup: an encrypted disk.
    case luks

    /// Whether disks of this format can be opened.
    public var isSupported: Bool { self == .raw || self == .qcow2 || self == .vmdk }

    /// Bytes at the start of a file that recognition looks at.
    static let magicLength = 512

    /// The format that the first bytes of a file announce, or nil when they announce none. Whoever can write a raw
    /// disk, for example its guest, can make it announce anything.
    ///
    /// - Parameter start: the first 512 bytes of a file, or all of it when it is shorter.
    public static func recognised(by start: UnsafeRawBufferPointer) -> ImageFormat? {
        func begins(_ text: StaticString, at offset: Int = 0) -> Bool {
            let magic = UnsafeRawBufferPointer(start: text.utf8Start, count: text.utf8CodeUnitCount)
            guard start.count >= offset + magic.count else { return false }
            return start[offset..<(offset + magic.count)].elementsEqual(magic)
        }
        if start.count >= 8, start.bigEndian(0, as: UInt32.self) == Qcow2Header.magic {
            return start.bigEndian(4, as: UInt32.self) == 1 ? .qcow : .qcow2
        }
        if VMDKFileKind(start) != nil { return .vmdk }
        if begins("vhdxfile") { return .vhdx }
        if begins("conectix") { return .vhd }
        if begins("QED\0") { return .qed }
        if start.count >= 6, start.bigEndian(0, as: UInt32.self) == 0x4C55_4B53,
            start.bigEndian(4, as: UInt16.self) == 0xBABE
        {
            return .luks
        }
        if start.count >= 68, start.littleEndian(64, as: UInt32.self) == 0xBEDA_107F { return .vdi }
        return nil
    }

    /// The format that the first bytes of a device announce, or nil.
    ///
    /// - Throws: `BlockError` when they cannot be read.
    static func recognised(in device: any BlockDevice) throws(BlockError) -> ImageFormat? {
        let count = Int(min(UInt64(magicLength), device.info.size))
        if count == 0 { return nil }
        let buffer = Buffer(count: count)
        try device.read(into: buffer.bytes, at: 0)
        return recognised(by: buffer.readable)
    }

    /// The format that a file name promises by its ending: qcow2, vmdk, vhd, vhdx, vdi, qcow, qed; or nil.
    ///
    /// A guest does not name the file its disk lies in, so a name can be trusted where bytes cannot. "-flat.vmdk" is
    /// raw, as are the parts "-f001.vmdk" and so on of disks in flat files, ".raw" and ".img".
    static func promised(byName name: String) -> ImageFormat? {
        let lower = name.lowercased()
        for ending in [".raw", ".img", "-flat.vmdk"] where lower.hasSuffix(ending) { return .raw }
        if lower.hasSuffix(".vmdk"), isFlatPart(lower.dropLast(".vmdk".count)) { return .raw }
        guard let dot = lower.lastIndex(of: "."), !lower[dot...].contains("/") else { return nil }
        switch lower[lower.index(after: dot)...] {
        case "qcow2", "qcow2c", "q2": return .qcow2
        case "qcow": return .qcow
        case "vmdk": return .vmdk
        case "vhd", "vpc": return .vhd
        case "vhdx", "avhdx": return .vhdx
        case "vdi": return .vdi
        case "qed": return .qed
        default: return nil
        }
    }

    /// Whether a name without its ending ends in "-f" and digits.
    private static func isFlatPart(_ name: Substring) -> Bool {
        var rest = name
        while let last = rest.last, last.isASCII, last.isNumber { rest.removeLast() }
        return rest.count < name.count && rest.hasSuffix("-f")
    }

    /// The format of a backing file by the name that an image records for it (qemu's driver names), or nil.
    static func named(inImage name: String) -> ImageFormat? {
        switch name {
        case "raw", "file", "host_device": .raw
        case "vpc": .vhd
        default: ImageFormat(rawValue: name)
        }
    }
}
