// How a block node is known on this machine: what sysfs says of its vendor, serial, WWN and address.
public import Block
import CLinux
import Glibc

/// Facts from /sys/dev/block about one node; empty where sysfs does not know it.
struct NodeIdentity {
    /// Key and value in the order to print them.
    private(set) var facts: [(key: String, value: String)] = []
    private(set) var isRotational = false

    /// Reads the facts of the node with a device number.
    init(_ number: dev_t) {
        let folder = "/sys/dev/block/\(dg_device_major(UInt64(number))):\(dg_device_minor(UInt64(number)))"
        // A partition's facts are those of its disk, one folder up.
        let disk = readText("\(folder)/partition") == nil ? folder : "\(folder)/.."
        for (key, file) in [
            ("vendor", "device/vendor"), ("model", "device/model"), ("wwn", "device/wwid"), ("wwn", "wwid"),
            ("serial", "serial"), ("serial", "device/serial"),
        ] {
            if facts.contains(where: { $0.key == key }) { continue }
            if let value = readText("\(disk)/\(file)"), !value.isEmpty { facts.append((key, value)) }
        }
        if !facts.contains(where: { $0.key == "serial" }), let serial = unitSerial("\(disk)/device/vpd_pg80") {
            facts.append(("serial", serial))
        }
        if let address = linkTarget("\(disk)/device"), address.split(separator: ":").count == 4 {
            facts.append(("hctl", address))
        }
        isRotational = readText("\(disk)/queue/rotational") == "1"
    }

    /// The serial of a SCSI "Unit Serial Number" page: 4 bytes of header, then text (SPC-4, 7.8.18).
    private func unitSerial(_ path: String) -> String? {
        guard let page = try? readSmallFile(path), page.count > 4 else { return nil }
        let text = String(decoding: page[4...], as: UTF8.self).filter { !$0.isWhitespace && $0 != "\0" }
        return text.isEmpty ? nil : text
    }

    private func linkTarget(_ path: String) -> String? {
        guard let real = realpath(path, nil) else { return nil }
        defer { free(real) }
        return String(cString: real).split(separator: "/").last.map(String.init)
    }
}

/// A small text file without the white space around it, nil when it cannot be read.
func readText(_ path: String) -> String? {
    guard let bytes = try? readSmallFile(path) else { return nil }
    var text = Substring(decoding: bytes, as: UTF8.self)
    while let last = text.last, last.isWhitespace || last == "\0" { text.removeLast() }
    while let first = text.first, first.isWhitespace { text.removeFirst() }
    return String(text)
}

/// The content of a small file.
///
/// - Parameter limit: the most bytes it may have.
/// - Throws: `.tooLarge` when it has more, or `BlockError` of the system's reason.
public func readSmallFile(_ path: String, limit: Int = 65536) throws(BlockError) -> [UInt8] {
    let file = try Descriptor.open(path, O_RDONLY)
    var content: [UInt8] = []
    var piece = [UInt8](repeating: 0, count: min(limit + 1, 65536))
    while true {
        let got = piece.withUnsafeMutableBytes { read(file.number, $0.baseAddress, $0.count) }
        if got < 0 && errno == EINTR { continue }
        if got < 0 { throw BlockError(errno: errno, "reading \(path)") }
        if got == 0 { return content }
        content += piece[..<got]
        if content.count > limit { throw BlockError(.tooLarge, "reading \(path): it has more than \(limit) bytes") }
    }
}
