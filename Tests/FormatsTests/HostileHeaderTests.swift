// Headers that lie: each is refused with a reason, or read without harm.
import Block
import Formats
import Foundation
import Testing

@Suite struct HostileHeaderTests {
    private let good = Qcow2Builder.empty(clusterBits: 12, size: 1 << 20)

    private func error(_ change: (inout [UInt8]) -> Void) -> BlockError? {
        var bytes = good
        change(&bytes)
        do {
            _ = try Qcow2Device(lower: BytesDevice(bytes))
            return nil
        } catch { return error }
    }

    @Test func imageOfTheBuilderIsAccepted() throws {
        #expect(error { _ in } == nil)
        let device = try Qcow2Device(lower: BytesDevice(good))
        #expect(try readBytes(device, 0, 1 << 20) == [UInt8](repeating: 0, count: 1 << 20))
    }

    @Test func wrongFieldsAreRefusedByKind() {
        func check32(_ offset: Int, _ value: UInt32, _ kind: BlockError.Kind, _ line: Int = #line) {
            #expect(error { Qcow2Builder.store(&$0, offset, value) }?.kind == kind, "line \(line)")
        }
        func check64(_ offset: Int, _ value: UInt64, _ kind: BlockError.Kind, _ line: Int = #line) {
            #expect(error { Qcow2Builder.store(&$0, offset, value) }?.kind == kind, "line \(line)")
        }
        check32(0, 0x5146_49FA, .invalid)
        for version: UInt32 in [0, 1, 4, .max] { check32(4, version, .unsupported) }
        for bits: UInt32 in [0, 8, 22, 63, 64, .max] { check32(20, bits, .corrupt) }
        for size: UInt64 in [.max, 1 << 63, 1 << 62, 1 << 40] { check64(24, size, .corrupt) }
        for method: UInt32 in [1, 2, 3] { check32(32, method, .unsupported) }
        for entries: UInt32 in [0, .max, 4_194_305, 1 << 20] { check32(36, entries, .corrupt) }
        for offset: UInt64 in [0, 512, 8193, 1 << 20, 1 << 63, .max, .max & ~4095] { check64(40, offset, .corrupt) }
        for offset: UInt64 in [0, 513, 1 << 20, .max & ~4095] { check64(48, offset, .corrupt) }
        for clusters: UInt32 in [0, 2049, .max] { check32(56, clusters, .corrupt) }
        for count: UInt32 in [1, 65537, .max] { check32(60, count, .corrupt) }
        for order: UInt32 in [7, .max] { check32(96, order, .corrupt) }
        for length: UInt32 in [0, 72, 103, 4097, .max] { check32(100, length, .corrupt) }
    }

    @Test func backingNamesOutsideTheFirstClusterAreRefused() {
        for (offset, length) in [(UInt64(4090), UInt32(100)), (4097, 1), (.max, 1), (1000, 1024), (1000, .max)] {
            let found = error {
                Qcow2Builder.store(&$0, 8, offset)
                Qcow2Builder.store(&$0, 16, length)
            }
            #expect(found?.kind == .corrupt, "\(length) at \(offset)")
        }
        // NUL inside, and no UTF-8.
        for byte: UInt8 in [0, 0xFF] {
            let found = error {
                Qcow2Builder.store(&$0, 8, UInt64(1000))
                Qcow2Builder.store(&$0, 16, UInt32(3))
                $0.replaceSubrange(1000..<1003, with: [65, byte, 66])
            }
            #expect(found?.kind == .unsupported)
        }
    }

    @Test func unknownIncompatibleFeaturesAreNamed() {
        let table = [UInt8(0), 17] + Array("quantum clusters".utf8) + [UInt8](repeating: 0, count: 30)
        let named = error {
            Qcow2Builder.store(&$0, 72, UInt64(1 << 17 | 1 << 40))
            Qcow2Builder.addExtension(&$0, 0x6803_F857, table)
        }
        #expect(named?.kind == .unsupported)
        #expect(named?.message.contains("bit 17 (quantum clusters), 40") == true)
    }

    @Test func imageMarkedCorruptIsReadOnlyWhenAsked() throws {
        var bytes = good
        bytes[79] |= 2
        let refused = #expect(throws: BlockError.self) { try Qcow2Device(lower: BytesDevice(bytes)) }
        #expect(refused?.message.contains("qemu-img check -r") == true)
        var options = Qcow2Options()
        options.allowCorrupt = true
        #expect(try readBytes(try Qcow2Device(lower: BytesDevice(bytes), options), 0, 10).count == 10)
    }

    @Test func featureBitsMustFitTheirFields() {
        // A compression type without its bit, the bit without a type, an unknown type.
        func withType(_ type: UInt8, bit: Bool) -> BlockError? {
            error {
                Qcow2Builder.store(&$0, 100, UInt32(112))
                $0[104] = type
                if bit { $0[79] |= 8 }
            }
        }
        #expect(withType(1, bit: false)?.kind == .corrupt)
        #expect(withType(0, bit: true)?.kind == .corrupt)
        #expect(withType(2, bit: true)?.kind == .unsupported)
        #expect(withType(1, bit: true) == nil)
        // Subclusters in clusters of 4 KiB, a data file without a name.
        #expect(error { $0[79] |= 16 }?.kind == .corrupt)
        #expect(error { $0[79] |= 4 }?.kind == .unsupported)
    }

    @Test func encryptedImagesAreRefused() {
        let found = error { Qcow2Builder.store(&$0, 32, UInt32(2)) }
        #expect(found?.kind == .unsupported)
        #expect(found?.message.contains("encrypted") == true)
        // The extension that says where a LUKS header is.
        #expect(
            error { Qcow2Builder.addExtension(&$0, 0x0537_BE77, [UInt8](repeating: 0, count: 16)) }?.kind
                == .unsupported)
    }

    @Test func headerExtensionsThatDoNotFitAreRefused() {
        for length: UInt32 in [.max, 4096, 0x7FFF_FFFF, 3985] {
            let found = error {
                Qcow2Builder.store(&$0, 104, UInt32(0x1234))
                Qcow2Builder.store(&$0, 108, length)
            }
            #expect(found?.kind == .corrupt, "\(length)")
        }
        #expect(
            error {
                Qcow2Builder.store(&$0, 104, UInt32(0x1234))
                Qcow2Builder.store(&$0, 108, UInt32(3984))
            } == nil)
    }
}
