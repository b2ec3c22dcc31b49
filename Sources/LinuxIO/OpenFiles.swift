// Knows which files this process has open for writing, so that nobody sends their pages by reference meanwhile.
import Block
import Glibc
import Synchronization

/// How many devices of this process write one file.
final class WriterCount: Sendable {
    let writers = Atomic<Int>(0)
}

/// The files that devices of this process have open, by device and inode number (block nodes by their own number).
enum OpenFiles {
    private struct Key: Hashable {
        let device: UInt64
        let inode: UInt64
    }

    private struct Weak {
        weak var count: WriterCount?
    }

    private static let table = Locked<[Key: Weak]>([:])

    /// The count shared by everybody in this process who has the file open.
    static func writers(of status: stat) -> WriterCount {
        let isNode = status.st_mode & S_IFMT == S_IFBLK
        let key = Key(
            device: UInt64(isNode ? status.st_rdev : status.st_dev), inode: isNode ? 0 : UInt64(status.st_ino))
        return table.withLock { table in
            if let known = table[key]?.count { return known }
            table = table.filter { $0.value.count != nil }
            let made = WriterCount()
            table[key] = Weak(count: made)
            return made
        }
    }
}
