// Who is who on a VMFS datastore: the UUIDs of volumes, LUNs and hosts, and the SCSI identity of a LUN as ESXi has it.
import Block

/// A UUID in the form that ESXi gives to datastores, LUNs and hosts.
public struct VMFSUUID: Sendable, Hashable, CustomStringConvertible {
    /// Bytes on disk.
    static let length = 16

    /// As ESXi prints it, for example "5f0a1b2c-00112233-4455-66778899aabb": two times, a random number, a MAC address.
    public let description: String
    /// Whether it is all zeros, which is nobody's.
    public let isZero: Bool

    /// The UUID at a byte offset, with 16 bytes behind it.
    init(_ bytes: UnsafeRawBufferPointer, at offset: Int) {
        let low: UInt32 = bytes.littleEndian(offset)
        let high: UInt32 = bytes.littleEndian(offset + 4)
        let random: UInt16 = bytes.littleEndian(offset + 8)
        let address = bytes[(offset + 10)..<(offset + 16)]
        isZero = bytes[offset..<(offset + 16)].allSatisfy { $0 == 0 }
        description =
            "\(hexadecimal(low, 8))-\(hexadecimal(high, 8))-\(hexadecimal(random, 4))-"
            + address.map { hexadecimal($0, 2) }.joined()
    }
}

/// A number in hexadecimal with at least so many digits.
func hexadecimal(_ value: some BinaryInteger, _ digits: Int) -> String {
    let text = String(value, radix: 16)
    return String(repeating: "0", count: max(0, digits - text.count)) + text
}

/// The text of a field that ends at its first zero byte. What is not UTF-8 is replaced.
func fieldText(_ bytes: UnsafeRawBufferPointer, _ range: Range<Int>) -> String {
    String(decoding: bytes[range].prefix { $0 != 0 }, as: UTF8.self)
}

/// The identity of a LUN as the host saw it: in the LVM header of the LUN itself, and in a raw device mapping.
public struct VMFSDiskID: Sendable, Equatable {
    /// Bytes on disk.
    static let length = 78

    /// What kind of identifier it is, as on disk.
    public let type: UInt8
    /// The number the LUN had on that host.
    public let lun: UInt16
    /// Vendor as in the SCSI inquiry data, without blanks at its end.
    public let vendor: String
    /// Model as in the SCSI inquiry data, without blanks at its end.
    public let model: String
    /// The identifier from vital product data page 0x83 or 0x80, as bytes: compare it with that of a LUN.
    public let identifier: [UInt8]

    /// An identity as a host would write it.
    public init(identifier: [UInt8], vendor: String, model: String) {
        (type, lun) = (1, 0)
        self.vendor = vendor
        self.model = model
        self.identifier = identifier
    }

    /// The identity at a byte offset, with 78 bytes behind it.
    init(_ bytes: UnsafeRawBufferPointer, at offset: Int) {
        type = bytes[offset]
        lun = bytes.littleEndian(offset + 2)
        vendor = Self.trimmed(bytes, (offset + 6)..<(offset + 14))
        model = Self.trimmed(bytes, (offset + 14)..<(offset + 30))
        let count = min(Int(bytes[offset + 1]), 44)
        identifier = Array(bytes[(offset + 34)..<(offset + 34 + count)])
    }

    private static func trimmed(_ bytes: UnsafeRawBufferPointer, _ range: Range<Int>) -> String {
        var text = Substring(fieldText(bytes, range))
        while text.last == " " { text.removeLast() }
        return String(text)
    }

    /// The identifier for people: as text where it is printable, else in hexadecimal.
    public var text: String {
        if !identifier.isEmpty, identifier.allSatisfy({ $0 >= 0x20 && $0 < 0x7F }) {
            return String(decoding: identifier, as: UTF8.self)
        }
        return identifier.map { hexadecimal($0, 2) }.joined()
    }
}
