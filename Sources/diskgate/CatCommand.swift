// `diskgate cat`: a disk's bytes on standard output.
import ArgumentParser
import Block
import Glibc

struct CatCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "cat", abstract: "Write a disk, or a part of it, to standard output.")

    @OptionGroup var source: SourceArguments

    func run() throws {
        // Ends silently when the reader has enough, as every other program in a pipe, whatever the parent set.
        signal(SIGPIPE, SIG_DFL)
        let opened = try source.open()
        try opened.device.forEachPiece { (bytes) throws(BlockError) in
            var done = 0
            while done < bytes.count {
                let written = Glibc.write(STDOUT_FILENO, bytes.baseAddress?.advanced(by: done), bytes.count - done)
                if written > 0 {
                    done += written
                } else if errno != EINTR {
                    throw BlockError(errno: errno, "writing to standard output")
                }
            }
        }
        try opened.finish()
    }
}

extension BlockDevice {
    /// Reads the whole disk in order and hands it over in pieces of at most 1 MiB, with the next ones read ahead.
    func forEachPiece(_ body: (UnsafeRawBufferPointer) throws(BlockError) -> Void) throws(BlockError) {
        let buffer = Buffer(count: 1 << 20)
        let size = info.size
        let ahead: UInt64 = 8 << 20
        var position: UInt64 = 0
        while position < size {
            let count = Int(min(size - position, UInt64(buffer.bytes.count)))
            let next = position + ahead
            if next < size { prefetch(next..<min(next + UInt64(count), size)) }
            let piece = UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[..<count])
            try read(into: piece, at: position)
            try body(UnsafeRawBufferPointer(piece))
            position += UInt64(count)
        }
        try confirm()
    }
}
