// Fuzzes datastores: whatever is on a LUN, finding, listing, opening and reading end soon and keep promises.
import Block
import Formats
import FuzzSupport

@main
struct VMFSFuzz {
    static func main() {
        fuzz { input in
            var choices = Choices(input)
            let shape = choices.byte()
            let size: [UInt64] = [2 << 30, 600 << 20, 70 << 40, 40 << 20]
            let lun = PiecesDevice(choices.rest(), size: size[Int(shape & 3)], name: "lun")
            guard let members = try? VMFSMember.probe(lun) else { return }
            var options = VMFSOptions()
            options.attempts = 1
            options.cacheBytes = 1
            options.recheckSeconds = nil
            for set in VMFSMemberSet.grouped(members).prefix(4) {
                require(set.problem != nil || set.missing.isEmpty, "a volume without \(set.missing) is no problem")
                guard let volume = try? set.open(options) else { continue }
                exercise(volume)
            }
        }
    }

    private static func exercise(_ volume: VMFSVolume) {
        var files = 0
        var folders = [""]
        // A directory may be in itself.
        for turn in 0..<4 {
            guard turn < folders.count, let entries = try? volume.list(folders[turn]) else { continue }
            for entry in entries.prefix(32) {
                let path = folders[turn] + "/" + entry.name
                _ = try? volume.entry(path)
                _ = try? volume.host(holding: entry.lock)
                if entry.kind == .directory { folders.append(path) }
                guard files < 16, let file = try? volume.open(path) else { continue }
                files += 1
                check(file)
            }
        }
        for path in ["vm/link", "vm/../vm/thin-flat.vmdk"] { _ = try? volume.open(path) }
    }

    private static func check(_ file: VMFSFile) {
        let size = file.info.size
        require(size <= 65 << 40, "a file of \(size) bytes")
        require(file.unwrittenBytes <= file.allocatedBytes, "more is unwritten than there is")
        // Nobody changes anything.
        require((try? file.recheck(.everything)) != nil, "\(file.info.name) has changed")
        if size == 0 { return }
        let step: UInt64 = 8 << 20
        for turn in 0..<6 as Range<UInt64> {
            let start = turn < 3 ? turn * step : max(size / 3 * (turn - 2), 1) - 1
            guard start < size else { continue }
            let range = start..<min(size, start + step)
            checkMap(file, range, .resident)
            // Every address was looked at when the file was opened.
            require(checkMap(file, range, .blocking) != nil, "\(range) of an open file has no map")
            checkStatus(file, .allocation, range)
            file.prefetch(range)
            checkRead(file, start..<min(range.upperBound, start + 3000))
        }
    }
}
