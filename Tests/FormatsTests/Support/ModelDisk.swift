// A disk in memory that images are compared with, and clusters that are quick to make and differ from each other.
import Block
import Formats
import Foundation
import Testing

let clusterSize = 65536

/// Kinds of clusters that compress differently.
enum ClusterContent: CaseIterable {
    case noise, text, constant
}

/// The bytes of a cluster that nobody else has.
func clusterBytes(_ content: ClusterContent, _ stamp: UInt64) -> [UInt8] {
    var bytes: [UInt8]
    switch content {
    case .noise:
        let start = Int(stamp &* 4099 % UInt64(clusterSize))
        bytes = Array(noise[start..<(start + clusterSize)])
    case .text: bytes = Array(repeating: 0, count: clusterSize / 2) + noise[0..<(clusterSize / 2)]
    case .constant: bytes = Array(repeating: UInt8(truncatingIfNeeded: stamp % 255 + 1), count: clusterSize)
    }
    bytes.withUnsafeMutableBytes { $0.storeBytes(of: stamp, toByteOffset: 100, as: UInt64.self) }
    return bytes
}

private let noise: [UInt8] = {
    var random = SplitMix(seed: 99)
    return (0..<(2 * clusterSize / 8)).flatMap { _ in withUnsafeBytes(of: random.next()) { Array($0) } }
}()

/// Only what was written; the rest reads as zeros.
struct ModelDisk {
    var size: Int
    var clusters: [Int: [UInt8]] = [:]

    init(size: Int) { self.size = size }

    var clusterCount: Int { (size + clusterSize - 1) / clusterSize }

    /// The bytes of a cluster as far as the disk goes.
    func cluster(_ index: Int) -> [UInt8] {
        var bytes = clusters[index] ?? []
        bytes += [UInt8](repeating: 0, count: clusterSize - bytes.count)
        return Array(bytes[..<min(clusterSize, size - index * clusterSize)])
    }

    var bytes: [UInt8] { (0..<clusterCount).flatMap { cluster($0) } }

    /// The first cluster that a disk has otherwise; nil when they are the same.
    func firstDifference(_ device: any BlockDevice) throws -> String? {
        guard device.info.size == UInt64(size) else { return "it has \(device.info.size) bytes, not \(size)" }
        for index in 0..<clusterCount {
            let expected = cluster(index)
            let read = try readBytes(device, UInt64(index * clusterSize), expected.count)
            let isSame = read.withUnsafeBytes { a in expected.withUnsafeBytes { a.isSame(as: $0) } }
            if !isSame { return "cluster \(index) differs" }
        }
        return nil
    }
}

extension Qcow2Writer {
    func write(_ bytes: [UInt8], cluster: Int) throws {
        try bytes.withUnsafeBytes { try write($0, at: UInt64(cluster * clusterSize)) }
    }
}
