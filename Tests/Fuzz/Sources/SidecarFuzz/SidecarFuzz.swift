// Fuzzes the hash files of restore points: what opens is what its runs say, and merging keeps what both know.
import Block
import FuzzSupport
import Glibc
import LinuxIO

@testable import Backup

@main
struct SidecarFuzz {
    static func main() {
        let folder = FuzzFolder()
        fuzz { input in
            var choices = Choices(input)
            let shape = choices.byte()
            let first = choices.take(choices.number())
            let second = choices.rest()
            let base = folder.write("base", shape & 1 != 0 ? Array(first) : whole(first))
            let child = folder.write("child", shape & 2 != 0 ? Array(second) : whole(second))
            let lower = check(base)
            let upper = check(child)
            guard let lower, let upper else { return }
            let path = "\(folder.path)/merged"
            unlink(path)
            guard (try? ChunkHashes.merge(base: base, child: child, into: path)) != nil else { return }
            guard let merged = check(path) else { return require(false, "what was merged cannot be read") }
            require(merged.diskSize == upper.diskSize, "the disk has another size")
            for chunk in chunks(of: lower) + chunks(of: upper) where chunk < ChunkHashes.chunks(upper.diskSize) {
                let above = try? upper.hash(of: chunk)
                let expected = above == .absent ? try? lower.hash(of: chunk) : above
                require((try? merged.hash(of: chunk)) == expected, "chunk \(chunk) has another hash")
            }
        }
    }

    /// A file whose header fits what follows it: the disk's size, the number of runs, then runs of 4 bytes, each made
    /// to begin behind the one before; hashes as many as they need.
    private static func whole(_ input: UnsafeRawBufferPointer) -> [UInt8] {
        var choices = Choices(input)
        let chunks = UInt64(choices.number()) << UInt64(choices.byte() & 31)
        let size = chunks << 16 | UInt64(choices.number())
        var runs: [(first: UInt64, count: UInt64, isZero: Bool)] = []
        var position: UInt64 = 0
        while !choices.isEmpty && runs.count < 32 {
            let gap = UInt64(choices.byte())
            let count = UInt64(choices.number() & 0x3F) + 1
            runs.append((position + gap, count, choices.byte() & 1 != 0))
            position += gap + count
        }
        var bytes = ChunkHashes.magic
        func add<T: FixedWidthInteger>(_ value: T) {
            withUnsafeBytes(of: value.littleEndian) { bytes += Array($0) }
        }
        let hashes = runs.reduce(0) { $0 + ($1.isZero ? 0 : $1.count) }
        for value in [1, 1] as [UInt32] { add(value) }
        add(size)
        for value in [65536, 0] as [UInt32] { add(value) }
        for value in [UInt64(runs.count), hashes, 0, 0] { add(value) }
        var hash: UInt64 = 0
        for run in runs {
            add(run.first)
            add(run.count)
            add(run.isZero ? .max : hash)
            if !run.isZero { hash += run.count }
        }
        for number in 0..<hashes {
            add(number &* 0x9E37_79B9_7F4A_7C15)
            add(number)
        }
        return bytes
    }

    /// Some chunks next to where something begins or ends.
    private static func chunks(of hashes: ChunkHashes) -> [UInt64] {
        var chunks: [UInt64] = [0]
        var cursor = hashes.runs()
        while chunks.count < 200, let run = (try? cursor.next()) ?? nil {
            chunks += [run.first &- 1, run.first, run.first + run.count / 2, run.end - 1, run.end]
        }
        return chunks
    }

    private static func check(_ path: String) -> ChunkHashes? {
        guard let hashes = try? ChunkHashes.open(path) else { return nil }
        var cursor = hashes.runs()
        var (data, zeros, seen) = (UInt64(0), UInt64(0), 0)
        while let run = (try? cursor.next()) ?? nil {
            if run.hash == nil { zeros += run.count } else { data += run.count }
            seen += 1
            guard seen < 100 else { continue }
            for chunk in [run.first, run.end - 1] {
                guard let hash = try? hashes.hash(of: chunk) else {
                    require(false, "chunk \(chunk) cannot be looked up")
                    continue
                }
                require(hash != .absent && (hash == .zero) == (run.hash == nil), "chunk \(chunk) is not in its run")
            }
        }
        require(data == hashes.dataChunks && zeros == hashes.zeroChunks, "the counts are not those of the runs")
        require((try? hashes.hash(of: .max)) == .absent, "a chunk past the end")
        return hashes
    }
}
