// Who uses the block nodes of this machine: what is mounted from them, and what the kernel swaps to.
import CLinux
import Glibc

/// What is mounted from block nodes, and swapped to.
public struct NodeUsers: Sendable, Equatable {
    /// A node that is used.
    public struct Use: Sendable, Equatable {
        /// Its device number.
        public var major: UInt32
        public var minor: UInt32
        /// For what: the directory that it is mounted at, or `swap`.
        public var purpose: String
    }

    /// The nodes that are used.
    public private(set) var uses: [Use] = []

    /// Asks the kernel, in this process's name space of mounts.
    public init() {
        let mounts = (try? readSmallFile("/proc/self/mountinfo", limit: 16 << 20)) ?? []
        for line in String(decoding: mounts, as: UTF8.self).split(separator: "\n") { add(mount: line) }
        for line in (readText("/proc/swaps") ?? "").split(separator: "\n").dropFirst() {
            addNode(String(line.prefix { !$0.isWhitespace }), "swap")
        }
    }

    /// A line of mountinfo: the third field is the device, the fifth the directory, the second behind a dash what was
    /// mounted (proc(5)).
    mutating func add(mount line: Substring) {
        let fields = line.split(separator: " ")
        guard fields.count > 4 else { return }
        let numbers = fields[2].split(separator: ":")
        guard numbers.count == 2, let major = UInt32(numbers[0]), let minor = UInt32(numbers[1]) else { return }
        if major > 0 {
            uses.append(Use(major: major, minor: minor, purpose: String(fields[4])))
            return
        }
        // File systems without a disk, and those that may have several, as Btrfs: they name one of them.
        guard let dash = fields[5...].firstIndex(of: "-"), fields.count > dash + 2, fields[dash + 2].first == "/" else {
            return
        }
        addNode(String(fields[dash + 2]), String(fields[4]))
    }

    private mutating func addNode(_ path: String, _ purpose: String) {
        var status = stat()
        guard stat(path, &status) == 0, status.st_mode & S_IFMT == S_IFBLK else { return }
        add(UInt64(status.st_rdev), purpose)
    }

    private mutating func add(_ number: UInt64, _ purpose: String) {
        uses.append(Use(major: dg_device_major(number), minor: dg_device_minor(number), purpose: purpose))
    }

    /// For what a node is used.
    public func purposes(major: UInt32, minor: UInt32) -> [String] {
        uses.filter { $0.major == major && $0.minor == minor }.map(\.purpose)
    }
}
