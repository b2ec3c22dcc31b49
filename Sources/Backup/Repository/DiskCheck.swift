// Compares a disk as it reads at a point with the hashes of its chain, chunk by chunk.
import Block

/// A comparison of one disk at one point.
struct DiskCheck {
    struct Finding {
        var offset: UInt64
        var problem: String
        /// Who holds the hash.
        var link: ChainLink?
    }

    let device: any BlockDevice
    let chain: HashChain
    /// Whether all chunks are looked at, or only those that the point itself holds.
    let isWhole: Bool

    /// Bytes that are looked at together.
    private static let windowSize: UInt64 = 1 << 20

    /// - Returns: bytes compared, the first findings, and how many there are.
    func run(_ progress: (UInt64) -> Void) throws(BlockError) -> (UInt64, [Finding], Int) {
        var findings: [Finding] = []
        var (bytes, count): (UInt64, Int) = (0, 0)
        let buffer = Buffer(count: Int(Self.windowSize))
        let hasher = ChunkHasher()
        let size = device.info.size
        var position: UInt64 = 0
        while position < size {
            let end = min(position + Self.windowSize, size)
            let wrong = try check(position..<end, buffer.bytes, hasher, &bytes)
            count += wrong.count
            findings += wrong.prefix(Verification.problemsPerDiskMax - findings.count)
            progress(end - position)
            position = end
        }
        return (bytes, findings, count)
    }

    private func check(
        _ window: Range<UInt64>, _ buffer: UnsafeMutableRawBufferPointer, _ hasher: borrowing ChunkHasher,
        _ bytes: inout UInt64
    ) throws(BlockError) -> [Finding] {
        let chunkSize = ChunkHashes.chunkSize
        var expected: [(offset: UInt64, hash: ChunkHash, link: ChainLink?)] = []
        var absent: [Range<UInt64>] = []
        var onlyZeros = true
        for chunk in window.lowerBound / chunkSize..<(window.upperBound - 1) / chunkSize + 1 {
            let offset = chunk * chunkSize
            if !isWhole, try chain.own(chunk) == .absent {
                absent.append(offset..<min(offset + chunkSize, window.upperBound))
                continue
            }
            let (hash, link) = try chain.expected(chunk)
            if hash != .zero { onlyZeros = false }
            expected.append((offset, hash, link))
        }
        var findings = try absent.isEmpty ? [] : intruders(absent, in: window)
        if expected.isEmpty { return findings }
        if onlyZeros, try device.readsAsHole(window) { return findings }
        do throws(BlockError) {
            try device.read(
                into: UnsafeMutableRawBufferPointer(rebasing: buffer[..<Int(window.count64)]), at: window.lowerBound)
        } catch {
            // Which of the chunks it is, and whose.
            expected = readSingly(expected, window, buffer, &findings)
        }
        for (offset, hash, link) in expected {
            let start = Int(offset - window.lowerBound)
            let length = Int(min(chunkSize, window.upperBound - offset))
            let piece = UnsafeRawBufferPointer(rebasing: UnsafeRawBufferPointer(buffer)[start..<(start + length)])
            bytes += UInt64(length)
            if hasher.hash(of: piece) != hash {
                findings.append(
                    Finding(
                        offset: offset, problem: "the chunk at offset \(offset) is not what was backed up", link: link))
            }
        }
        return findings
    }

    private typealias Expected = (offset: UInt64, hash: ChunkHash, link: ChainLink?)

    /// Reads chunk by chunk.
    ///
    /// - Returns: those that could be read.
    private func readSingly(
        _ expected: [Expected], _ window: Range<UInt64>, _ buffer: UnsafeMutableRawBufferPointer,
        _ findings: inout [Finding]
    ) -> [Expected] {
        var readable: [Expected] = []
        for chunk in expected {
            let start = Int(chunk.offset - window.lowerBound)
            let end = Int(min(ChunkHashes.chunkSize, window.upperBound - chunk.offset)) + start
            do throws(BlockError) {
                try device.read(into: UnsafeMutableRawBufferPointer(rebasing: buffer[start..<end]), at: chunk.offset)
                readable.append(chunk)
            } catch {
                findings.append(Finding(offset: chunk.offset, problem: error.message, link: chunk.link))
            }
        }
        return readable
    }

    /// Chunks that the image has and the sidecar does not.
    private func intruders(_ absent: [Range<UInt64>], in window: Range<UInt64>) throws(BlockError) -> [Finding] {
        var list = StatusList(capacity: 1024)
        var findings: [Finding] = []
        var position = window.lowerBound
        while position < window.upperBound {
            list.removeAll()
            let end = try device.status(.depth, of: position..<window.upperBound, into: &list)
            if end <= position { break }
            for run in list.extents {
                let range = position..<(position + run.length)
                position = range.upperBound
                guard run.value == 1, let chunk = absent.first(where: { $0.overlaps(range) }) else { continue }
                findings.append(
                    Finding(
                        offset: chunk.lowerBound,
                        problem: "the image holds the chunk at offset \(chunk.lowerBound), and there is no hash of it",
                        link: nil))
            }
        }
        return findings
    }
}

extension BlockDevice {
    /// Whether a range reads as zeros without anything being read.
    fileprivate func readsAsHole(_ range: Range<UInt64>) throws(BlockError) -> Bool {
        var extents = ExtentList(capacity: 64)
        guard try map(range, .blocking, into: &extents) == range.upperBound else { return false }
        for index in 0..<extents.count {
            guard case .zeros = extents[index].place else { return false }
        }
        return true
    }
}
