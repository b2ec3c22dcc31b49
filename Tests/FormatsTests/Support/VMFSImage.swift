// Images of datastores for tests, made by Scripts/lab/vmfs-image, with what a reader must find in them.
import Block
import Formats
import Foundation
import LinuxIO
import Support

/// An image of a datastore, on one LUN or several, which nobody changes.
final class VMFSImage: Sendable {
    /// A block of a file.
    struct Block: Decodable {
        let offset: UInt64
        let lun: Int
        let place: UInt64
        let kind: String
        let isZero: Bool
    }

    /// A file as a reader must find it.
    struct File: Decodable {
        let size: UInt64
        let seed: UInt32?
        let sha256: String?
        let blocks: [Block]?
    }

    struct Manifest: Decodable {
        let version: Int
        let label: String
        let uuid: String
        let luns: Int
        let files: [String: File]
    }

    let manifest: Manifest
    let paths: [String]

    private init(_ version: Int, _ options: [String], in directory: String) throws {
        let out = "\(directory)/vmfs\(version)\(options.joined())"
        let script =
            #filePath.split(separator: "/").dropLast(4).reduce("") { "\($0)/\($1)" } + "/Scripts/lab/vmfs-image"
        _ = try Support.Tool.output("python3", [script, "\(version)", out] + options)
        manifest = try JSONDecoder().decode(
            Manifest.self, from: Data(contentsOf: URL(fileURLWithPath: out + ".json")))
        paths = manifest.luns == 1 ? [out] : (0..<manifest.luns).map { "\(out).\($0)" }
    }

    /// Images that were made, for all tests of this process; gone when it ends.
    private static let made = Locked<[String: VMFSImage]>([:])
    private static let directory: String = {
        let path = NSTemporaryDirectory() + "diskgate-vmfs-\(getpid())"
        try? FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
        atexit { try? FileManager.default.removeItem(atPath: VMFSImage.directory) }
        return path
    }()

    /// The image of a version of VMFS with options of the script.
    static func make(_ version: Int, _ options: String...) throws -> VMFSImage {
        try made.withLock { (made) throws -> VMFSImage in
            let key = "\(version) \(options)"
            if let image = made[key] { return image }
            let image = try VMFSImage(version, options, in: directory)
            made[key] = image
            return image
        }
    }

    /// Its LUNs as disks.
    func luns() throws -> [any BlockDevice] { try paths.map { try RawFileDevice.open($0) } }

    /// The datastore.
    func volume() throws -> VMFSVolume { try openVolume(luns()) }
}

/// What looks damaged is read once only, so that tests of damage do not wait.
let onlyOnce: VMFSOptions = {
    var options = VMFSOptions()
    options.attempts = 1
    return options
}()

/// The one datastore on some LUNs.
func openVolume(_ luns: [any BlockDevice], _ options: VMFSOptions = onlyOnce) throws -> VMFSVolume {
    var members: [VMFSMember] = []
    for lun in luns { members += try VMFSMember.probe(lun) }
    let volumes = try VMFSVolume.assemble(members, options)
    try require(volumes.count == 1, "\(volumes.count) datastores where there is one")
    return volumes[0]
}

/// A block of a disk as the script fills it.
func vmfsPattern(_ seed: UInt32, _ block: UInt32) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: 1 << 20)
    bytes.withUnsafeMutableBytes { bytes in
        for sector in 0..<(2048 as UInt32) {
            let start = Int(sector) * 512
            let fill = UInt8(truncatingIfNeeded: seed &* 7 &+ block &* 3 &+ sector)
            UnsafeMutableRawBufferPointer(rebasing: bytes[start..<(start + 512)])
                .initializeMemory(as: UInt8.self, repeating: fill)
            bytes.storeBytes(of: 0x2154_4150, toByteOffset: start, as: UInt32.self)
            bytes.storeBytes(of: seed, toByteOffset: start + 4, as: UInt32.self)
            bytes.storeBytes(of: block, toByteOffset: start + 8, as: UInt32.self)
            bytes.storeBytes(of: sector, toByteOffset: start + 12, as: UInt32.self)
        }
    }
    return bytes
}

/// Checks the content of a file, and, where the manifest has it, the place of each of its blocks.
func checkFile(_ file: VMFSFile, _ expected: VMFSImage.File, _ luns: [any BlockDevice], _ path: String) throws {
    try require(file.info.size == expected.size, "\(path) has \(file.info.size) bytes, not \(expected.size)")
    if let sha256 = expected.sha256 {
        var digest = try Digest("SHA256")
        let bytes = try Support.readBytes(file, at: 0, count: Int(expected.size))
        try bytes.withUnsafeBytes { try digest.update($0) }
        try require(try digest.finish() == sha256, "\(path) has another content")
    }
    guard let blocks = expected.blocks, let seed = expected.seed else { return }
    try checkPlaces(file, expected, luns, path)
    if expected.sha256 != nil { return }
    // What a large block has of zeros is looked at here and there.
    for (index, block) in blocks.enumerated() where block.kind == "data" && (!block.isZero || index % 40 == 1) {
        let count = Int(min(1 << 20, expected.size - block.offset))
        let bytes = try Support.readBytes(file, at: block.offset, count: count)
        let content =
            block.isZero ? [UInt8](repeating: 0, count: 1 << 20) : vmfsPattern(seed, UInt32(block.offset >> 20))
        try requireEqual(bytes, content[..<count], path, at: block.offset)
    }
}

private func checkPlaces(
    _ file: VMFSFile, _ expected: VMFSImage.File, _ luns: [any BlockDevice], _ path: String
) throws {
    var wanted = ExtentList(capacity: 8192)
    for block in (expected.blocks ?? []).sorted(by: { $0.offset < $1.offset }) {
        _ = wanted.append(block.offset - wanted.length, .zeros(allocated: false))
        let length = min(1 << 20, expected.size - block.offset)
        if block.kind == "unwritten" {
            _ = wanted.append(length, .zeros(allocated: true))
        } else {
            _ = try luns[block.lun].map(block.place..<(block.place + length), .blocking, into: &wanted)
        }
    }
    _ = wanted.append(expected.size - wanted.length, .zeros(allocated: false))
    // With room for two, so that the map has to stop in between.
    var found = ExtentList(capacity: 8192)
    var position: UInt64 = 0
    var part = ExtentList(capacity: 2)
    while position < expected.size {
        part.removeAll()
        let end = try file.map(position..<expected.size, .blocking, into: &part)
        try require(end > position && part.length == end - position, "the map of \(path) ends at \(position)")
        for index in 0..<part.count { _ = found.append(part[index].length, part[index].place) }
        position = end
    }
    try require(found.count == wanted.count, "\(path) has \(found.count) runs, not \(wanted.count)")
    for index in 0..<found.count {
        let same = "\(found[index])" == "\(wanted[index])"
        try require(same, "run \(index) of \(path) is \(found[index]), not \(wanted[index])")
    }
}

/// A disk with bytes that can be changed behind a reader's back. Its map is a source, as a remote disk's is.
final class ChangingDevice: BlockDevice {
    let info: DeviceInfo
    private let content: Content
    private let handle: SourceHandle

    final class Content: ByteSource {
        let isPrompt = true
        let lower: any BlockDevice
        let changes = Locked<[(offset: UInt64, bytes: [UInt8])]>([])
        /// Called before each read with its range; it may change bytes.
        let watch = Locked<(@Sendable (Range<UInt64>) -> Void)?>(nil)

        init(_ lower: any BlockDevice) { self.lower = lower }

        func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
            let range = offset..<(offset + UInt64(buffer.count))
            watch.withLock { $0 }?(range)
            try lower.read(into: buffer, at: offset)
            for change in changes.withLock({ $0 }) {
                let part = (change.offset..<(change.offset + UInt64(change.bytes.count))).clamped(to: range)
                if part.isEmpty { continue }
                let from = Int(part.lowerBound - change.offset)
                UnsafeMutableRawBufferPointer(rebasing: buffer[Int(part.lowerBound - offset)...])
                    .copyBytes(from: change.bytes[from..<(from + Int(part.count64))])
            }
        }
    }

    init(_ lower: any BlockDevice, size: UInt64? = nil) {
        var info = lower.info
        info.size = size ?? info.size
        self.info = info
        content = Content(lower)
        handle = SourceHandle(content)
    }

    func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError) -> UInt64
    {
        precondition(!range.isEmpty && range.upperBound <= info.size, "a map was asked for \(range)")
        let added = extents.append(range.count64, .source(handle.reference, offset: range.lowerBound))
        return added ? range.upperBound : range.lowerBound
    }

    /// Changes bytes from now on.
    func change(_ bytes: [UInt8], at offset: UInt64) { content.changes.withLock { $0.append((offset, bytes)) } }
    /// Changes a 32-bit number.
    func change(_ number: UInt32, at offset: UInt64) {
        change((0..<4).map { UInt8(truncatingIfNeeded: number >> (8 * $0)) }, at: offset)
    }
    /// Undoes all changes.
    func restore() { content.changes.withLock { $0.removeAll() } }
    /// Calls a function before each read.
    func beforeEachRead(_ watch: (@Sendable (Range<UInt64>) -> Void)?) { content.watch.withLock { $0 = watch } }
}
