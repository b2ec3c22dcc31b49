// The disks that a fuzzed connection works on: one for each way in which the server answers.
import Block
import FuzzSupport
import Glibc
import LinuxIO
import NBD

enum SampleExports {
    /// Names of exports whose bytes never change and can be compared.
    static let constant: Set<String> = ["pattern", "file", "slice"]

    static func make() throws -> [Export] {
        let pattern = try PatternDevice(size: (1 << 20) + 513, seed: 3, allocatedShare: 0.5)
        let memory = try NamelessFile.memory(size: 1 << 20)
        let scratch = try NamelessFile.memory(size: pattern.info.size)
        let everywhere = 0..<UInt64(Int64.max)
        let faults = FaultPlan([
            FaultPlan.Fault(.readError(.inputOutput), range: 4096..<8192),
            FaultPlan.Fault(.readError(.noMemory), range: 300_000..<300_001),
            FaultPlan.Fault(.writeError(.noSpace), range: 65536..<131_072),
            FaultPlan.Fault(.flushError(.inputOutput), range: everywhere, probability: 0.5),
        ])
        var limited = ExportOptions()
        limited.bytesPerSecondMax = 1 << 50
        return try [
            Export(name: "pattern", device: pattern),
            Export(
                name: "huge",
                device: StubDevice(size: UInt64(Int64.max), run: 1 << 55, isReadOnly: false, bitmaps: ["one", "two"])),
            Export(name: "memory", device: memory, options: limited),
            Export(name: "file", device: stableFile(size: (64 << 20) + 513)),
            Export(name: "overlay", device: OverlayDevice(pattern, scratch: scratch)),
            Export(name: "faulty", device: FaultDevice(NamelessFile.memory(size: 1 << 20), plan: faults)),
            Export(name: "slice", device: SliceDevice(pattern, range: 1000..<900_001, label: "part")),
            Export(name: "resized", device: ResizedDevice(memory, size: 3 << 20)),
            Export(name: "dense", device: StubDevice(size: 64 << 20, isReadOnly: true)),
            Export(name: "shrunk", device: stableFile(size: 1 << 20, shrunkTo: 600_001)),
        ]
    }

    /// Names of exports whose reads may fail.
    static let failing: Set<String> = ["faulty", "shrunk"]

    /// A file that nobody writes: some data, the rest holes.
    private static func stableFile(size: Int, shrunkTo rest: Int? = nil) throws -> RawFileDevice {
        var template = Array("/tmp/diskgate-fuzz-XXXXXX".utf8CString)
        let number = mkstemp(&template)
        guard number >= 0 else { throw BlockError(.notFound, "making a file in /tmp") }
        unlink(template)
        let file = Descriptor(owning: number)
        let bytes = (0..<400_000).map { UInt8(truncatingIfNeeded: $0 ^ $0 >> 8) }
        for offset in [0, 1 << 20, (64 << 20) - 200_000] { pwrite(number, bytes, bytes.count, off_t(offset)) }
        ftruncate(number, off_t(size))
        let device = try RawFileDevice(file, name: "file")
        if let rest { ftruncate(number, off_t(rest)) }
        return device
    }
}
