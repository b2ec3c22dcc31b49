// What a SCSI disk says of itself: the pages of vital product data that tell disks apart.

/// The pages of SPC-4 (7.8) that say who a disk is, as bytes from sysfs or from the disk.
public enum VitalProductData {
    /// The unit's serial number: 4 bytes of header, then text (page 0x80, SPC-4 7.8.18).
    ///
    /// - Returns: nil where the page is another, or there is no text. Targets pad with blanks on either side.
    public static func serial(_ page: [UInt8]) -> String? {
        guard let body = payload(page, code: 0x80) else { return nil }
        let text = printable(body)
        return text.isEmpty ? nil : text
    }

    /// The names of the logical unit, best first: NAA of 16 bytes, NAA of 8, EUI, name string, T10
    /// (page 0x83, SPC-4 7.8.6).
    ///
    /// - Returns: as the kernel writes them: `naa.` or `eui.` and hexadecimal digits, `t10.` and text. Empty where the
    ///   page is another; what is cut off does not count.
    public static func names(_ page: [UInt8]) -> [String] {
        guard let body = payload(page, code: 0x83) else { return [] }
        var found: [(rank: Int, name: String)] = []
        var rest = body
        while rest.count >= 4 {
            let header = Array(rest.prefix(4))
            let length = Int(header[3])
            guard rest.count >= 4 + length else { break }
            let value = Array(rest.dropFirst(4).prefix(length))
            rest = rest.dropFirst(4 + length)
            // Only names of the unit itself: those of ports and targets are shared by all units behind them.
            if header[1] >> 4 & 3 != 0 { continue }
            if let name = name(type: header[1] & 15, codeSet: header[0] & 15, value) { found.append(name) }
        }
        return found.enumerated().sorted { ($0.element.rank, $0.offset) < ($1.element.rank, $1.offset) }
            .map(\.element.name)
    }

    private static func name(type: UInt8, codeSet: UInt8, _ value: [UInt8]) -> (rank: Int, name: String)? {
        switch (type, codeSet) {
        case (3, 1) where value.count == 16: return (0, "naa.\(hexadecimal(value))")
        case (3, 1) where value.count == 8: return (1, "naa.\(hexadecimal(value))")
        case (2, 1) where [8, 12, 16].contains(value.count): return (2, "eui.\(hexadecimal(value))")
        case (8, 3):
            let text = printable(value[...])
            return text.isEmpty ? nil : (3, text)
        case (1, 1): return value.isEmpty ? nil : (4, "t10.\(hexadecimal(value))")
        case (1, _):
            let text = printable(value[...])
            return text.isEmpty ? nil : (4, "t10.\(text)")
        default: return nil
        }
    }

    /// A field of text (SPC-4 4.4.1), without the blanks around it.
    static func text(_ bytes: ArraySlice<UInt8>) -> String { printable(bytes) }

    /// What follows a page's header, as far as the header says and the bytes go.
    private static func payload(_ page: [UInt8], code: UInt8) -> ArraySlice<UInt8>? {
        guard page.count > 4, page[1] == code else { return nil }
        let length = Int(page[2]) << 8 | Int(page[3])
        return page[4..<min(page.count, 4 + length)]
    }

    /// Text of printable ASCII characters, without the blanks around it.
    private static func printable(_ bytes: ArraySlice<UInt8>) -> String {
        let shown = bytes.prefix { $0 != 0 }.map { (33...126).contains($0) ? $0 : 32 }
        var text = Substring(decoding: shown, as: UTF8.self)
        while text.first == " " { text.removeFirst() }
        while text.last == " " { text.removeLast() }
        return String(text)
    }

    private static func hexadecimal(_ bytes: [UInt8]) -> String {
        let digits = Array("0123456789abcdef")
        return String(bytes.flatMap { [digits[Int($0 >> 4)], digits[Int($0 & 15)]] })
    }
}
