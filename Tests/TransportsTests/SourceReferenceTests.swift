// The source grammar: what users write, and what must not be taken for something else.
import Block
import LinuxIO
import Support
import Testing
import Transports

@Suite struct SourceReferenceTests {
    @Test(
        arguments: [
            ("disk.img", .path("disk.img")), ("/dev/sdb", .path("/dev/sdb")), ("./a:b", .path("./a:b")),
            ("/dev/disk/by-path/pci-0000:00:1f.2", .path("/dev/disk/by-path/pci-0000:00:1f.2")),
            ("disk?.img", .path("disk?.img")), ("a%20b", .path("a%20b")), ("1:x", .path("1:x")),
            ("é:x", .path("é:x")), ("file:disk.img", .path("disk.img")), ("file:///p/d", .path("/p/d")),
            ("file://localhost/p/d", .path("/p/d")), ("FILE:///p/d", .path("/p/d")),
            ("file:///a%20b%3Fc", .path("/a b?c")), ("file:///a%C3%A9", .path("/aé")),
            ("file:///d?format=raw&direct=true", .path("/d")), ("pattern:1G", .pattern(size: 1 << 30)),
            ("pattern:4k?seed=7&allocated=30%", .pattern(size: 4096)), ("memory:512", .memory(size: 512)),
        ] as [(String, SourceReference.Kind)])
    func parses(text: String, kind: SourceReference.Kind) throws {
        let reference = try SourceReference(text)
        #expect(reference.kind == kind)
        #expect(reference.description == text)
    }

    @Test func keepsParametersInOrder() throws {
        let reference = try SourceReference("file:///d?a=1&b=x%3Dy&a=2&c=")
        #expect(reference.parameters.map(\.key) == ["a", "b", "a", "c"])
        #expect(reference.parameters.map(\.value) == ["1", "x=y", "2", ""])
    }

    @Test(arguments: [
        "", "file:", "file://", "file://host/p", "file://host", "file:///a%00b", "file:///%FF", "file:///d?raw",
        "file:///d?a=1&b", "file:///d?a=%00", "pattern:", "pattern:x", "pattern:-1", "pattern:1.5G", "memory:",
        "memory:1Z",
        "disk:1", "C:\\disk.vmdk", "http://host/disk", "javascript:alert(1)", "a\0b", "disk.img\0.txt",
    ])
    func refuses(text: String) throws {
        try requireError(.invalid, text) { _ = try SourceReference(text) }
    }

    @Test(arguments: ["pattern:9E", "memory:99999999999999999999999", "pattern:18446744073709551616", "pattern:16E"])
    func refusesSizesThatNoDiskHas(text: String) {
        #expect(throws: BlockError.self) { _ = try SourceReference(text) }
    }

    /// A sign is no hexadecimal digit: the text stands for itself.
    @Test(arguments: ["/a%+5", "/a%-5", "/a% 5", "/a%zz", "/a%4", "/a%"])
    func percentSignsThatDecodeNothingStay(path: String) throws {
        #expect(try SourceReference("file://\(path)").kind == .path(path))
    }

    @Test(arguments: ["vddk:x", "VDDK:x"])
    func saysWhatCannotBeOpenedYet(text: String) throws {
        try requireError(.unsupported, text) { _ = try SourceReference(text) }
    }

    @Test func hotAddedDisksAreNamedByWhoTheyAre() throws {
        let named: [(String, DiskSelector)] = [
            ("serial=6000c29", .serial("6000c29")), ("WWN=naa.5", .name("naa.5")),
            ("hctl=2:0:5:0", .address(try #require(SCSIAddress("2:0:5:0")))),
        ]
        for (text, selector) in named {
            #expect(try SourceReference("hotadd:\(text)").kind == .hotAdd(.present(selector)))
        }
        let image = HotAddImage(path: "/vm/a b.qcow2", format: "qcow2", controller: "qmp+tcp:10.0.2.2:4444")
        let text = "hotadd:image=/vm/a%20b.qcow2?controller=qmp+tcp:10.0.2.2:4444&format=qcow2"
        #expect(try SourceReference(text).kind == .hotAdd(.image(image)))
        for wrong in ["hotadd:", "hotadd:x", "hotadd:serial=", "hotadd:hctl=1:2:3", "hotadd:lun=1", "hotadd:image=/x"] {
            try requireError(.invalid, wrong) { _ = try SourceReference(wrong) }
        }
    }

    @Test func pointsAreNamedWithTheirRepository() throws {
        let source = try SourceReference("point:2026-11-21?repository=/srv/a%20b&vm=web&disk=vda")
        let point = PointReference(point: "2026-11-21", repository: "/srv/a b", machine: "web", disk: "vda")
        #expect(source.kind == .point(point))
        for text in ["point:3", "point:?repository=/srv", "point:3?repository="] {
            try requireError(.invalid, text) { _ = try SourceReference(text) }
        }
        try requireError(.readOnly, "writing") { _ = try source.open(writable: true) }
        // Nobody here has said how to open one.
        try requireError(.unsupported, "opening") { _ = try source.open() }
        try requireError(.invalid, "a parameter") {
            _ = try SourceReference("point:3?repository=/srv&format=raw").open()
        }
    }

    @Test func unknownSchemeSaysHowToNameAFile() throws {
        do {
            _ = try SourceReference("backup:1.img")
            Issue.record("an unknown scheme was taken")
        } catch { #expect("\(error)".contains("./backup:1.img")) }
    }
}

@Suite struct ByteCountTests {
    @Test(
        arguments: [
            ("0", 0), ("1", 1), ("512", 512), ("512b", 512), ("1k", 1024), ("1K", 1024), ("1KiB", 1024),
            ("10mib", 10 << 20),
            ("3G", 3 << 30), ("2T", 2 << 40), ("1P", 1 << 50), ("7E", 7 << 60), ("007", 7),
            ("9223372036854775807", UInt64(Int64.max)),
        ] as [(String, UInt64)])
    func parses(text: String, bytes: UInt64) throws { #expect(try ByteCount(text).bytes == bytes) }

    @Test(arguments: [
        "", " ", "K", "-1", "+1", "1.5G", "1 G", "1G ", " 1", "0x10", "1KB", "1Ki", "1iB", "1BiB", "1KiBiB", "1Z",
        "1e3", "１２",
        "1\0", "1\u{212A}", "1_000", "1,000", "NaN", "٣",
    ])
    func refuses(text: String) throws {
        try requireError(.invalid, text) { _ = try ByteCount(text) }
    }

    @Test(arguments: ["8E", "9223372036854775808", "16E", "18446744073709551615", "9007199254740993K"])
    func refusesMoreThanAnyDiskHas(text: String) throws {
        try requireError(.tooLarge, text) { _ = try ByteCount(text) }
    }

    /// More digits than any integer has are refused, whichever way.
    @Test func refusesManyDigits() {
        #expect(throws: BlockError.self) { _ = try ByteCount(String(repeating: "9", count: 100_000)) }
    }
}
