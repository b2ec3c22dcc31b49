// The copier on disks in memory: the target equals the source, whatever the layout, the alignment and the workers.
import Backup
import Block
import LinuxIO
import Support
import Testing
import Transports

/// Opens a pattern.
func openPattern(_ text: String) throws -> any BlockDevice {
    try DiskSpecification(try SourceReference(text)).open()
}

/// Collects what a copy finishes.
private final class Recorder: CopyObserver {
    let ranges = Locked<[(Range<UInt64>, CopyItem.Kind)]>([])
    func finished(_ range: Range<UInt64>, _ kind: CopyItem.Kind) { ranges.withLock { $0.append((range, kind)) } }
}

/// A disk in memory full of one byte.
private func filled(_ size: UInt64) throws -> RawFileDevice {
    let device = try NamelessFile.memory(size: size)
    let bytes = [UInt8](repeating: 0x5A, count: Int(size))
    try bytes.withUnsafeBytes { try device.write($0, at: 0, durable: false) }
    return device
}

/// A disk whose first flush fails, and that knows nothing of it afterwards.
private final class ForgetfulTarget: CopyTarget {
    let name = "forgetful"
    let size: UInt64
    let granularity: UInt64 = 4096
    let isSequential = false
    let flushes = Locked(0)

    init(_ size: UInt64) { self.size = size }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(BlockError) {}
    func zero(_ range: Range<UInt64>) throws(BlockError) {}
    func flush() throws(BlockError) {
        let count = flushes.withLock { (flushes) -> Int in
            flushes += 1
            return flushes
        }
        if count == 1 { throw BlockError(.inputOutput, "flushing: writes were lost") }
    }
}

@Suite struct CopierTests {
    @Test func `nothing is called durable after a flush that failed`() throws {
        var options = CopyOptions()
        options.bytesPerSecondMax = 16 << 20
        options.checkpointBytes = 1
        let target = ForgetfulTarget(64 << 20)
        let copier = try Copier(
            source: CopySource(try openPattern("pattern:64M?seed=4")), target: target, options: options)
        var notes = 0
        try requireError(.inputOutput, "flushing") {
            _ = try copier.run(checkpoint: { (_) throws(BlockError) in notes += 1 })
        }
        #expect(notes == 0 && target.flushes.withLock { $0 } == 1)
    }

    @Test func `random disks are copied whole over old content`() throws {
        try withSeed { generator in
            for _ in 0..<25 {
                let size = UInt64.random(in: 1...(9 << 20), using: &generator)
                let disk = try randomDisk(size: size, hasDirty: false, &generator)
                let target = try filled(size)
                var options = CopyOptions()
                options.workers = .random(in: 1...4, using: &generator)
                options.detectsZeros = generator.oneIn(2)
                let copier = try Copier(source: CopySource(disk), target: DeviceTarget(target), options: options)
                let result = try copier.run()
                try requireEqual(try content(target), try content(disk), "copy of \(size) bytes")
                #expect(result.isPlanned && result.doneBytes == size)
                #expect(result.writtenBytes + result.zeroedBytes == size)
            }
        }
    }

    @Test func `random disks are copied into new files`() throws {
        try withSeed { generator in
            for _ in 0..<25 {
                let size = UInt64.random(in: 1...(9 << 20), using: &generator)
                let disk = try randomDisk(size: size, hasDirty: false, &generator)
                let target = try NamelessFile.memory(size: size)
                let copier = try Copier(
                    source: CopySource(disk), target: DeviceTarget(target, readsAsZeros: true))
                let result = try copier.run()
                try requireEqual(try content(target), try content(disk), "copy of \(size) bytes")
                #expect(result.zeroedBytes == 0 && result.writtenBytes + result.skippedBytes == size)
            }
        }
    }

    @Test func `what changed is all that is needed to bring an older copy up to date`() throws {
        try withSeed { generator in
            for _ in 0..<25 {
                let size = UInt64.random(in: 1...(9 << 20), using: &generator)
                let disk = try randomDisk(size: size, hasDirty: true, &generator)
                // As it was before: other bytes wherever the bitmap says changed.
                let target = try NamelessFile.memory(size: size)
                let now = try content(disk)
                try now.withUnsafeBytes { try target.write($0, at: 0, durable: false) }
                var list = StatusList(capacity: 100_000)
                _ = try disk.status(.dirtyBitmap(0), of: 0..<size, into: &list)
                var position: UInt64 = 0
                var changedBytes: UInt64 = 0
                for extent in list.extents {
                    if extent.value != 0 {
                        try fill(target, position..<(position + extent.length), &generator)
                        changedBytes += extent.length
                    }
                    position += extent.length
                }
                let recorder = Recorder()
                var options = CopyOptions()
                options.observer = recorder
                let copier = try Copier(
                    source: CopySource(disk), changed: "qemu:dirty-bitmap:changes", target: DeviceTarget(target),
                    options: options)
                let result = try copier.run()
                try requireEqual(try content(target), now, "increment of \(size) bytes")
                let told = recorder.ranges.withLock { $0.reduce(0) { $0 + $1.0.count64 } }
                #expect(told == result.doneBytes && told >= changedBytes)
            }
        }
    }

    @Test func `a bitmap that is not there is an error that says which there are`() throws {
        let disk = try ToldDevice(
            size: 65536, allocation: [StatusExtent(length: 65536, value: 0)],
            dirty: [StatusExtent(length: 65536, value: 1)])
        let target = DeviceTarget(try filled(65536))
        let error = #expect(throws: BlockError.self) {
            _ = try Copier(source: CopySource(disk), changed: "other", target: target)
        }
        #expect(error?.kind == .notFound && error?.message.contains("only changes") == true)
    }

    @Test func `a target that is too small is refused before it is touched`() throws {
        let target = try filled(65536)
        try requireError(.noSpace, "copying") {
            _ = try Copier(source: CopySource(try openPattern("pattern:128K")), target: DeviceTarget(target))
        }
        #expect(try content(target).allSatisfy { $0 == 0x5A })
    }

    @Test func `a source that fails ends the copy with its error`() throws {
        var disk = DiskSpecification(try SourceReference("pattern:8M"))
        disk.faults = [FaultPlan.Fault(.readError(.inputOutput), range: (4 << 20)..<((4 << 20) + 4096))]
        var options = CopyOptions()
        options.retries = 0
        let target = DeviceTarget(try filled(8 << 20))
        let copier = try Copier(source: CopySource.open(disk), target: target, options: options)
        try requireError(.inputOutput, "copying") { _ = try copier.run() }
    }

    @Test func `a copy that is cancelled tells how far it is`() throws {
        let cancellation = Cancellation()
        var options = CopyOptions()
        options.bytesPerSecondMax = 64 << 20
        let target = try NamelessFile.memory(size: 1 << 30)
        let copier = try Copier(
            source: CopySource(try openPattern("pattern:1G?seed=4")), target: DeviceTarget(target, readsAsZeros: true),
            options: options, cancellation: cancellation)
        var settled: UInt64 = 0
        try requireError(.shutdown, "copying") {
            _ = try copier.run(
                progress: { if $0.doneBytes > 8 << 20 { cancellation.cancel() } },
                checkpoint: { (end) throws(BlockError) in settled = end })
        }
        #expect(settled >= 4 << 20 && settled < 1 << 30)
        var copied = [UInt8](repeating: 0, count: Int(settled))
        var wanted = copied
        try copied.withUnsafeMutableBytes { try target.read(into: $0, at: 0) }
        try wanted.withUnsafeMutableBytes { try openPattern("pattern:1G?seed=4").read(into: $0, at: 0) }
        try requireEqual(copied, wanted, "what is settled")
    }
}
